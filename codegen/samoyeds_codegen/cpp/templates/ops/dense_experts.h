// samoyeds::dense_experts: the same for dense weights.

namespace dense_experts {

constexpr const char* OP = "dense_experts";

// A projection of all experts, one stack or a matrix for each: [out, in], or [in, out] if `in_out`.
class Dense {
 public:
  Dense(const char* name, Tensors tensors, int64_t out, int64_t in, bool in_out, ScalarType dtype, const Bias& bias)
      : tensors_(std::move(tensors)), in_(in) {
    require(!tensors_.empty(), name);
    stacked_ = tensors_.size() == 1 && tensors_[0].dim() == 3;
    experts_ = stacked_ ? tensors_[0].size(0) : int64_t(tensors_.size());
    const int64_t rows = in_out ? in : out, cols = in_out ? out : in;
    for (const Tensor& t : tensors_)
      require(t.scalar_type() == dtype && (stacked_ ? has_sizes(t, {experts_, rows, cols}) : has_sizes(t, {rows, cols})),
              name);
    row_stride_ = stride(tensors_[0], in_out ? 1 : 0), col_stride_ = stride(tensors_[0], in_out ? 0 : 1), out_ = out;
    for (const Tensor& t : tensors_)
      alike_ = alike_ && stride(t, 0) == stride(tensors_[0], 0) && stride(t, 1) == stride(tensors_[0], 1);
    if (!bias) return;
    if (!has_sizes(*bias, {experts_, out}) && !has_sizes(*bias, {experts_, 1}))
      refuse(OP, std::string(name) + "_bias does not fit; pass a row of " + std::to_string(out) + " an expert");
    if (bias->scalar_type() != dtype) refuse(OP, std::string(name) + "_bias is not " + name_of(dtype));
    bias_ = in_one_piece(*bias);
  }

  int64_t experts() const { return experts_; }
  // Whether weights of one output, or of one input, are contiguous, in all matrices alike: what kernels read.
  bool lies(bool by_columns) const {
    return alike_ && (by_columns ? row_stride_ == 1 && col_stride_ >= out_ : col_stride_ == 1 && row_stride_ >= in_);
  }

  // Outputs first, first + step, ...; addresses go to `table`, which must live as long as the matrix.
  dense::Matrix matrix(int64_t first, int64_t step, int64_t rows, std::vector<const void*>& table) const {
    const int64_t size = int64_t(tensors_[0].element_size()), skipped = first * row_stride_ * size;
    for (const Tensor& t : tensors_) table.push_back(static_cast<const char*>(t.const_data_ptr()) + skipped);
    dense::Matrix m{};
    if (stacked_) m.values = {table[0], tensors_[0].stride(0), nullptr};
    else m.values = {nullptr, 0, table.data()};
    m.bias_step = step, m.row_stride = step * row_stride_, m.col_stride = col_stride_, m.rows = rows, m.cols = in_;
    if (bias_) {
      const bool one = bias_->size(1) == 1;  // for all outputs of an expert
      const auto* base = static_cast<const char*>(bias_->const_data_ptr());
      m.bias = {base + (one ? 0 : first * size), bias_->size(1), nullptr};
      if (one) m.bias_step = 0;
    }
    return m;
  }

 private:
  static void require(bool holds, const char* name) {
    if (!holds) refuse(OP, std::string(name) + " does not fit; pass a stack, or a matrix an expert, in the dtype of x");
  }
  // Of dimension 0 or 1 of a matrix.
  int64_t stride(const Tensor& t, int64_t dim) const { return t.stride(stacked_ ? dim + 1 : dim); }

  Tensors tensors_;
  Bias bias_;
  bool stacked_ = false, alike_ = true;
  int64_t in_, out_ = 0, experts_ = 0, row_stride_ = 0, col_stride_ = 0;
};

static Tensor run(Tensor x, Tensor ids, Tensor weights, Tensors gate, Tensors up, Tensors down, Bias gate_bias,
                  Bias up_bias, Bias down_bias, std::string name, std::string layout, std::string weight_layout,
                  ScalarType out_dtype) {
  const auto otherwise = [&] {
    return by_python("samoyeds::dense_experts_loading", x, ids, weights, gate, up, down, gate_bias, up_bias, down_bias,
                     name, layout, weight_layout, out_dtype);
  };
  const Kernel kernel = kernels().find(name);
  if (!kernel.run) return otherwise();
  if (kernel.m) refuse(OP, name + " is no kernel for dense weights");
  const Operands operands(OP, x, ids, weights, name, out_dtype);
  const int64_t hidden = x.size(1);
  const ScalarType dtype = x.scalar_type();

  const bool in_out = weight_layout == "in_out";
  if (down.empty() || down[0].dim() < 2) refuse(OP, "down does not fit; pass a stack, or a matrix an expert");
  const int64_t width = down[0].size(down[0].dim() - (in_out ? 2 : 1));
  const bool separate = layout == "separate", halves = layout == "concatenated", turns = layout == "interleaved";
  const Dense up_all("up", up, halves || turns ? 2 * width : width, hidden, in_out, dtype, up_bias);
  const Dense down_all("down", down, hidden, width, in_out, dtype, down_bias);
  std::optional<Dense> gate_all;
  if (separate) gate_all.emplace("gate", gate, width, hidden, in_out, dtype, gate_bias);
  if (down_all.experts() != up_all.experts() || (separate && gate_all->experts() != up_all.experts()))
    refuse(OP, "up, down and gate have different numbers of experts");
  const bool by_columns = kernel.order;
  if (!up_all.lies(by_columns) || !down_all.lies(by_columns) || (separate && !gate_all->lies(by_columns)))
    return otherwise();
  if (kernel.most >= 0 && ids.size(0) * ids.size(1) > kernel.most * up_all.experts()) return otherwise();

  std::vector<const void*> tables[3];
  auto a = operands.arguments<dense::Arguments>(up_all.experts(), width, kernel.few);
  a.down = down_all.matrix(0, 1, hidden, tables[0]);
  a.gate = separate ? gate_all->matrix(0, 1, width, tables[1]) : up_all.matrix(0, turns ? 2 : 1, width, tables[1]);
  a.up = up_all.matrix(turns ? 1 : halves ? width : 0, turns ? 2 : 1, width, tables[2]);
  if (kernel.run(&a)) throw std::bad_alloc();
  return as(operands.out, out_dtype);
}

}  // namespace dense_experts
