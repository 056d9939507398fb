// The operands that all blocks of experts have, as kernels want them.

struct Operands {
  Tensor x, ids, weights, out;

  Operands(const char* op, const Tensor& rows, const Tensor& expert_ids, const Tensor& expert_weights,
           const std::string& kernel, ScalarType out_dtype)
      : x(rows), ids(expert_ids), weights(expert_weights) {
    const char* dtype = name_of(x.scalar_type());
    if (kernel.compare(0, std::strlen(dtype), dtype) != 0)
      refuse(op, "x is " + std::string(dtype) + "; the kernel is for " + kernel);
    if (x.dim() != 2) refuse(op, "x has rank " + std::to_string(x.dim()) + "; pass [T, H]");
    if (ids.dim() != 2 || ids.size(0) != x.size(0) || !has_sizes(weights, {ids.size(0), ids.size(1)}))
      refuse(op, "expert_ids and expert_weights do not fit x; pass [T, K] both");
    x = x.stride(1) == 1 ? x : in_one_piece(x);
    ids = in_one_piece(ids.scalar_type() == ScalarType::Int ? ids : as(ids, ScalarType::Long));
    weights = in_one_piece(weights.scalar_type() == ScalarType::BFloat16 ? weights : as(weights, ScalarType::Float));
    out = empty(x.size(0), x.size(1), out_dtype == ScalarType::BFloat16 ? out_dtype : ScalarType::Float);
  }

  // All but the matrices.
  template <class Arguments>
  Arguments arguments(int64_t experts, int64_t width, int64_t few) const {
    Arguments a{};
    a.x = x.const_data_ptr(), a.ids = ids.const_data_ptr(), a.weights = weights.const_data_ptr();
    a.out = out.mutable_data_ptr(), a.x_stride = x.stride(0);
    a.tokens = x.size(0), a.top_k = ids.size(1), a.experts = experts, a.hidden = x.size(1);
    a.ids_are_int64 = ids.scalar_type() == ScalarType::Long;
    a.weights_are_bf16 = weights.scalar_type() == ScalarType::BFloat16;
    a.out_is_bf16 = out.scalar_type() == ScalarType::BFloat16;
    a.few = few;
    a.threads = threads_for(a.tokens * a.top_k * a.hidden * width);
    return a;
  }
};

// Where no kernel is loaded Python loads it, or computes the block in another way.
template <class... Args>
static Tensor by_python(const char* op, const Args&... args) {
  StableIValue stack[] = {torch::stable::detail::from(args)...};
  call(op, "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}
