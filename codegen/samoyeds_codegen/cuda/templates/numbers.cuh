// Integers and 16-bit floats. NVRTC comes without headers, so they are made here under the names that CUDA gives them.
#define DEVICE __device__ __forceinline__

#ifndef SAMOYEDS_EMULATED
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

DEVICE float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float __half2float(__half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// To the nearest, ties to even.
DEVICE __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(x));
  return {uint16_t(pair)};
}
DEVICE __half __float2half(float x) {
  __half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#endif

using bfloat16 = __nv_bfloat16;
using float16 = __half;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(float16 x) { return __half2float(x); }

template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16(x); }
template <> DEVICE float16 from_float<float16>(float x) { return __float2half(x); }
