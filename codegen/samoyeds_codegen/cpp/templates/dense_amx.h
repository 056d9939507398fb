// Many tokens an expert, dense bfloat16 weights, on the matrix unit: 16 rows times 16 tokens, 32 columns at a time.
//
// The first tokens read rows where they lie, if these are contiguous, DEPTH chunks at a time, and leave a copy for the
// others: rows that are a power of two apart would drive each other out of the first cache.

namespace amx {

constexpr int DEPTH = 8;
constexpr int PANELS = 4;  // of rows that go over the tiles together, in pairs, so that these are read less often

using Piece = char[DEPTH][TILE];  // of a panel: [chunk][row][column]

// Where the chunks of P panels are read: in the weights themselves, or in a copy.
template <int P>
struct Rows {
  const char* first[P];
  int64_t row_bytes, chunk_bytes;

  explicit Rows(const Piece* copies) : row_bytes(64), chunk_bytes(TILE) {
    for (int p = 0; p < P; ++p) first[p] = copies[p][0];
  }
  Rows(const Panel* w, int64_t column) : row_bytes(w->row_bytes()), chunk_bytes(64) {
    for (int p = 0; p < P; ++p) first[p] = w[p].tile(column);
  }
};

// Chunks of a panel from a column on, zero past the last column.
static inline void copy(const Panel& w, int64_t column, int64_t chunks, int64_t cols, Piece& out) {
  for (int64_t c = 0; c < chunks; ++c) copy_chunk(w, column + c * COLUMNS, cols - column - c * COLUMNS, out[c]);
}

using Sums = float[PANELS][PANEL * WIDTH];  // of a tile, each [PANEL, tokens]

// Sums of P panels and Q tiles, y[q * PANELS + p], over some chunks; `fresh` starts them at zero. KEEP leaves what was
// read in `copies`.
template <int P, int Q, bool KEEP>
static inline void block(const Rows<P>& w, int64_t chunks, const char* x, int64_t stride, bool fresh, Piece* copies,
                         float (*y)[PANEL * WIDTH]) {
  if (fresh) {
    _tile_zero(0);
    if (P > 1) _tile_zero(1);
    if (Q > 1) _tile_zero(2);
    if (P > 1 && Q > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, y[0], 64);
    if (P > 1) _tile_loadd(1, y[1], 64);
    if (Q > 1) _tile_loadd(2, y[(Q - 1) * PANELS], 64);
    if (P > 1 && Q > 1) _tile_loadd(3, y[(Q - 1) * PANELS + 1], 64);
  }
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_loadd(4, w.first[0] + c * w.chunk_bytes, w.row_bytes);
    _tile_loadd(6, x + c * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (KEEP) _tile_stored(4, copies[0][c], 64);
    if (P > 1) {
      _tile_loadd(5, w.first[P - 1] + c * w.chunk_bytes, w.row_bytes);
      _tile_dpbf16ps(1, 5, 6);
      if (KEEP) _tile_stored(5, copies[P - 1][c], 64);
    }
    if (Q > 1) {
      _tile_loadd(7, x + stride + c * TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (P > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y[0], 64);
  if (P > 1) _tile_stored(1, y[1], 64);
  if (Q > 1) _tile_stored(2, y[(Q - 1) * PANELS], 64);
  if (P > 1 && Q > 1) _tile_stored(3, y[(Q - 1) * PANELS + 1], 64);
}

// The same for chunks from a column on, of all tiles.
template <int P>
static void sweep(const Panel* w, int64_t cols, int64_t column, const char* x, int64_t stride, int64_t tiles,
                  Piece* copies, float (*y)[PANEL * WIDTH]) {
  const int64_t chunks = std::min<int64_t>(DEPTH, ceil_div(cols - column, COLUMNS));
  const bool direct = column + chunks * COLUMNS <= cols && w[0].whole() && w[P - 1].whole();
  const Rows<P> copied(copies);
  for (int p = 0; p < P && !direct; ++p) copy(w[p], column, chunks, cols, copies[p]);
  for (int64_t t = 0; t < tiles; t += 2) {
    const bool pair = t + 1 < tiles, keep = direct && t == 0 && tiles > 2;
    const auto kernel = !pair ? block<P, 1, false> : keep ? block<P, 2, true> : block<P, 2, false>;
    kernel(direct && t == 0 ? Rows<P>(w, column) : copied, chunks, x + t * stride + column / COLUMNS * TILE, stride,
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
