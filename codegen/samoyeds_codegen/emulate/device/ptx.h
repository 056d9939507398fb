// The wrappers of ptx.cuh, one instruction each: same names, same arguments, and the caller's line.

namespace ptx {

template <class T>
constexpr int number = -1;
template <>
constexpr int number<__nv_bfloat16> = 0;
template <>
constexpr int number<__half> = 1;

inline uint32_t shared_address(const void* p, int line = __builtin_LINE()) { return emulated_shared_address(p, line); }

template <class T, int SELECTOR>
inline void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                            int line = __builtin_LINE()) {
  static_assert(number<T> >= 0 && (SELECTOR == 0 || SELECTOR == 1));
  emulated_mma_sp(d, a, b, metadata, number<T>, SELECTOR, line);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, int line = __builtin_LINE()) {
  emulated_ldmatrix(r, 4, address, false, "ldmatrix_x4", line);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address, int line = __builtin_LINE()) {
  emulated_ldmatrix(r, 2, address, false, "ldmatrix_x2", line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, int line = __builtin_LINE()) {
  emulated_ldmatrix(r, 4, address, true, "ldmatrix_x4_trans", line);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address, int line = __builtin_LINE()) {
  emulated_ldmatrix(r, 2, address, true, "ldmatrix_x2_trans", line);
}

__attribute__((noinline, no_sanitize("thread"))) static uint4 load_streaming(const uint4* p,
                                                                             int line = __builtin_LINE()) {
  return *static_cast<const uint4*>(emulated_load(p, 16, "load_streaming", line));
}

inline void prefetch(const void* p, int line = __builtin_LINE()) { emulated_load(p, 1, "prefetch", line); }

template <int BYTES>
inline void cp_async(uint32_t dst, const void* src, bool valid, int line = __builtin_LINE()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulated_cp_async(dst, src, BYTES, valid, line);
}
inline void cp_async_commit(int line = __builtin_LINE()) { emulated_cp_async_commit(line); }
template <int N>
inline void cp_async_wait(int line = __builtin_LINE()) {
  emulated_cp_async_wait(N, line);
}
inline void cp_async_mbarrier_arrive(uint32_t address, int line = __builtin_LINE()) {
  emulated_cp_async_mbarrier_arrive(address, line);
}

inline void mbarrier_init(uint32_t address, uint32_t count, int line = __builtin_LINE()) {
  emulated_mbarrier_init(address, count, line);
}
inline void mbarrier_arrive(uint32_t address, int line = __builtin_LINE()) {
  emulated_mbarrier_arrive(address, -1, 0, "mbarrier_arrive", line);
}
inline void mbarrier_arrive_cluster(uint32_t address, uint32_t cta, int line = __builtin_LINE()) {
  emulated_mbarrier_arrive(address, int(cta), 0, "mbarrier_arrive_cluster", line);
}
inline void mbarrier_expect(uint32_t address, uint32_t bytes, int line = __builtin_LINE()) {
  emulated_mbarrier_arrive(address, -1, bytes, "mbarrier_expect", line);
}
inline void mbarrier_wait(uint32_t address, uint32_t parity, int line = __builtin_LINE()) {
  emulated_mbarrier_wait(address, parity, line);
}
inline void fence_barrier_init(int line = __builtin_LINE()) { emulated_fence_barrier_init(line); }
inline void fence_proxy_async(int line = __builtin_LINE()) { emulated_fence_proxy_async(line); }

inline void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, int line = __builtin_LINE()) {
  emulated_bulk_copy(dst, src, bytes, mbarrier, 0, "bulk_copy", line);
}
inline void bulk_copy_multicast(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, uint16_t mask,
                                int line = __builtin_LINE()) {
  emulated_bulk_copy(dst, src, bytes, mbarrier, mask, "bulk_copy_multicast", line);
}

inline void bulk_copy_peer(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t mbarrier, uint32_t cta,
                           int line = __builtin_LINE()) {
  emulated_bulk_copy_peer(dst, src, bytes, mbarrier, int(cta), line);
}

template <class T, int N, int SELECTOR>
inline void wgmma_sp(float (&d)[N / 2], uint64_t a, uint64_t b, uint32_t metadata, int line = __builtin_LINE()) {
  static_assert(number<T> >= 0 && N % 8 == 0 && N <= 256 && (SELECTOR == 0 || SELECTOR == 1));
  emulated_wgmma_sp(d, a, b, metadata, number<T>, N, SELECTOR, line);
}
template <class T, int N, int SELECTOR>
inline void wgmma_sp_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, uint32_t metadata,
                               int line = __builtin_LINE()) {
  static_assert(number<T> >= 0 && N % 8 == 0 && N <= 256 && (SELECTOR == 0 || SELECTOR == 1));
  emulated_wgmma_sp_registers(d, a, b, metadata, number<T>, N, SELECTOR, line);
}
inline void wgmma_fence(int line = __builtin_LINE()) { emulated_wgmma_fence(line); }
inline void wgmma_commit(int line = __builtin_LINE()) { emulated_wgmma_commit(line); }
template <int N>
inline void wgmma_wait(int line = __builtin_LINE()) {
  emulated_wgmma_wait(N, line);
}

inline void named_barrier_sync(int id, int threads, int line = __builtin_LINE()) {
  emulated_block_barrier(id, threads, true, "named_barrier_sync", line);
}
inline void named_barrier_arrive(int id, int threads, int line = __builtin_LINE()) {
  emulated_block_barrier(id, threads, false, "named_barrier_arrive", line);
}
template <int R>
inline void registers_up(int line = __builtin_LINE()) {
  emulated_set_registers(R, "registers_up", line);
}
template <int R>
inline void registers_down(int line = __builtin_LINE()) {
  emulated_set_registers(R, "registers_down", line);
}
inline uint32_t cluster_rank() { return emulated_cluster_rank(); }
inline void cluster_sync(int line = __builtin_LINE()) { emulated_cluster_barrier(line); }

}  // namespace ptx
