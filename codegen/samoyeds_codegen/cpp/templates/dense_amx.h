// Many tokens an expert, dense bfloat16 weights: 16 rows times 16 tokens, 32 columns at a time, as the matrix unit does
// it; `block` multiplies, on that unit or by vectors.
//
// Rows are copied to the first cache, DEPTH chunks at a time: rows that are a power of two apart would drive each other
// out of it. What reads whole lines (LINES) takes those of the first tokens where they lie, and leaves the copy for the
// others.

namespace amx {

// Chunks of a panel from a column on, zero past the last column.
static inline void copy(const Panel& w, int64_t column, int64_t chunks, int64_t cols, Piece& out) {
  for (int64_t c = 0; c < chunks; ++c) copy_chunk(w, column + c * COLUMNS, cols - column - c * COLUMNS, out[c]);
}

using Sums = float[PANELS][PANEL * WIDTH];  // of a tile, each [PANEL, tokens]

// Sums of P panels and all tiles for DEPTH chunks from a column on.
template <int P>
static void sweep(const Panel* w, int64_t cols, int64_t column, const char* x, int64_t stride, int64_t tiles,
                  Piece* copies, float (*y)[PANEL * WIDTH]) {
  const int64_t depth = std::min<int64_t>(DEPTH * COLUMNS, cols - column);
  const bool direct = LINES && depth % COLUMNS == 0 && w[0].whole() && w[P - 1].whole();
  const Rows<P> copied(copies);
  for (int p = 0; p < P && !direct; ++p) copy(w[p], column, ceil_div(depth, COLUMNS), cols, copies[p]);
  for (int64_t t = 0; t < tiles; t += 2) {
    const bool pair = t + 1 < tiles, keep = direct && t == 0 && tiles > 2;
    const auto kernel = !pair ? block<P, 1, false> : keep ? block<P, 2, true> : block<P, 2, false>;
    kernel(direct && t == 0 ? Rows<P>(w, column) : copied, depth, x + t * stride + column / COLUMNS * TILE, stride,
           column == 0, copies, y + t * PANELS);
  }
}

// y[tile][p] = rows of some panels times tokens of tiles, at most MOST of them, stride bytes apart.
static void multiply(const Panel* w, int panels, int64_t cols, const char* x, int64_t stride, int64_t tiles, Sums* y) {
  alignas(64) Piece copies[2];
  for (int64_t column = 0; column < cols; column += DEPTH * COLUMNS)
    for (int p = 0; p < panels; p += 2) {
      const auto kernel = p + 1 < panels ? sweep<2> : sweep<1>;
      kernel(w + p, cols, column, x, stride, tiles, copies, y[0] + p);
    }
}

// Features of panels first to last of h.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  constexpr int each = GATED ? 2 : 1;
  const Unit unit;
  alignas(64) Sums y[MOST];
  alignas(64) float h[PANEL * WIDTH];
  const int64_t in = tile_bytes(a.up), out = tile_bytes(a.down);
  for (int64_t panel = first; panel < last; panel += PANELS / each) {
    const int64_t stop = std::min<int64_t>(panel + PANELS / each, last);
    Panel w[PANELS];
    for (int64_t p = panel; p < stop; ++p) {
      w[(p - panel) * each] = Panel(a.up, g.expert, p);
      if (GATED) w[(p - panel) * each + 1] = Panel(a.gate, g.expert, p);
    }
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, tiles(g) - begin);
      multiply(w, int(stop - panel) * each, a.up.cols, g.x + begin * in, in, count, y);
      for (int64_t t = 0; t < count; ++t) {
        char* tile = g.h + (begin + t) * out;
        for (int64_t p = panel; p < stop; ++p) {
          float* sums = y[t][(p - panel) * each];
          activate_panel(a, g.expert, p, WIDTH, sums + PANEL * WIDTH, sums, h);
          if (H_BY_ROWS) store_rows(a, g, (begin + t) * WIDTH, p, WIDTH, h);
          else store_pairs(h, tile + p * TILE / 2);
        }
        const int64_t filled = stop * TILE / 2;
        if (!H_BY_ROWS && stop == a.up.panels()) std::memset(tile + filled, 0, size_t(out - filled));
      }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  const Unit unit;
  alignas(64) Sums y[MOST];
  const int64_t stride = tile_bytes(a.down);
  for (int64_t panel = first; panel < last; panel += PANELS) {
    const int64_t stop = std::min(panel + PANELS, last);
    Panel w[PANELS];
    for (int64_t p = panel; p < stop; ++p) w[p - panel] = Panel(a.down, g.expert, p);
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, tiles(g) - begin);
      multiply(w, int(stop - panel), a.down.cols, g.h + begin * stride, stride, count, y);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t p = panel; p < stop; ++p)
          accumulate_tile(a, g, (begin + t) * WIDTH, p, WIDTH, y[t][p - panel], out);
    }
  }
}
}  // namespace amx
