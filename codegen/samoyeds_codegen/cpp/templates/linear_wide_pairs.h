// What `linear_wide.h` multiplies where vectors multiply pairs of bfloat16: two inputs at 32 outputs become two vectors
// of pairs without being turned; their order of outputs is put right when results are stored.

namespace wide {

constexpr int TOKENS = 12;  // whose sums, two vectors each, are in registers
constexpr int OUTPUTS = 32, DEPTH = 256;
using Cell = Weight;
using Piece = __m512i[DEPTH / 2][2];

static inline Cell cell(Weight x) { return x; }
static inline __mmask32 existing(int64_t some) { return some >= OUTPUTS ? ~0u : (1u << some) - 1; }

// So many inputs from one on at some outputs, zero elsewhere.
static inline void fill(const Panel& w, int64_t first, int64_t depth, int64_t some, Piece& out) {
  const __mmask32 exist = existing(some);
  for (int64_t k = 0; k < depth; k += 2) {
    const __m512i a = _mm512_maskz_loadu_epi16(exist, w.column(first + k));
    const __m512i b = k + 1 < depth ? _mm512_maskz_loadu_epi16(exist, w.column(first + k + 1)) : _mm512_setzero_si512();
    out[k / 2][0] = _mm512_unpacklo_epi16(a, b), out[k / 2][1] = _mm512_unpackhi_epi16(a, b);
  }
}

// Adds T tokens times a piece to their sums, or writes them if they are `fresh`; rows are stride apart.
template <int T>
static void block(const Piece& w, int64_t depth, const Cell* x, int64_t stride, bool fresh, float (*sums)[OUTPUTS]) {
  __m512 low[T], high[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    low[t] = fresh ? zero() : load(sums[t]);
    high[t] = fresh ? zero() : load(sums[t] + 16);
  }
  for (int64_t k = 0; 2 * k < depth; ++k, x += 2) {
    const __m512bh first = __m512bh(w[k][0]), second = __m512bh(w[k][1]);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int32_t pair;
      std::memcpy(&pair, x + t * stride, sizeof(pair));
      const __m512bh all = __m512bh(_mm512_set1_epi32(pair));
      low[t] = _mm512_dpbf16_ps(low[t], all, first);
      high[t] = _mm512_dpbf16_ps(high[t], all, second);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store(sums[t], low[t]), store(sums[t] + 16, high[t]);
}

// Sums of a token, which are in the order of pairs, as a piece of its row.
static inline void store_outputs(const float* sums, int64_t some, Weight* out) {
  const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512 low = load(sums), high = load(sums + 16);
  const __m512bh row =
      _mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(low, back, high), _mm512_permutex2var_ps(low, front, high));
  _mm512_mask_storeu_epi16(out, existing(some), __m512i(row));
}
}  // namespace wide
