// A chunk of a panel as a tile, for `dense_amx.h`.

namespace amx {

// The weights of two inputs at the outputs of a panel, in pairs; `two` says whether there is a second input.
static inline __m512i pairs_of(const Panel& w, int64_t column, bool two) {
  const Weight *p = w.column(column), *q = two ? w.column(column + 1) : p;
  const __mmask32 second = two ? ~0u : 0;
  if (w.step == 2) {  // every other output: the lower half of each pair in memory
    const __mmask32 exist = w.outputs == PANEL ? 0x7fffffff : (1u << (2 * w.outputs - 1)) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(exist, p), b = _mm512_maskz_loadu_epi16(exist & second, q);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
  }
  const __mmask16 exist = __mmask16((1u << w.outputs) - 1);
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, p));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(exist & second), q));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

// 16 rows of 32 columns, zero past the last of those that are left: pairs of columns, turned.
static inline void copy_chunk(const Panel& w, int64_t column, int64_t left, char* out) {
  __m512 pairs[16];
  for (int i = 0; i < 16; ++i)
    pairs[i] = 2 * i < left ? _mm512_castsi512_ps(pairs_of(w, column + 2 * i, 2 * i + 1 < left)) : _mm512_setzero_ps();
  transpose(pairs);
  for (int r = 0; r < PANEL; ++r) _mm512_store_ps(out + r * 64, pairs[r]);
}
}  // namespace amx
