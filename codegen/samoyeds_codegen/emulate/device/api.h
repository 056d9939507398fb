// What the kernel's text calls in the runtime, both sides' view of it. `line` is the caller's, for messages.

struct uint3 {
  unsigned x, y, z;
};

extern "C" {
uint3 emulated_index(int which);  // 0 threadIdx, 1 blockIdx, 2 blockDim, 3 gridDim
unsigned char* emulated_shared();
uint32_t emulated_shared_address(const void* p, int line);
uint32_t emulated_cluster_rank();
void emulated_set_registers(int count, const char* name, int line);
void emulated_block_barrier(int id, int threads, int stays, const char* name, int line);
void emulated_cluster_barrier(int line);
void emulated_warp_barrier(uint32_t mask, int line);
uint64_t emulated_shuffle(uint32_t mask, uint64_t value, int mode, int argument, int width, int line);
uint32_t emulated_vote(uint32_t mask, int predicate, int line);
void emulated_atomic(const void* p, unsigned bytes, int line);
void emulated_threadfence(int line);
const void* emulated_load(const void* p, unsigned bytes, const char* name, int line);
void emulated_ldmatrix(uint32_t* registers, int count, uint32_t address, int transposed, const char* name, int line);
void emulated_mma_sp(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int type, int selector,
                     int line);
void emulated_cp_async(uint32_t target, const void* source, uint32_t bytes, int valid, int line);
void emulated_cp_async_commit(int line);
void emulated_cp_async_wait(int pending, int line);
void emulated_cp_async_mbarrier_arrive(uint32_t address, int line);
void emulated_bulk_copy_peer(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier, int cta, int line);
void emulated_bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier, uint32_t mask,
                        const char* name, int line);
void emulated_fence_proxy_async(int line);
void emulated_fence_barrier_init(int line);
void emulated_mbarrier_init(uint32_t address, uint32_t count, int line);
void emulated_mbarrier_arrive(uint32_t address, int cta, uint32_t expected, const char* name, int line);
void emulated_mbarrier_wait(uint32_t address, uint32_t parity, int line);
void emulated_wgmma_sp(float* d, uint64_t a, uint64_t b, uint32_t metadata, int type, int columns, int selector,
                       int line);
void emulated_wgmma_sp_registers(float* d, const uint32_t* a, uint64_t b, uint32_t metadata, int type, int columns,
                                 int selector, int line);
void emulated_wgmma_fence(int line);
void emulated_wgmma_commit(int line);
void emulated_wgmma_wait(int pending, int line);
}
