// Many tokens an expert: lanes are tokens, and each kept value is multiplied with a row of a transposed tile of them.
//
// A tile is [columns, NT * LANES tokens], its sums are [rows, NT * LANES]. A chunk of columns of the tile stays in the
// first cache while all rows of the panels go over it.

namespace spmm {

constexpr int WIDTH = 4 * LANES;  // tokens of a tile, less in the last one
constexpr int PAIR = 2;           // rows at a time, to have enough sums that do not depend on each other

static int64_t tile_width(int64_t tokens) { return std::min<int64_t>(WIDTH, round_up(tokens, LANES)); }

// Where in a chunk of the tile the columns of a row's values begin.
template <int NT>
static inline void offsets(const uint16_t* metadata, int32_t* out) {
  const uint32_t codes = CHUNK == 32 ? metadata[0] | uint32_t(metadata[1]) << 16 : metadata[0];
  for (int i = 0; i < CHUNK / 2; ++i) out[i] = (i / 2 * 4 + int32_t(codes >> 2 * i & 3)) * NT * LANES;
}

// The values of a chunk as floats: where they lie, or converted.
static inline const float* floats(const float* values, float*) { return values; }
static inline const float* floats(const bf16* values, float* space) {
  for (int i = 0; i < CHUNK / 2; ++i) space[i] = to_float(values[i]);
  return space;
}

// Two condensed rows over one chunk of columns. They never belong to the same output row.
template <int NT>
static inline void rows(const Panel& w, int r, int64_t column, const float* x, float* out) {
  int32_t at[PAIR][CHUNK / 2];
  float space[PAIR][CHUNK / 2];
  const float* values[PAIR];
  float* place[PAIR];
  Vec sum[PAIR][NT];
  for (int i = 0; i < PAIR; ++i) {
    offsets<NT>(w.metadata[r + i] + column / 16, at[i]);
    values[i] = floats(w.values[r + i] + column / 2, space[i]);
    place[i] = out + w.target(r + i, column) * NT * LANES;
    __builtin_prefetch(w.values[r + i] + column / 2 + CHUNK);
    for (int t = 0; t < NT; ++t) sum[i][t] = load(place[i] + t * LANES);
  }
#pragma GCC unroll 16
  for (int j = 0; j < CHUNK / 2; ++j)
    for (int i = 0; i < PAIR; ++i) {
      const Vec value = broadcast(values[i][j]);
      const float* tokens = x + at[i][j];
      for (int t = 0; t < NT; ++t) sum[i][t] = fma(value, load(tokens + t * LANES), sum[i][t]);
    }
  for (int i = 0; i < PAIR; ++i)
    for (int t = 0; t < NT; ++t) store(place[i] + t * LANES, sum[i][t]);
}

// out[p * PANEL + i] = row i of panel p times each token of a tile.
template <int NT>
static void multiply(const Panel* w, int panels, int64_t cols, const float* x, float* out) {
  std::fill(out, out + panels * PANEL * NT * LANES, 0.0f);
  for (int64_t column = 0; column < cols; column += CHUNK)
    for (int p = 0; p < panels; ++p)
      for (int r = 0; r < ROWS; r += PAIR)
        rows<NT>(w[p], r, column, x + column * NT * LANES, out + p * PANEL * NT * LANES);
}

static void multiply(int64_t tile_width, const Panel* w, int panels, int64_t cols, const float* x, float* out) {
  switch (tile_width / LANES) {
    case 1: return multiply<1>(w, panels, cols, x, out);
    case 2: return multiply<2>(w, panels, cols, x, out);
    case 3: return multiply<3>(w, panels, cols, x, out);
    default: return multiply<4>(w, panels, cols, x, out);
  }
}

static int64_t tiles(const Group& g) { return ceil_div(g.count, WIDTH); }
static int64_t bytes(int64_t count, const Matrix& w) {
  return round_up(count, LANES) * w.cols * int64_t(sizeof(float));
}
static float* tile_of(char* base, int64_t tile, int64_t cols) {
  return reinterpret_cast<float*>(base) + tile * WIDTH * cols;
}

// Rows as a transposed tile for w; zero where there is no row or no column.
static void gather(const Rows& rows, const Matrix& w, const Group& g, int64_t tile, char* out) {
  const int64_t tokens = std::min<int64_t>(WIDTH, g.count - tile * WIDTH), width = tile_width(tokens);
  float* x = tile_of(out, tile, w.cols);
  std::fill(x, x + w.cols * width, 0.0f);
  for (int64_t block = 0; block < rows.cols; block += 16)  // sixteen floats are a cache line
    for (int64_t t = 0; t < tokens; ++t) {
      const Weight* row = rows.row(tile * WIDTH + t);
      for (int64_t c = block; c < std::min<int64_t>(block + 16, rows.cols); ++c) x[c * width + t] = to_float(row[c]);
    }
}

// Features of panels first to last of h, [columns of down, tokens] for each tile.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  alignas(64) float y[2 * PANEL * WIDTH];
  for (int64_t panel = first; panel < last; ++panel) {
    const Panel w[2] = {Panel(a.up, g.expert, panel), Panel(a.gate, g.expert, panel)};
    for (int64_t tile = 0; tile < tiles(g); ++tile) {
      const int64_t width = tile_width(g.count - tile * WIDTH);
      float* h = tile_of(g.h, tile, a.down.cols);
      multiply(width, w, GATED ? 2 : 1, a.up.cols, tile_of(g.x, tile, a.up.cols), y);
      float* features = H_BY_ROWS ? y : h + panel * PANEL * width;
      activate_panel(a, g.expert, panel, width, y + PANEL * width, y, features);
      if (H_BY_ROWS) store_rows(a, g, tile * WIDTH, panel, width, features);
      else if (panel + 1 == a.up.panels()) std::fill(h + (panel + 1) * PANEL * width, h + a.down.cols * width, 0.0f);
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  alignas(64) float y[PANEL * WIDTH];
  for (int64_t panel = first; panel < last; ++panel) {
    const Panel w(a.down, g.expert, panel);
    for (int64_t tile = 0; tile < tiles(g); ++tile) {
      const int64_t width = tile_width(g.count - tile * WIDTH);
      multiply(width, &w, 1, a.down.cols, tile_of(g.h, tile, a.down.cols), y);
      accumulate_tile(a, g, tile * WIDTH, panel, width, y, out);
    }
  }
}
}  // namespace spmm
