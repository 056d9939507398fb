// The part of CUDA C++ that generated kernels use, for a C++ compiler.

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static const
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
// One section, so that the runtime knows where these variables are.
#define __shared__ static __attribute__((section("samoyeds_shared")))
#define SAMOYEDS_SHARED(name) unsigned char* const name = emulated_shared()

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct int3 {
  int x, y, z;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct float3 {
  float x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx emulated_index(0)
#define blockIdx emulated_index(1)
#define blockDim emulated_index(2)
#define gridDim emulated_index(3)
constexpr int warpSize = 32;

inline void __syncthreads(int line = __builtin_LINE()) {
  const uint3 size = blockDim;
  emulated_block_barrier(0, int(size.x * size.y * size.z), true, "__syncthreads", line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulated_warp_barrier(mask, line); }
inline void __threadfence(int line = __builtin_LINE()) { emulated_threadfence(line); }

template <class T>
inline T emulated_shuffle_as(unsigned mask, T x, int mode, int argument, int width, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &x, sizeof x);
  bits = emulated_shuffle(mask, bits, mode, argument, width, line);
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32, int line = __builtin_LINE()) {
  return emulated_shuffle_as(mask, x, 0, lane, width, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, int delta, int width = 32, int line = __builtin_LINE()) {
  return emulated_shuffle_as(mask, x, 1, delta, width, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, int delta, int width = 32, int line = __builtin_LINE()) {
  return emulated_shuffle_as(mask, x, 2, delta, width, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, int line = __builtin_LINE()) {
  return emulated_shuffle_as(mask, x, 3, lanes, width, line);
}
inline unsigned __ballot_sync(unsigned mask, int x, int line = __builtin_LINE()) {
  return emulated_vote(mask, x, line);
}
inline int __any_sync(unsigned mask, int x, int line = __builtin_LINE()) { return emulated_vote(mask, x, line) != 0; }
inline int __all_sync(unsigned mask, int x, int line = __builtin_LINE()) {
  return emulated_vote(mask, x, line) == mask;
}

// The operation itself is not a plain access, so the compiler must not instrument it.
#define EMULATED_ATOMIC(name, expression)                                                           \
  template <class T>                                                                                \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* p, T x, int line = __builtin_LINE()) { \
    emulated_atomic(p, sizeof(T), line);                                                            \
    const T old = *p;                                                                               \
    *p = expression;                                                                                \
    return old;                                                                                     \
  }
EMULATED_ATOMIC(atomicAdd, old + x)
EMULATED_ATOMIC(atomicSub, old - x)
EMULATED_ATOMIC(atomicMax, old < x ? x : old)
EMULATED_ATOMIC(atomicMin, x < old ? x : old)
EMULATED_ATOMIC(atomicOr, old | x)
EMULATED_ATOMIC(atomicExch, x)
#undef EMULATED_ATOMIC
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* p, T compare, T x, int line = __builtin_LINE()) {
  emulated_atomic(p, sizeof(T), line);
  const T old = *p;
  if (old == compare) *p = x;
  return old;
}

// Declared here, as <cmath> takes longer to compile than a kernel.
extern "C" {
float expf(float), exp2f(float), expm1f(float), logf(float), log2f(float), log1pf(float), powf(float, float);
float erff(float), tanhf(float), sinf(float), cosf(float), sqrtf(float), fabsf(float), fmaf(float, float, float);
float fmaxf(float, float), fminf(float, float), floorf(float), ceilf(float), truncf(float), rintf(float), roundf(float);
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)y << 32 | x;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return found;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
