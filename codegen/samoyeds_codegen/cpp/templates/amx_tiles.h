// Tokens in tiles, as the right side of a product: for 32 columns [16 pairs of columns, 16 tokens] of two bf16.

namespace amx {

// Which of the 32 columns of a chunk exist, of `left` that are left.
static inline __mmask32 existing(int64_t left) {
  return left >= COLUMNS ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
}

static int64_t tiles(const Group& g) { return ceil_div(g.count, WIDTH); }
static int64_t tile_bytes(const Matrix& w) { return ceil_div(w.cols, COLUMNS) * TILE; }
static int64_t bytes(int64_t count, const Matrix& w) { return ceil_div(count, WIDTH) * tile_bytes(w); }

// Rows in pairs of columns, a tile for w; zero where there is no row or no column.
static void gather(const Rows& from, const Matrix& w, const Group& g, int64_t tile, char* out) {
  const int64_t tokens = std::min<int64_t>(WIDTH, g.count - tile * WIDTH);
  char* x = out + tile * tile_bytes(w);
  for (int64_t c = 0; c < ceil_div(w.cols, COLUMNS); ++c) {
    const __mmask32 exist = existing(from.cols - c * COLUMNS);
    __m512 rows[WIDTH];
    for (int64_t t = 0; t < WIDTH; ++t) {
      const Weight* row = t < tokens ? from.row(tile * WIDTH + t) + c * COLUMNS : from.first;
      rows[t] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(t < tokens ? exist : 0, row));
    }
    transpose(rows);
    for (int i = 0; i < WIDTH; ++i) _mm512_store_ps(x + c * TILE + i * 64, rows[i]);
  }
}

// A panel's activations as pairs of rows of the tile that `down` reads.
static inline void store_pairs(const float* h, char* out) {
  for (int i = 0; i < PANEL; i += 2) {
    const __m512i even = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(load(h + i * WIDTH))));
    const __m512i odd = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(load(h + (i + 1) * WIDTH))));
    _mm512_store_si512(out + i / 2 * 64, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}
}  // namespace amx
