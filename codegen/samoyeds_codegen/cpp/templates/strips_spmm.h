// Many tokens an expert: lanes are tokens, and what is kept is multiplied with rows of a transposed tile of them.
//
// A tile is [rows of Cells, NT * LANES tokens], STORED rows for four columns; its sums are [rows, NT * LANES]. What a
// record's part of the tile becomes, EACH rows for four columns, stays in the first cache while strips go over it.

namespace spmm {

constexpr int WIDTH = MOST_NT * LANES;  // tokens of a tile, at most

// Tokens of each tile but the last: as many as there are, in tiles of about the same width.
static int64_t tiles(const Group& g) { return ceil_div(g.count, WIDTH); }
static int64_t whole_width(const Group& g) { return round_up(ceil_div(g.count, tiles(g)), LANES); }
static int64_t tile_width(const Group& g, int64_t tile) {
  return std::min(whole_width(g), round_up(g.count - tile * whole_width(g), LANES));
}
static int64_t bytes(int64_t count, const Matrix& w) {
  return round_up(count, LANES) * w.cols / 4 * STORED * int64_t(sizeof(Cell));
}
static Cell* tile_of(char* base, const Group& g, int64_t tile, int64_t cols) {
  return reinterpret_cast<Cell*>(base) + tile * whole_width(g) * cols / 4 * STORED;
}

// Where in a record's part of the tile the rows begin that meet what is kept, [factors of a row, rows].
template <int NT>
static inline void offsets(const uint32_t* positions, int32_t* at) {
  for (int i = 0; i < FACTORS; ++i)
    for (int l = 0; l < STRIP; ++l) at[i * STRIP + l] = row_of(positions[l], i) * NT * LANES;
}

// Rows first to first + L of a record, PART columns of it, added to where `place` says.
template <int NT, int L>
static inline void rows(const Factor* factors, const int32_t* at, const Cell* x, float* const* place) {
  Vec sum[L][NT];
#pragma GCC unroll 8
  for (int i = 0; i < L; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) sum[i][t] = load(place[i] + t * LANES);
#pragma GCC unroll 16
  for (int j = 0; j < PART * FACTORS / CHUNK; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < L; ++i) {
      const Vec factor = all(factors[j * STRIP + i]);
      const Cell* tokens = x + at[j * STRIP + i];
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) sum[i][t] = times(factor, tokens + t * LANES, sum[i][t]);
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
static void multiply(const Strip* w, const Strip* next, int strips, int64_t cols, const Cell* x, float* out) {
  constexpr int L = NT == 1 ? 8 : NT == 2 ? 4 : 2;
  constexpr int EVERY = PART * FACTORS / CHUNK * STRIP;  // factors of a part
  alignas(64) int32_t at[FACTORS * STRIP];
  alignas(64) Factor space[FACTORS * STRIP];
  alignas(64) Cell room[ROOM * NT * LANES];
  const int64_t chunks = cols / CHUNK;
  std::fill(out, out + strips * PANEL * NT * LANES, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Cell* tokens = met<NT * LANES>(x + chunk * CHUNK / 4 * STORED * NT * LANES, room);
    for (int s = 0; s < strips; ++s) {
      const Factor* factors = factors_of(w[s].values + chunk * RECORD, space);
      offsets<NT>(w[s].positions + chunk * STRIP, at);
      for (int line = 0; line < Strip::LINES; ++line) prefetch(w[s], next[s], chunk, chunks, line);
      for (int part = 0; part < CHUNK / PART; ++part) {
        int target[STRIP] = {};
        float* place[STRIP];
        targets(w[s], (chunk * CHUNK + part * PART) / V, target);
        for (int l = 0; l < STRIP; ++l) place[l] = out + (s * PANEL + target[l]) * NT * LANES;
        for (int l = 0; l < STRIP; l += L)
          rows<NT, L>(factors + part * EVERY + l, at + part * EVERY + l, tokens, place + l);
      }
    }
  }
}

static void multiply(int64_t width, const Strip* w, const Strip* next, int strips, int64_t cols, const Cell* x,
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
static void gather(const Rows& from, const Matrix& w, const Group& g, int64_t tile, char* out) {
  const int64_t width = tile_width(g, tile), first = tile * whole_width(g);
  const int64_t tokens = std::min(width, g.count - first);
  transpose_rows(from, first, tokens, w.cols, width, tile_of(out, g, tile, w.cols));
}

// Features of panels first to last of h, in a tile for `down`.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  constexpr int EACH_PANEL = GATED ? 2 : 1, PANELS = STRIPS / EACH_PANEL;  // strips of a panel; panels at a time
  alignas(64) float y[STRIPS * PANEL * WIDTH];
  std::vector<Strip> w, next;
  for (int64_t panel = first; panel < last; panel += PANELS) {
    const int64_t stop = std::min<int64_t>(panel + PANELS, last);
    w.clear(), next.clear();
    for (int64_t p = panel; p < stop; ++p)
      for (const Matrix* m : {&a.up, &a.gate}) {
        if (!GATED && m == &a.gate) continue;
        w.emplace_back(*m, g.expert, p);
        next.emplace_back(*m, g.expert, std::min(p + stop - panel, a.up.panels() - 1));
      }
    for (int64_t tile = 0; tile < tiles(g); ++tile) {
      const int64_t width = tile_width(g, tile), step = width / 4 * STORED;  // cells of a column
      multiply(width, w.data(), next.data(), int(w.size()), a.up.cols, tile_of(g.x, g, tile, a.up.cols), y);
      Cell* h = tile_of(g.h, g, tile, a.down.cols);
      for (int64_t p = panel; p < stop; ++p) {
        float* sums = y + (p - panel) * EACH_PANEL * PANEL * width;
        activate_panel(a, g.expert, p, width, sums + PANEL * width, sums, sums);
        if (H_BY_ROWS) store_rows(a, g, tile * whole_width(g), p, width, sums);
        else store_cells(sums, width, h + p * PANEL * step);
      }
      const bool ends = !H_BY_ROWS && stop == a.up.panels();
      if (ends) std::fill(h + stop * PANEL * step, h + a.down.cols * step, Cell{});
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  alignas(64) float y[STRIPS * PANEL * WIDTH];
  std::vector<Strip> w, next;
  for (int64_t tile = 0; tile < tiles(g); ++tile) {
    const int64_t width = tile_width(g, tile);
    for (int64_t panel = first; panel < last; panel += STRIPS) {
      const int64_t stop = std::min<int64_t>(panel + STRIPS, last);
      w.clear(), next.clear();
      for (int64_t p = panel; p < stop; ++p) {
        w.emplace_back(a.down, g.expert, p);
        next.emplace_back(a.down, g.expert, std::min(p + stop - panel, last - 1));
      }
      multiply(width, w.data(), next.data(), int(w.size()), a.down.cols, tile_of(g.h, g, tile, a.down.cols), y);
      for (int64_t p = panel; p < stop; ++p)
        accumulate_tile(a, g, tile * whole_width(g), p, width, y + (p - panel) * PANEL * width, out);
    }
  }
}
}  // namespace spmm
