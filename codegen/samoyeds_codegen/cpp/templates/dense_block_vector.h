// Some panels times one or two tiles of tokens, by vectors that multiply pairs of bfloat16: sums of eight rows and two
// tiles, or of 16 rows and one, stay in registers over all chunks.

namespace amx {

constexpr bool LINES = false;  // pairs are read, one of each row

// Adds ROWS rows of weights, from w on, times Q tiles to first and second, sums of rows and lanes.
template <int ROWS, int Q>
static inline void rows_times(const char* w, int64_t row_bytes, int64_t chunk_bytes, int64_t cols, const char* x,
                              int64_t stride, __m512* first, __m512* second) {
  for (int64_t c = 0; c < cols; c += COLUMNS, w += chunk_bytes, x += TILE) {
    const char* columns = w;
    const int64_t end = ceil_div(std::min<int64_t>(COLUMNS, cols - c), 2) * 64;
    for (int64_t k = 0; k < end; k += 64, columns += 4) {
      const __m512bh pairs = __m512bh(_mm512_load_si512(x + k));
      const __m512bh others = __m512bh(_mm512_load_si512(x + (Q > 1 ? stride : 0) + k));
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        int32_t pair;
        std::memcpy(&pair, columns + r * row_bytes, sizeof(pair));
        const __m512bh all = __m512bh(_mm512_set1_epi32(pair));
        first[r] = _mm512_dpbf16_ps(first[r], all, pairs);
        if (Q > 1) second[r] = _mm512_dpbf16_ps(second[r], all, others);
      }
    }
  }
}

// The same for sums in memory, or zero if they are `fresh`.
template <int ROWS, int Q>
static inline void add_rows(const char* w, int64_t row_bytes, int64_t chunk_bytes, int64_t cols, const char* x,
                            int64_t stride, bool fresh, float* y, float* z) {
  __m512 first[ROWS], second[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    first[r] = fresh ? zero() : load(y + r * WIDTH);
    if (Q > 1) second[r] = fresh ? zero() : load(z + r * WIDTH);
  }
  rows_times<ROWS, Q>(w, row_bytes, chunk_bytes, cols, x, stride, first, second);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    store(y + r * WIDTH, first[r]);
    if (Q > 1) store(z + r * WIDTH, second[r]);
  }
}

// Sums of P panels and Q tiles, y[q * PANELS + p], over some columns; `fresh` starts them at zero.
template <int P, int Q, bool KEEP>
static void block(const Rows<P>& w, int64_t cols, const char* x, int64_t stride, bool fresh, Piece*,
                  float (*y)[PANEL * WIDTH]) {
  constexpr int ROWS = Q > 1 ? 8 : 16;
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < PANEL; r += ROWS)
      add_rows<ROWS, Q>(w.first[p] + r * w.row_bytes, w.row_bytes, w.chunk_bytes, cols, x, stride, fresh,
                        y[p] + r * WIDTH, y[(Q - 1) * PANELS + p] + r * WIDTH);
}
}  // namespace amx
