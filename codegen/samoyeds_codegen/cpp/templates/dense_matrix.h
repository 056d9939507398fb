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
