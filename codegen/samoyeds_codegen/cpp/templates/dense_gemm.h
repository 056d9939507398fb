// Many tokens an expert, dense weights: lanes are tokens; each weight is multiplied with a row of a transposed tile.
//
// A tile is [columns, tokens], its sums are [rows, tokens]. DEPTH columns of the rows at hand are copied as floats into
// the first cache, and all tiles go over them. Each such piece is summed on its own, which keeps errors small.

namespace gemm {

constexpr int WIDTH = 3 * LANES;  // most tokens of a tile
constexpr int HEIGHT = LANES == 16 ? 8 : 4;  // rows whose sums are in registers
constexpr int DEPTH = 128;
constexpr int MOST = 8;    // tiles whose sums are kept at a time
constexpr int PANELS = 4;  // of rows that go over the tiles together, so that these are read from afar less often

// Vectors of tokens are dealt evenly to tiles: 80 tokens become 48 and 32, not 48, 16 and 16.
struct Tile {
  int64_t slot, width;  // the first of its slots, and lanes, of which the last ones may have no token

  Tile(int64_t count, int64_t tile) {
    const int64_t vectors = ceil_div(count, LANES), tiles = ceil_div(count, WIDTH);
    const int64_t each = vectors / tiles, longer = vectors % tiles;
    slot = (tile * each + std::min(tile, longer)) * LANES;
    width = (each + (tile < longer)) * LANES;
  }
  float* in(char* base, int64_t cols) const { return reinterpret_cast<float*>(base) + slot * cols; }
};

static int64_t tiles(const Group& g) { return ceil_div(g.count, WIDTH); }
static int64_t bytes(int64_t count, const Matrix& w) {
  return round_up(count, LANES) * w.cols * int64_t(sizeof(float));
}

using Piece = float[PANEL * DEPTH];  // of a panel: [rows, columns], or turned as its weights are
constexpr int ROW = BY_COLUMNS ? 1 : DEPTH, COLUMN = BY_COLUMNS ? PANEL : 1;  // from one to the next in a piece

// Adds HEIGHT rows of a piece times a tile to out, whose rows are stride apart, or writes them if that is `fresh`.
// Meanwhile the same columns of the rows `ahead` are fetched, and of the tokens that come next, `soon`, as much as is
// this block's share.
template <int NT>
static inline void block(const float* w, const Weight* const* ahead, int64_t depth, const float* x, const float* soon,
                         bool fresh, float* out, int64_t stride) {
  constexpr int64_t LINE = 64 / sizeof(Weight);
  constexpr int SHARE = int(LINE * NT * LANES / 16 * HEIGHT / (PANELS * PANEL));
  Vec sum[HEIGHT][NT];
  for (int i = 0; i < HEIGHT; ++i)
    for (int n = 0; n < NT; ++n) sum[i][n] = zero();
  for (int64_t begin = 0; begin < depth; begin += LINE) {
    for (int i = 0; i < HEIGHT && !BY_COLUMNS; ++i) __builtin_prefetch(ahead[i] + begin);
    for (int i = 0; i < SHARE; ++i, soon += 16) __builtin_prefetch(soon, 0, 2);  // into the second cache
    const int64_t end = std::min(begin + LINE, depth);
    for (int64_t k = begin; k < end; ++k) {
      Vec tokens[NT];
#pragma GCC unroll 8
      for (int n = 0; n < NT; ++n) tokens[n] = load(x + (k * NT + n) * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < HEIGHT; ++i) {
        const Vec value = broadcast(w[i * ROW + k * COLUMN]);
#pragma GCC unroll 8
        for (int n = 0; n < NT; ++n) sum[i][n] = fma(value, tokens[n], sum[i][n]);
      }
    }
  }
  for (int i = 0; i < HEIGHT; ++i)
    for (int n = 0; n < NT; ++n) {
      float* place = out + i * stride + n * LANES;
      store(place, fresh ? sum[i][n] : add(load(place), sum[i][n]));
    }
}

// The same for all rows of a piece.
template <int NT>
static void panel_times(const Piece& piece, const Weight* const* ahead, int64_t depth, const float* x,
                        const float* soon, bool fresh, float* y, int64_t stride) {
  constexpr int64_t width = NT * LANES;
  for (int r = 0; r < PANEL; r += HEIGHT)
    block<NT>(piece + r * ROW, ahead + r, depth, x, soon + r * depth * width / (PANELS * PANEL), fresh, y + r * stride,
              stride);
}

using Sums = float[PANELS][PANEL * WIDTH];  // of a tile, each [PANEL, tokens]

// Panels that are multiplied with the same tokens, and those whose turn is next.
struct Strip {
  int count = 0;
  Panel now[PANELS], next[PANELS];

