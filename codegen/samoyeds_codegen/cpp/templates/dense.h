// Dense weights, used where they lie.

// A matrix of all experts whose rows are contiguous, row_stride apart: every row, or every other one where gate and up
// rows alternate.
struct Matrix {
  PerExpert<Weight> values;
  PerExpert<Weight> bias;  // null base and table: no bias
  int64_t bias_step;
  int64_t row_stride, rows, cols;

  int64_t panels() const { return ceil_div(rows, PANEL); }
  bool has_bias() const { return bias.base || bias.table; }
};

// PANEL output rows of one expert. Past the last one they repeat it, and nobody reads that.
struct Panel {
  const Weight* rows[PANEL];

  Panel() = default;
  Panel(const Matrix& w, int64_t expert, int64_t panel) {
    const Weight* first = w.values[expert];
    for (int r = 0; r < PANEL; ++r) rows[r] = first + std::min(panel * PANEL + r, w.rows - 1) * w.row_stride;
  }

  // Whether all rows are there, evenly apart.
  bool whole() const { return rows[PANEL - 1] - rows[0] == (PANEL - 1) * (rows[1] - rows[0]) && rows[1] != rows[0]; }
};

// The first `count` of LANES weights, the others zero, without reading past the last one.
static inline Vec load_some(const Weight* p, int64_t count) {
  Weight some[LANES] = {};
  std::memcpy(some, p, size_t(count) * sizeof(Weight));
  return load(some);
}
