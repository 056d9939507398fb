// Rows of a transposed tile that are columns, as floats: each kept value meets one of them.

namespace spmm {

using Cell = float;
using Factor = float;
constexpr int MOST_NT = LANES == 16 ? 6 : 4;
constexpr int STRIPS = 2;           // at a time
constexpr int STORED = 4, EACH = 4;  // rows for four columns
constexpr int FACTORS = CHUNK / 2;  // of a row of a record
constexpr int ROOM = 1;             // rows that are made for a record: none

template <int WIDTH>
static inline const Cell* met(const Cell* tile, Cell*) {
  return tile;
}

// Which of a record's rows meets factor i, by the positions of a row of weights.
static inline int32_t row_of(uint32_t positions, int i) { return i / 2 * EACH + int32_t(positions >> 2 * i & 3); }

// The values of a record [factors of a row, rows]: where they lie, or converted.
static inline const float* factors_of(const float* values, float*) { return values; }
static inline const float* factors_of(const bf16* values, float* space) {
  for (int g = 0; g < 8; ++g)
    for (int l = 0; l < STRIP; ++l) {
      space[(2 * g) * STRIP + l] = to_float(values[g * FOUR + 2 * l]);
      space[(2 * g + 1) * STRIP + l] = to_float(values[g * FOUR + 2 * l + 1]);
    }
  return space;
}

static inline Vec all(Factor x) { return broadcast(x); }
static inline Vec times(Vec factor, const Cell* tokens, Vec sum) { return fma(factor, load(tokens), sum); }

// Tokens of some rows, from one on, as [cols, width].
static void transpose_rows(const Rows& rows, int64_t first, int64_t tokens, int64_t cols, int64_t width, Cell* x) {
  std::fill(x, x + cols * width, 0.0f);
  for (int64_t block = 0; block < rows.cols; block += 16)  // sixteen floats are a cache line
    for (int64_t t = 0; t < tokens; ++t) {
      const Weight* row = rows.row(first + t);
      for (int64_t c = block; c < std::min<int64_t>(block + 16, rows.cols); ++c) x[c * width + t] = to_float(row[c]);
    }
}

// A panel's activations, [PANEL, width].
static inline void store_cells(const float* h, int64_t width, Cell* out) { std::copy(h, h + PANEL * width, out); }
}  // namespace spmm
