// samoyeds::choose_experts: logits to routing weights and expert ids, for inference.
//
// ATen makes the scores and picks the best: a softmax that rounds in another way makes or breaks ties, and which of two
// equal scores is taken is ATen's own secret, so calling it is what keeps ids exact. Everything else is done here, in
// float, rounded after each step to the dtype in which torch would have computed it.

namespace choose_experts {

constexpr const char* OP = "choose_experts";
constexpr int LANES = 8;    // floats in a vector of ATen's sum, whatever the machine has
constexpr int STRIPES = 4;  // sums that it keeps side by side

static float rounded(float x, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return float(torch::headeronly::BFloat16(x));
    case ScalarType::Half: return float(torch::headeronly::Half(x));
    default: return x;
  }
}

static std::vector<float> floats(int64_t count, float x = 0) { return std::vector<float>(size_t(count), x); }

// A contiguous matrix, row by row as floats.
class Rows {
 public:
  explicit Rows(const Tensor& t) : data_(t.mutable_data_ptr()), dtype_(t.scalar_type()), cols_(t.size(1)) {}
  int64_t cols() const { return cols_; }
  ScalarType dtype() const { return dtype_; }

  void read(int64_t row, float* out) const {
    with_elements(row, [&](auto* from) { std::copy(from, from + cols_, out); });
  }
  void write(int64_t row, const float* in) const {
    with_elements(row, [&](auto* to) { std::copy(in, in + cols_, to); });
  }
  float at(int64_t row, int64_t column) const {
    float x = 0;
    with_elements(row, [&](auto* from) { x = float(from[column]); });
    return x;
  }

 private:
  template <class F>
  void with_elements(int64_t row, F f) const {
    switch (dtype_) {
      case ScalarType::Float: return f(static_cast<float*>(data_) + row * cols_);
      case ScalarType::BFloat16: return f(static_cast<torch::headeronly::BFloat16*>(data_) + row * cols_);
      case ScalarType::Half: return f(static_cast<torch::headeronly::Half*>(data_) + row * cols_);
      default: refuse(OP, "numbers are not float32, bfloat16 or float16");
    }
  }

  void* data_;
  ScalarType dtype_;
  int64_t cols_;
};

// f(row), for all rows, by several threads if there are many.
template <class F>
static void each_row(int64_t rows, int64_t cols, F f) {
  const int64_t threads = threads_for(rows * cols);
  if (threads == 1) {
    for (int64_t row = 0; row < rows; ++row) f(row);
    return;
  }
#pragma omp parallel for num_threads(int(threads))
  for (int64_t row = 0; row < rows; ++row) f(row);
}

static Tensor converted(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  const Tensor out = empty(t.size(0), t.size(1), dtype);
  const Rows from(t), to(out);
  each_row(t.size(0), t.size(1), [&](int64_t row) {
    auto x = floats(from.cols());
    from.read(row, x.data());
    to.write(row, x.data());
  });
  return out;
}

