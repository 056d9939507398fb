// A matrix of all experts: weights of one output are col_stride apart, outputs are row_stride apart. One of them is 1
// (2 for outputs, where those of gate and up alternate): there is a kernel for either order.
struct Matrix {
  PerExpert<Weight> values;
  PerExpert<Weight> bias;  // null base and table: no bias
  int64_t bias_step;
  int64_t row_stride, col_stride, rows, cols;
  const int64_t* places;  // by columns: input i is where column places[i] is; null: in order

  int64_t panels() const { return ceil_div(rows, PANEL); }
  bool has_bias() const { return bias.base || bias.table; }
};
