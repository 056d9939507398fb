// Numbers of 16 bits: storage only, everything is computed in float.

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

inline float __bfloat162float(__nv_bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(float(fraction) * 0x1p-24f));
  return bits_as<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

// Round to nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return {uint16_t(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff)};
}
inline __half __float2half(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), size = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (size > 0x7f800000) return {0x7fff};                    // NaN
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more are infinity
  if (size >= 0x38800000) return {uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
  // A denormal number: adding 0.5 rounds it to a multiple of 2**-24.
  return {uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000))};
}
