// Many tokens an expert: lanes are tokens, and each kept value is multiplied with a row of a transposed tile of them.
//
// A tile is [columns, NT * LANES tokens], its sums are [rows, NT * LANES]. A record's columns of the tile stay in the
// first cache while the strips go over them.

namespace spmm {

constexpr int MOST_NT = LANES == 16 ? 6 : 4;
constexpr int WIDTH = MOST_NT * LANES;  // tokens of a tile, at most
constexpr int STRIPS = 2;               // at a time

// Tokens of each tile but the last: as many as there are, in tiles of about the same width.
static int64_t tiles(const Group& g) { return ceil_div(g.count, WIDTH); }
static int64_t whole_width(const Group& g) { return round_up(ceil_div(g.count, tiles(g)), LANES); }
static int64_t tile_width(const Group& g, int64_t tile) {
  return std::min(whole_width(g), round_up(g.count - tile * whole_width(g), LANES));
}
static int64_t bytes(int64_t count, const Matrix& w) {
  return round_up(count, LANES) * w.cols * int64_t(sizeof(float));
}
static float* tile_of(char* base, const Group& g, int64_t tile, int64_t cols) {
  return reinterpret_cast<float*>(base) + tile * whole_width(g) * cols;
}

// Where in a record's part of the tile the columns of its values begin, [values of a row, rows].
template <int NT>
static inline void offsets(const uint32_t* positions, int32_t* at) {
  for (int i = 0; i < CHUNK / 2; ++i)
    for (int l = 0; l < STRIP; ++l)
      at[i * STRIP + l] = (i / 2 * 4 + int32_t(positions[l] >> 2 * i & 3)) * NT * LANES;
}

// The values of a record as floats [values of a row, rows]: where they lie, or converted.
static inline const float* floats(const float* values, float*) { return values; }
static inline const float* floats(const bf16* values, float* space) {
  for (int g = 0; g < 8; ++g)
    for (int l = 0; l < STRIP; ++l) {
      space[(2 * g) * STRIP + l] = to_float(values[g * FOUR + 2 * l]);
      space[(2 * g + 1) * STRIP + l] = to_float(values[g * FOUR + 2 * l + 1]);
    }
  return space;
}

// Rows first to first + L of a record, PART columns of it, added to where `place` says.
template <int NT, int L>
static inline void rows(const float* values, const int32_t* at, const float* x, float* const* place) {
  Vec sum[L][NT];
#pragma GCC unroll 8
  for (int i = 0; i < L; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) sum[i][t] = load(place[i] + t * LANES);
#pragma GCC unroll 16
  for (int j = 0; j < PART / 2; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < L; ++i) {
      const Vec value = broadcast(values[j * STRIP + i]);
      const float* tokens = x + at[j * STRIP + i];
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) sum[i][t] = fma(value, load(tokens + t * LANES), sum[i][t]);
    }
#pragma GCC unroll 8
  for (int i = 0; i < L; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) store(place[i] + t * LANES, sum[i][t]);
}

// Which output row of a strip each of its rows belongs to in a vector of columns.
static inline void targets(const Strip& w, int64_t vector, int* target) {
  for (int s = 0; s < M; ++s) {
    const uint32_t lanes = N == M ? 0xffff : w.lanes(vector, s);
    for (int l = 0; l < STRIP; ++l)
      if (lanes >> l & 1) target[l] = l / N * M + s;
  }
}

// out[s * PANEL + i] = row i of strip s times each token of a tile.
template <int NT>
static void multiply(const Strip* w, const Strip* next, int strips, int64_t cols, const float* x, float* out) {
  constexpr int L = NT == 1 ? 8 : NT == 2 ? 4 : 2;
  alignas(64) int32_t at[CHUNK / 2 * STRIP];
  alignas(64) float space[RECORD];
  const int64_t chunks = cols / CHUNK;
  std::fill(out, out + strips * PANEL * NT * LANES, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int s = 0; s < strips; ++s) {
      const float* values = floats(w[s].values + chunk * RECORD, space);
      offsets<NT>(w[s].positions + chunk * STRIP, at);
      for (int line = 0; line < Strip::LINES; ++line) prefetch(w[s], next[s], chunk, chunks, line);
      for (int part = 0; part < CHUNK / PART; ++part) {
        int target[STRIP] = {};
        float* place[STRIP];
        targets(w[s], (chunk * CHUNK + part * PART) / V, target);
        for (int l = 0; l < STRIP; ++l) place[l] = out + (s * PANEL + target[l]) * NT * LANES;
        for (int l = 0; l < STRIP; l += L)
          rows<NT, L>(values + part * PART / 2 * STRIP + l, at + part * PART / 2 * STRIP + l,
                      x + chunk * CHUNK * NT * LANES, place + l);
      }
    }
}

