// A packed matrix of all experts in canonical storage. `first` is the output row to begin with, `cols` is padded to V.
struct Matrix {
  PerExpert<Weight> values;
  PerExpert<uint16_t> metadata;
  PerExpert<uint8_t> selection;
  PerExpert<Weight> bias;  // null base and table: no bias
  int64_t bias_step;
  int64_t first, rows, cols;

  int64_t panels() const { return ceil_div(rows, PANEL); }
  bool has_bias() const { return bias.base || bias.table; }
};
