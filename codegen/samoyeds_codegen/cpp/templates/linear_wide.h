// Many tokens an expert, weights whose columns are contiguous: lanes are outputs, and tokens stay rows.
//
// DEPTH inputs of OUTPUTS outputs are copied to the first cache, as what is multiplied there, and all tokens go over
// them.

namespace wide {

static_assert(OUTPUTS % PANEL == 0);

// Rows are copied, token by token, a few at a time.
static int64_t tiles(const Group& g) { return ceil_div(g.count, TOKENS); }
static int64_t width(const Matrix& w) { return round_up(w.cols, 32); }
static int64_t bytes(int64_t count, const Matrix& w) { return count * width(w) * int64_t(sizeof(Cell)); }

static void gather(const Rows& from, const Matrix& w, const Group& g, int64_t tile, char* out) {
  for (int64_t t = tile * TOKENS; t < std::min<int64_t>((tile + 1) * TOKENS, g.count); ++t) {
    Cell* row = reinterpret_cast<Cell*>(out) + t * width(w);
    const Weight* token = from.row(t);
    for (int64_t i = 0; i < from.cols; ++i) row[i] = cell(token[i]);
    std::fill(row + from.cols, row + width(w), Cell{});
  }
}

static void block(int64_t tokens, const Piece& w, int64_t depth, const Cell* x, int64_t stride, bool fresh,
                  float (*sums)[OUTPUTS]) {
  int64_t t = 0;
  for (; t + TOKENS <= tokens; t += TOKENS) block<TOKENS>(w, depth, x + t * stride, stride, fresh, sums + t);
  for (; t + 3 <= tokens; t += 3) block<3>(w, depth, x + t * stride, stride, fresh, sums + t);
  for (; t < tokens; ++t) block<1>(w, depth, x + t * stride, stride, fresh, sums + t);
}

// Outputs of panels first to last, of all tokens of a group.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  alignas(64) Piece piece;
  alignas(64) float sums[CROWD][OUTPUTS];
  const Cell* x = reinterpret_cast<const Cell*>(g.x);
  const int64_t end = std::min(last * PANEL, a.up.rows);
  for (int64_t output = first * PANEL; output < end; output += OUTPUTS) {
    const int64_t some = std::min<int64_t>(OUTPUTS, end - output);
    const Panel w(a.up, g.expert, output / PANEL);
    for (int64_t k = 0; k < a.up.cols; k += DEPTH) {
      const int64_t depth = std::min<int64_t>(DEPTH, a.up.cols - k);
      fill(w, k, depth, some, piece);
      block(g.count, piece, depth, x + k, width(a.up), k == 0, sums);
    }
    for (int64_t t = 0; t < g.count; ++t) store_outputs(sums[t], some, g.h_rows + t * a.up.rows + output);
  }
}
}  // namespace wide
