// How vectors of weights meet columns of tokens: both as they are stored, in pairs of bfloat16.

namespace dot {

constexpr int WIDE = 2 * LANES;  // columns of a vector

static inline Vec columns_of(const bf16* x) { return _mm512_castsi512_ps(_mm512_loadu_si512(x)); }
static inline Vec weights_of(const bf16* w) { return columns_of(w); }
static inline Vec some_weights(const bf16* w, int64_t count) {
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((uint64_t(1) << count) - 1, w));
}
static inline Vec times(Vec weights, Vec columns, Vec sum) {
  return _mm512_dpbf16_ps(sum, __m512bh(_mm512_castps_si512(weights)), __m512bh(_mm512_castps_si512(columns)));
}
}  // namespace dot