static Tensor score(const Tensor& t, bool softmax, std::optional<ScalarType> dtype) {
  using torch::stable::detail::from;
  if (softmax) {
    StableIValue stack[] = {from(converted(t, dtype.value_or(t.scalar_type()))), from(int64_t(-1)), from(false)};
    call("aten::_softmax", "", stack);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  StableIValue stack[] = {from(t)};
  call("aten::sigmoid", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// [T, k], int64.
static Tensor best(const Tensor& t, int64_t k, bool sorted) {
  AtenTensorHandle values, indices;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_topk(t.get(), k, -1, 1, sorted, &values, &indices));
  const Tensor dropped(values);
  return Tensor(indices);
}

static ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// The attributes of samoyeds::router; Python writes them as words, in this order.
struct How {
  std::string scoring, order, weights_from, renormalise, group_score;
  int64_t top_k, n_group, topk_group;
  bool sorted, group_sorted;
  double epsilon, masked_score;
  std::optional<double> scale;
  std::optional<ScalarType> score_dtype, out_dtype;

  explicit How(const std::string& words) : words_(words) {
    scoring = word(), order = word(), top_k = whole(), sorted = word() == "True", weights_from = word();
    renormalise = word(), epsilon = *number(), scale = number(), n_group = whole(), topk_group = whole();
    group_score = word(), group_sorted = word() == "True", masked_score = *number(), score_dtype = dtype();
    out_dtype = dtype();
  }

 private:
  std::string word() {
    const size_t begin = at_, end = std::min(words_.find(' ', begin), words_.size());
    at_ = end + 1;
    return begin < end ? words_.substr(begin, end - begin) : "";
  }
  int64_t whole() { return int64_t(*number()); }
  std::optional<double> number() {
    const std::string w = word();
    if (w == "None") return std::nullopt;
    if (w == "inf" || w == "-inf") return w == "inf" ? INFINITY : -INFINITY;
    std::istringstream in(w);
    in.imbue(std::locale::classic());  // a comma is no point, whatever language the program speaks
    double x = NAN;
    in >> x;
    return x;
  }
  std::optional<ScalarType> dtype() {
    const std::string w = word();
    for (ScalarType known : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half})
      if (w == name_of(known)) return known;
    return std::nullopt;
  }

  std::string words_;
  size_t at_ = 0;
};

// Each text is read once.
static const How& how(const std::string& words) {
  static std::mutex mutex;
  static std::unordered_map<std::string, How> read;  // references stay valid
  const std::lock_guard<std::mutex> guard(mutex);
  return read.try_emplace(words, words).first->second;
}

// As torch orders numbers: NaN is the greatest.
static bool greater(float a, float b) { return (a != a && b == b) || a > b; }

static float group_score(const float* x, int64_t count, bool top2, ScalarType dtype) {
  float first = x[0], second = -INFINITY;
  for (int64_t i = 1; i < count; ++i) {
    if (greater(x[i], first)) second = std::exchange(first, x[i]);
    else if (i == 1 || greater(x[i], second)) second = x[i];
  }
  return top2 ? rounded(first + second, dtype) : first;
}

// `choice` with the experts outside each token's best groups set to the masked score.
static void limit_groups(const Tensor& choice, const How& h) {
  const int64_t tokens = choice.size(0), experts = choice.size(1), each = experts / h.n_group;
  const ScalarType dtype = choice.scalar_type();
  const float masked = rounded(float(h.masked_score), dtype);
  const bool top2 = h.group_score == "top2_sum";
  const Tensor group_scores = empty(tokens, h.n_group, dtype);
  const Rows rows(choice), by_group(group_scores);
  each_row(tokens, experts, [&](int64_t row) {
    auto x = floats(experts), s = floats(h.n_group);
    rows.read(row, x.data());
    for (int64_t i = 0; i < h.n_group; ++i) s[size_t(i)] = group_score(x.data() + i * each, each, top2, dtype);
    by_group.write(row, s.data());
  });
  const Tensor open = best(group_scores, h.topk_group, h.group_sorted);
  const auto* ids = static_cast<const int64_t*>(open.const_data_ptr());
  each_row(tokens, experts, [&](int64_t row) {
    auto x = floats(experts), y = floats(experts, masked);
    rows.read(row, x.data());
    for (int64_t i = 0; i < h.topk_group; ++i) {
      const int64_t begin = ids[row * h.topk_group + i] * each;
      std::copy_n(x.data() + begin, each, y.data() + begin);
    }
    rows.write(row, y.data());
  });
}

// In the order in which ATen adds a short row, so that weights are torch's bit for bit: STRIPES sums side by side, of
// vectors if there are that many numbers, of numbers if not.
static float sum(const float* x, int64_t count) {
  const int64_t width = count < LANES ? 1 : LANES, vectors = count / width, striped = vectors / STRIPES * STRIPES;
  float part[STRIPES][LANES] = {};
  for (int64_t v = 0; v < striped; ++v)
    for (int64_t i = 0; i < width; ++i) part[v % STRIPES][i] += x[v * width + i];
  for (int64_t v = striped; v < vectors; ++v)
    for (int64_t i = 0; i < width; ++i) part[0][i] += x[v * width + i];
  for (int s = 1; s < STRIPES; ++s)
    for (int64_t i = 0; i < width; ++i) part[0][i] += part[s][i];
  if (width == 1) return part[0][0];
  float total = 0;
  for (int64_t i = vectors * width; i < count; ++i) total += x[i];
  for (float lane : part[0]) total += lane;
  return total;
}

// [T, k]: each token's numbers at its ids.
static Tensor gathered(const Tensor& t, const Tensor& ids) {
  const int64_t top_k = ids.size(1);
  const Tensor out = empty(t.size(0), top_k, t.scalar_type());
  const Rows from(t), to(out);
  const auto* at = static_cast<const int64_t*>(ids.const_data_ptr());
  each_row(t.size(0), top_k, [&](int64_t row) {
    auto x = floats(top_k);
    for (int64_t k = 0; k < top_k; ++k) x[size_t(k)] = from.at(row, at[row * top_k + k]);
    to.write(row, x.data());
  });
  return out;
}

// Renormalise and scale a token's weights.
static void finish(float* x, const How& h, ScalarType dtype) {
  const int64_t count = h.top_k;
  if (h.renormalise != "none") {
    float total = rounded(sum(x, count), dtype);
    const float epsilon = rounded(float(h.epsilon), dtype);  // as ATen does, though not for a factor
    if (h.renormalise == "clamped_sum") total = total < epsilon ? epsilon : total;
    else if (h.epsilon != 0) total = rounded(total + epsilon, dtype);
    for (int64_t i = 0; i < count; ++i) x[i] = rounded(x[i] / total, dtype);
  }
  if (h.scale)
    for (int64_t i = 0; i < count; ++i) x[i] = rounded(x[i] * float(*h.scale), dtype);
}

// What to choose from: a tensor of its own if it differs from the scores.
static Tensor choice_of(const Tensor& scores, const Bias& bias, const How& h) {
  if (!bias && h.n_group == 1) return scores;
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  const ScalarType dtype = bias ? promoted(scores.scalar_type(), bias->scalar_type()) : scores.scalar_type();
  const Tensor choice = empty(tokens, experts, dtype);
  auto b = floats(experts, -0.0f);
  if (bias) Rows(torch::stable::view(in_one_piece(*bias), {1, experts})).read(0, b.data());
  const Rows from(scores), to(choice);
  each_row(tokens, experts, [&](int64_t row) {
    auto x = floats(experts);
    from.read(row, x.data());
    for (int64_t e = 0; e < experts; ++e) x[size_t(e)] += b[size_t(e)];
    to.write(row, x.data());
  });
  if (h.n_group > 1) limit_groups(choice, h);
  return choice;
}

static std::tuple<Tensor, Tensor> run(Tensor logits, Bias bias, std::string words) {
  const How& h = how(words);
  if (logits.dim() != 2 || logits.size(1) < h.top_k || h.top_k < 1) refuse(OP, "logits do not fit; pass [T, E]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  if (bias && bias->numel() != experts) refuse(OP, "correction_bias does not fit; pass a number an expert");
  if (h.n_group < 1 || experts % h.n_group) refuse(OP, "experts do not make n_group groups");
  const bool softmax = h.scoring == "softmax", score_first = h.order == "score_then_topk";
  logits = in_one_piece(logits);
  const Tensor scores = score_first ? score(logits, softmax, h.score_dtype) : logits;
  const Tensor choice = choice_of(scores, bias, h), ids = best(choice, h.top_k, h.sorted);
  Tensor weights = gathered(h.weights_from == "scores" ? scores : choice, ids);
  if (!score_first) weights = score(weights, softmax, h.score_dtype);
  const ScalarType dtype = weights.scalar_type();
  const Tensor out = dtype == h.out_dtype.value_or(dtype) ? weights : empty(tokens, h.top_k, *h.out_dtype);
  const Rows from(weights), to(out);
  each_row(tokens, h.top_k, [&](int64_t row) {
    auto x = floats(h.top_k);
    from.read(row, x.data());
    finish(x.data(), h, dtype);
    to.write(row, x.data());
  });
  return {out, ids};
}

}  // namespace choose_experts