  void add(const Matrix& w, int64_t expert, int64_t panel, int64_t next_expert, int64_t next_panel) {
    now[count] = Panel(w, expert, panel);
    next[count++] = Panel(w, next_expert, next_panel);
  }
};

// y[tile - begin][p] = rows of panel p times the tokens of tiles begin to end, which lie in x. Or straight to `out`, if
// that is given, the panels' rows, stride apart, at tokens.
static void multiply(const Strip& w, const Matrix& of, const Group& g, char* x, int64_t begin, int64_t end, Sums* y,
                     float* out = nullptr, int64_t stride = 0) {
  alignas(64) Piece piece[PANELS];
  for (int64_t t = 0; t < end - begin && !of.cols; ++t) std::fill(y[t][0], y[t][0] + w.count * PANEL * WIDTH, 0.0f);
  for (int64_t first = 0; first < of.cols; first += DEPTH) {
    const int64_t depth = std::min<int64_t>(DEPTH, of.cols - first);
    const Weight* ahead[PANELS][PANEL];
    for (int p = 0; p < w.count; ++p) {
      copy_floats<DEPTH>(w.now[p], first, depth, piece[p]);
      for (int r = 0; r < PANEL; ++r)
        ahead[p][r] = first + DEPTH < of.cols ? w.now[p].at(r, first + DEPTH) : w.next[p].at(r, 0);
    }
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile(g.count, t);
      const bool turn = t + 1 == end;
      const Tile other(g.count, turn ? begin : t + 1);
      const float* soon = other.in(x, of.cols) + (turn ? first + DEPTH : first) * other.width;
      const int64_t vectors = tile.width / LANES;
      const auto times = vectors == 1 ? panel_times<1> : vectors == 2 ? panel_times<2> : panel_times<3>;
      for (int p = 0; p < w.count; ++p) {
        float* sums = out ? out + p * PANEL * stride + tile.slot : y[t - begin][p];
        times(piece[p], ahead[p], depth, tile.in(x, of.cols) + first * tile.width,
              soon + p * depth * tile.width / PANELS, first == 0, sums, out ? stride : tile.width);
      }
    }
  }
}

// 16 rows from one on, LANES columns from c on, of which the rows past `tokens` are zero: x[column * width + row].
static inline void turn(const Rows& rows, int64_t first, int64_t tokens, int64_t c, float* x, int64_t width) {
  alignas(64) float lines[16][LANES];
  for (int64_t t = 0; t < 16; ++t) {
    if (t < tokens) store(lines[t], load(rows.row(first + t) + c));
    else store(lines[t], zero());
  }
  transpose_from(lines[0], LANES, x, width);
}

// Rows as a transposed tile for w; zero where there is no row.
static void gather(const Rows& rows, const Matrix& w, const Group& g, int64_t number, char* out) {
  const Tile tile(g.count, number);
  const int64_t tokens = std::min(g.count - tile.slot, tile.width), whole = rows.cols / LANES * LANES;
  float* x = tile.in(out, w.cols);
  int64_t t = 0;
  for (; t + 16 <= tile.width; t += 16)
    for (int64_t c = 0; c < whole; c += LANES)
      turn(rows, tile.slot + t, tokens - t, c, x + c * tile.width + t, tile.width);
  for (int64_t other = 0; other < tile.width; ++other)  // what is left: columns, and rows where vectors are short
    for (int64_t c = other < t ? whole : 0; c < rows.cols; ++c)
      x[c * tile.width + other] = other < tokens ? to_float(rows.row(tile.slot + other)[c]) : 0.0f;
}

// Features of panels first to last of h, [columns of down, tokens] for each tile.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  constexpr int step = GATED ? PANELS / 2 : PANELS;
  alignas(64) float h[PANEL * WIDTH];
  alignas(64) Sums y[MOST];
  for (int64_t panel = first; panel < last; panel += step) {
    const int64_t stop = std::min(panel + step, last);
    Strip w;
    for (int64_t p = panel; p < stop; ++p) {
      const int64_t following = std::min(p + step, last - 1);
      w.add(a.up, g.expert, p, g.expert, following);
      if (GATED) w.add(a.gate, g.expert, p, g.expert, following);
    }
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t end = std::min<int64_t>(begin + MOST, tiles(g));
      multiply(w, a.up, g, g.x, begin, end, y);
      for (int64_t t = begin; t < end; ++t) {
        const Tile tile(g.count, t);
        float* sums = y[t - begin][0];
        for (int64_t p = panel; p < stop; ++p, sums += (GATED ? 2 : 1) * PANEL * WIDTH) {
          const int64_t rows = std::min<int64_t>(PANEL, a.up.rows - p * PANEL);
          activate_panel(a, g.expert, p, tile.width, sums + PANEL * WIDTH, sums, h);
          if (H_BY_ROWS) store_rows(a, g, tile.slot, p, tile.width, h);
          else std::copy(h, h + rows * tile.width, tile.in(g.h, a.down.cols) + p * PANEL * tile.width);
        }
      }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  alignas(64) Sums y[MOST];
  for (int64_t panel = first; panel < last; panel += PANELS) {
    const int64_t stop = std::min(panel + PANELS, last);
    Strip w;
    for (int64_t p = panel; p < stop; ++p) {
      const bool ends = p + PANELS >= last;
      w.add(a.down, g.expert, p, ends ? g.next_expert : g.expert, ends ? first + p - panel : p + PANELS);
    }
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t end = std::min<int64_t>(begin + MOST, tiles(g));
      multiply(w, a.down, g, g.h, begin, end, y);
      for (int64_t t = begin; t < end; ++t) {
        const Tile tile(g.count, t);
        for (int64_t p = panel; p < stop; ++p)
          accumulate_tile(a, g, tile.slot, p, tile.width, y[t - begin][p - panel], out);
      }
    }
  }
}
}  // namespace gemm
