// What one call of a kernel is given. Ops include this too, with a Weight of their own that they never look into.

constexpr int PANEL = 16;  // output rows that are computed together

// One tensor of all experts: where expert e's part begins, as a stack or as tensors of their own.
template <class T>
struct PerExpert {
  const T* base;
  int64_t stride;
  const T* const* table;

  const T* operator[](int64_t e) const { return table ? table[e] : base + e * stride; }
};

// A packed matrix of all experts in canonical storage. `first` is the output row to begin with, `cols` is padded to V.
struct Matrix {
  PerExpert<Weight> values;
  PerExpert<uint16_t> metadata;
  PerExpert<uint8_t> selection;
  PerExpert<Weight> bias;  // null base and table: no bias
  int64_t bias_step;
  int64_t first, rows, cols;

  int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
  bool has_bias() const { return bias.base || bias.table; }
};

struct Arguments {
  const Weight* x;  // [T, H], rows x_stride apart
  const void* ids;  // [T, K], int64 or int32
  const void* weights;  // [T, K], float or bf16
  void* out;  // [T, H], float or bf16
  int64_t x_stride, tokens, top_k, experts, hidden;
  int64_t ids_are_int64, weights_are_bf16, out_is_bf16, threads;
  Matrix gate, up, down;

  int64_t id(int64_t slot) const {
    return ids_are_int64 ? static_cast<const int64_t*>(ids)[slot] : static_cast<const int32_t*>(ids)[slot];
  }
  float weight(int64_t slot) const {
    return weights_are_bf16 ? to_float(static_cast<const bf16*>(weights)[slot])
                            : static_cast<const float*>(weights)[slot];
  }
};
