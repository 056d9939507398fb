// One PTX instruction in each function (PTX ISA 8.5 and later), and nothing else; an emulator has its own.
#ifndef SAMOYEDS_EMULATED
#define SAMOYEDS_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace ptx {

DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// 16 bytes that are read once.
DEVICE uint4 load_streaming(const uint4* from) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(from));
  return r;
}

// Brings 64 bytes or more to the second-level cache; changes nothing else.
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" :: "l"(from)); }

// 16 bytes go past L1, 4 bytes through it; zeros, if not valid.
template <int BYTES> DEVICE void cp_async(uint32_t destination, const void* source, bool valid) {
  static_assert(BYTES == 16 || BYTES == 4, "a size that no kernel needs");
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(destination), "l"(source), "r"(valid ? 4 : 0) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// d += a * b: a is 16x32 with 2:4 zeros (16x16 kept), b is 32x8. SELECTOR names the pair of lanes of each quad whose
// metadata counts.
template <class T, int SELECTOR>
DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata);
#define SAMOYEDS_MMA_SP(TYPE, NAME, SELECTOR)                                                                      \
  template <> DEVICE void mma_sp_m16n8k32<TYPE, SELECTOR>(float (&d)[4], const uint32_t (&a)[4],                   \
                                                          const uint32_t (&b)[4], uint32_t metadata) {             \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." NAME "." NAME ".f32 "               \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, " #SELECTOR ";"               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),         \
                   "r"(metadata));                                                                                 \
  }
SAMOYEDS_MMA_SP(bfloat16, "bf16", 0)
SAMOYEDS_MMA_SP(bfloat16, "bf16", 1)
SAMOYEDS_MMA_SP(float16, "f16", 0)
SAMOYEDS_MMA_SP(float16, "f16", 1)
#undef SAMOYEDS_MMA_SP

// From here on: sm_90 and later. Barriers live in shared memory and are 8 bytes; a phase is over when all arrivals are
// there.
DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// Until the phase of this parity is over; a new barrier's phase before the first counts as parity 1.
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred over;\nagain_%=:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again_%=;\n}" :: "r"(barrier), "r"(parity) : "memory");
}
// The same in another block of the cluster, at the same address there: what this thread read before may be overwritten.
// It needs no wider release, which would be a fence for the whole device.
DEVICE void mbarrier_arrive_cluster(uint32_t barrier, uint32_t cta) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" :: "r"(barrier), "r"(cta) : "memory");
}
// An arrival that announces bytes, which bulk copies of this phase bring.
DEVICE void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// From shared memory to the same or another place in that of another block; its barrier gets the bytes.
DEVICE void bulk_copy_peer(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t barrier, uint32_t cta) {
  asm volatile("{\n.reg .b32 there, signal;\nmapa.shared::cluster.u32 there, %0, %4;\n"
               "mapa.shared::cluster.u32 signal, %3, %4;\n"
               "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, [signal];\n}"
               :: "r"(destination), "r"(source), "r"(bytes), "r"(barrier), "r"(cta) : "memory");
}
DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What ordinary instructions and cp.async wrote becomes visible to wgmma.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int R> DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(R)); }
template <int R> DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(R)); }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

// d += a * b by a warpgroup: a is 64x32 with 2:4 zeros, b is 32xN, both in shared memory. Specialised for each kernel.
template <class T, int N, int SELECTOR>
DEVICE void wgmma_sp(float (&d)[N / 2], uint64_t a, uint64_t b, uint32_t metadata);
// The same with a in registers, as in mma_sp_m16n8k32: each warp has 16 rows. They are not to change before the wait.
template <class T, int N, int SELECTOR>
DEVICE void wgmma_sp_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, uint32_t metadata);

}  // namespace ptx
#endif
