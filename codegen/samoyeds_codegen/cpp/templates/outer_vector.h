// Sums that never are in memory, where vectors multiply pairs and all slots of an expert are one piece of a panel.

namespace amx {

// Eight rows of a result, `lanes` apart, at two tiles, or at one.
static inline void write_rows(const char* w, int64_t cols, const char* x, int64_t stride, bool two, Weight* out,
                              int64_t lanes) {
  constexpr int ROWS = 8;
  __m512 first[ROWS], second[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) first[r] = second[r] = zero();
  rows_times<ROWS, 2>(w, 64, TILE, cols, x, two ? stride : 0, first, second);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r, out += lanes) {
    if (two) _mm512_storeu_si512(out, __m512i(_mm512_cvtne2ps_pbh(second[r], first[r])));
    else _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), __m256i(_mm512_cvtneps_pbh(first[r])));
  }
}

// The rows of some panels at all lanes of a group, if that can be done.
static bool write_panels(const Panel* w, int panels, int64_t cols, const Group& g, Weight* out) {
  if (cols > DEPTH * COLUMNS || g.count % WIDTH) return false;
  alignas(64) Piece copies[PANELS];
  const int64_t stride = ceil_div(cols, COLUMNS) * TILE;
  for (int p = 0; p < panels; ++p) copy(w[p], 0, ceil_div(cols, COLUMNS), cols, copies[p]);
  for (int64_t t = 0; t < tiles(g); t += 2)
    for (int r = 0; r < panels * PANEL; r += 8)
      write_rows(copies[r / PANEL][0] + r % PANEL * 64, cols, g.x + t * stride, stride, t + 1 < tiles(g),
                 out + r * g.count + t * WIDTH, g.count);
  return true;
}
}  // namespace amx
