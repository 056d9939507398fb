// samoyeds::sparse_experts: checks its operands, writes down where they are, and calls the kernel.

namespace sparse_experts {

constexpr const char* OP = "sparse_experts";

// A projection of all experts in canonical storage: values, metadata and, if n < m, selection, each as one stack or as a
// tensor for each expert. Refuses what a kernel would read beyond.
class Packed {
 public:
  Packed(const char* name, Tensors tensors, const Kernel& p, int64_t rows, int64_t cols, ScalarType dtype, Bias bias)
      : tensors_(std::move(tensors)), cols_(round_up(cols, p.vector)) {
    require(!tensors_.empty() && tensors_.size() % size_t(p.parts()) == 0, name);
    stacked_ = tensors_[0].dim() == 3;
    experts_ = stacked_ ? tensors_[0].size(0) : int64_t(tensors_.size()) / p.parts();
    require(!stacked_ || int64_t(tensors_.size()) == p.parts(), name);
    const int64_t condensed = round_up(rows, p.m * p.group) * p.n / p.m;
    const ScalarType dtypes[] = {dtype, ScalarType::Short, ScalarType::Byte};
    const int64_t sizes[][2] = {
        {condensed, cols_ / 2}, {condensed, cols_ / 16}, {condensed / p.group, cols_ / p.vector}};
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const size_t part = stacked_ ? i : i / size_t(experts_);
      const auto [height, width] = sizes[part];
      const bool fits = stacked_ ? has_sizes(tensors_[i], {experts_, height, width})
                                 : has_sizes(tensors_[i], {height, width});
      require(fits && tensors_[i].scalar_type() == dtypes[part], name);
      tensors_[i] = in_one_piece(tensors_[i]);
      addresses_.push_back(tensors_[i].const_data_ptr());
    }
    if (!bias) return;
    if (!has_sizes(*bias, {experts_, rows}) || bias->scalar_type() != dtype)
      refuse(OP, std::string(name) + "_bias does not fit; pass a row of " + std::to_string(rows) + " an expert");
    bias_ = in_one_piece(*bias);
  }

  int64_t experts() const { return experts_; }

  // Rows from `first` on; columns bias_first, bias_first + bias_step, ... of the bias belong to them.
  packed::Matrix matrix(int64_t first, int64_t rows, int64_t bias_first = 0, int64_t bias_step = 1) const {
    packed::Matrix m{part<Weight>(0), part<uint16_t>(1), part<uint8_t>(2), {}, bias_step, first, rows, cols_};
    if (bias_) {
      const auto* base = static_cast<const char*>(bias_->const_data_ptr());
      m.bias = {base + bias_first * int64_t(bias_->element_size()), bias_->size(1), nullptr};
    }
    return m;
  }

 private:
  static void require(bool holds, const char* name) {
    if (!holds) refuse(OP, std::string(name) + " does not fit; pass canonical storage in the dtype of x");
  }

  template <class T>
  PerExpert<T> part(size_t index) const {
    const size_t first = stacked_ ? index : index * size_t(experts_);
    if (first >= tensors_.size()) return {};
    const void* const* table = addresses_.data() + first;
    if (!stacked_) return {nullptr, 0, reinterpret_cast<const T* const*>(table)};
    return {static_cast<const T*>(*table), tensors_[first].size(1) * tensors_[first].size(2), nullptr};
  }

  Tensors tensors_;
  std::vector<const void*> addresses_;
  Bias bias_;
  bool stacked_ = false;
  int64_t experts_ = 0, cols_;
};

// Whether matrices of these sizes, or halves of one, are whole strips: 16 condensed rows, 32 columns.
static bool in_strips(const Kernel& p, int64_t width, int64_t hidden) {
  const int64_t rows = 16 * p.m / p.n, columns = 32;
  return width % rows == 0 && hidden % rows == 0 && round_up(width, p.vector) % columns == 0 &&
         round_up(hidden, p.vector) % columns == 0 && (p.group == 1 || p.group * p.n % 16 == 0);
}

static Tensor run(Tensor x, Tensor ids, Tensor weights, Tensors gate, Tensors up, Tensors down, Bias gate_bias,
                  Bias up_bias, Bias down_bias, std::string name, int64_t width, std::string layout,
                  ScalarType out_dtype) {
  const Kernel kernel = kernels().find(name);
  if (!kernel.run)
    return by_python("samoyeds::sparse_experts_loading", x, ids, weights, gate, up, down, gate_bias, up_bias, down_bias,
                     name, width, layout, out_dtype);
  if (!kernel.m) refuse(OP, name + " is no kernel for packed weights");
  const Operands operands(OP, x, ids, weights, name, out_dtype);
  const int64_t hidden = x.size(1);
  const ScalarType dtype = x.scalar_type();
  if (kernel.order && !in_strips(kernel, width, hidden))
    refuse(OP, "matrices are no whole strips; pass canonical storage and its kernel");
  const bool separate = layout == "separate", halves = layout == "concatenated", turns = layout == "interleaved";
  const Packed up_all("up", std::move(up), kernel, halves || turns ? 2 * width : width, hidden, dtype, up_bias);
  const Packed down_all("down", std::move(down), kernel, hidden, width, dtype, down_bias);
  std::optional<Packed> gate_all;
  if (separate) gate_all.emplace("gate", std::move(gate), kernel, width, hidden, dtype, gate_bias);
  if (down_all.experts() != up_all.experts() || (separate && gate_all->experts() != up_all.experts()))
    refuse(OP, "up, down and gate have different numbers of experts");

  auto a = operands.arguments<packed::Arguments>(up_all.experts(), width, kernel.few);
  a.down = down_all.matrix(0, hidden);
  // Storage has all gate rows before all up rows; the bias of interleaved ones alternates.
  a.gate = separate ? gate_all->matrix(0, width) : up_all.matrix(0, width, 0, turns ? 2 : 1);
  a.up = turns ? up_all.matrix(width, width, 1, 2) : halves ? up_all.matrix(width, width, width)
                                                            : up_all.matrix(0, width);
  if (kernel.run(&a)) throw std::bad_alloc();
  return as(operands.out, out_dtype);
}

}  // namespace sparse_experts
