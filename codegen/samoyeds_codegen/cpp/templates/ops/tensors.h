// What all ops share: tensors as kernels want them, and how many threads a call gets.

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Bias = std::optional<Tensor>;

[[noreturn]] static void refuse(const char* op, const std::string& problem) {
  throw std::invalid_argument("samoyeds::" + std::string(op) + ": " + problem);
}

static const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "another dtype";
  }
}

static Tensor in_one_piece(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
static Tensor as(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
static bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  const auto found = t.sizes();
  return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
}

// A new contiguous matrix, without a way through the dispatcher.
static Tensor empty(int64_t rows, int64_t cols, ScalarType dtype) {
  const int64_t sizes[] = {rows, cols}, strides[] = {std::max<int64_t>(cols, 1), 1};
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// An op of ATen, on arguments as the dispatcher takes them; `stack` holds its results afterwards.
static void call(const char* op, const char* overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
}

// Threads for `work` multiplications or so: torch's number, but one if waking the others takes longer than that, and one
// inside a parallel region, whose threads have the cores already.
static int64_t threads_for(int64_t work) {
  constexpr int64_t worth_waking = 1 << 19;
  return work < worth_waking || omp_in_parallel() ? 1 : int64_t(torch::stable::get_num_threads());
}