static void multiply(int64_t width, const Strip* w, const Strip* next, int strips, int64_t cols, const float* x,
                     float* out) {
  switch (width / LANES) {
    case 1: return multiply<1>(w, next, strips, cols, x, out);
    case 2: return multiply<2>(w, next, strips, cols, x, out);
    case 3: return multiply<3>(w, next, strips, cols, x, out);
    case 4: return multiply<4>(w, next, strips, cols, x, out);
    case 5: return multiply<std::min(5, MOST_NT)>(w, next, strips, cols, x, out);
    default: return multiply<MOST_NT>(w, next, strips, cols, x, out);
  }
}

// Rows as a transposed tile for w; zero where there is no row or no column.
static void gather(const Rows& rows, const Matrix& w, const Group& g, int64_t tile, char* out) {
  const int64_t width = tile_width(g, tile), first = tile * whole_width(g);
  const int64_t tokens = std::min(width, g.count - first);
  float* x = tile_of(out, g, tile, w.cols);
  std::fill(x, x + w.cols * width, 0.0f);
  for (int64_t block = 0; block < rows.cols; block += 16)  // sixteen floats are a cache line
    for (int64_t t = 0; t < tokens; ++t) {
      const Weight* row = rows.row(first + t);
      for (int64_t c = block; c < std::min<int64_t>(block + 16, rows.cols); ++c) x[c * width + t] = to_float(row[c]);
    }
}

// Features of panels first to last of h, [columns of down, tokens] for each tile.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  alignas(64) float y[2 * PANEL * WIDTH];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t then = std::min(panel + 1, a.up.panels() - 1);
    const Strip w[2] = {Strip(a.up, g.expert, panel), Strip(a.gate, g.expert, panel)};
    const Strip next[2] = {Strip(a.up, g.expert, then), Strip(a.gate, g.expert, then)};
    for (int64_t tile = 0; tile < tiles(g); ++tile) {
      const int64_t width = tile_width(g, tile);
      float* h = tile_of(g.h, g, tile, a.down.cols);
      multiply(width, w, next, GATED ? 2 : 1, a.up.cols, tile_of(g.x, g, tile, a.up.cols), y);
      float* features = H_BY_ROWS ? y : h + panel * PANEL * width;
      activate_panel(a, g.expert, panel, width, y + PANEL * width, y, features);
      if (H_BY_ROWS) store_rows(a, g, tile * whole_width(g), panel, width, features);
      else if (panel + 1 == a.up.panels()) std::fill(h + (panel + 1) * PANEL * width, h + a.down.cols * width, 0.0f);
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  alignas(64) float y[STRIPS * PANEL * WIDTH];
  for (int64_t tile = 0; tile < tiles(g); ++tile) {
    const int64_t width = tile_width(g, tile);
    for (int64_t panel = first; panel < last; panel += STRIPS) {
      const int count = int(std::min<int64_t>(STRIPS, last - panel));
      const Strip w[2] = {Strip(a.down, g.expert, panel), Strip(a.down, g.expert, panel + count - 1)};
      const int64_t then = std::min(panel + count, last - 1);
      const Strip next[2] = {Strip(a.down, g.expert, then), Strip(a.down, g.expert, std::min(then + 1, last - 1))};
      multiply(width, w, next, count, a.down.cols, tile_of(g.h, g, tile, a.down.cols), y);
      for (int i = 0; i < count; ++i)
        accumulate_tile(a, g, tile * whole_width(g), panel + i, width, y + i * PANEL * width, out);
    }
  }
}
}  // namespace spmm
