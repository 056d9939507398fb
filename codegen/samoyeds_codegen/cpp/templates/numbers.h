// Numbers: bfloat16 is stored and multiplied, everything else is float.

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
static inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
static inline bf16 to_bf16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0)};
}
static inline void store_as(float* out, float x) { *out = x; }
static inline void store_as(bf16* out, float x) { *out = to_bf16(x); }
