// Few tokens an expert, dense weights whose columns are contiguous: lanes are outputs.
//
// A strip of outputs goes through the inputs, some at a time, whose weights are in registers for all tokens. Memory is
// read in pieces as long as a strip is wide, so strips are as wide as their sums fit into the first cache. Each BLOCK
// of inputs is summed on its own, which keeps errors small.

namespace dot {

constexpr int TOKENS = 16;
constexpr int SPACE = 8192;  // sums of a strip, of all tokens
constexpr int DEPTH = 8;     // inputs at a time
constexpr int BLOCK = 128;
static_assert(BLOCK % DEPTH == 0);

// Sums of the outputs of a strip, of one token after the other.
struct Sums {
  alignas(64) float space[SPACE];
  int64_t wide = 0;  // outputs between two tokens

  float* of(int64_t token) { return space + token * wide; }
  void clear(int64_t tokens, int64_t width) {
    for (int64_t t = 0; t < tokens; ++t) std::fill(of(t), of(t) + width, 0.0f);
  }
};

// Outputs of a strip for so many tokens, whole panels.
static int64_t most_outputs(int tokens) { return SPACE / tokens / PANEL * PANEL; }

// Adds DEPTH inputs from k on to the sums of LANES outputs from o on. Loads `some` outputs, or all lanes if that is 0.
template <int D>
static inline void step(const Weight* w, int64_t col_stride, int64_t some, int tokens, const float* const* x,
                        int64_t k, int64_t o, Sums& part) {
  Vec values[D];
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) {
    const Weight* p = w + (k + d) * col_stride + o;
    values[d] = some ? load_some(p, some) : load(p);
    if (o * sizeof(Weight) % 64 == 0) __builtin_prefetch(p + DEPTH * col_stride);
  }
  for (int t = 0; t < tokens; ++t) {
    Vec sum = load(part.of(t) + o);
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) sum = fma(values[d], broadcast(x[t][k + d]), sum);
    store(part.of(t) + o, sum);
  }
}

// The same for all outputs of a strip.
template <int D>
static inline void row(const Weight* w, int64_t col_stride, int64_t outputs, int tokens, const float* const* x,
                       int64_t k, Sums& part) {
  int64_t o = 0;
  for (; o + LANES <= outputs; o += LANES) step<D>(w, col_stride, 0, tokens, x, k, o, part);
  if (o < outputs) step<D>(w, col_stride, outputs - o, tokens, x, k, o, part);
}

// sums.of(t)[o] = x[t] times the weights [inputs, outputs] from w on.
static void multiply(const Weight* w, int64_t col_stride, int64_t outputs, int64_t inputs, int tokens,
                     const float* const* x, Sums& sums) {
  Sums part;
  const int64_t width = round_up(outputs, PANEL);
  part.wide = sums.wide = width;
  sums.clear(tokens, width);
  for (int64_t first = 0; first < inputs; first += BLOCK) {
    const int64_t end = std::min<int64_t>(first + BLOCK, inputs);
    part.clear(tokens, width);
    int64_t k = first;
    for (; k + DEPTH <= end; k += DEPTH) row<DEPTH>(w, col_stride, outputs, tokens, x, k, part);
    for (; k < end; ++k) row<1>(w, col_stride, outputs, tokens, x, k, part);
    for (int64_t o = 0; o < tokens * width; o += LANES)
      store(sums.space + o, add(load(sums.space + o), load(part.space + o)));
  }
}

// The sums of gate and up, feature by feature: of two strips, or of one in which they alternate.
class Features {
 public:
  Features(const Arguments& a, const Group& g) : a_(a), g_(g) {}

  // Most panels of features at a time.
  int64_t panels(int tokens) const { return most_outputs(tokens) / PANEL / (alternate() ? 2 : 1); }

  void multiply(int64_t panel, int64_t count, int tokens, const float* const* x) {
    const int64_t features = std::min(count * PANEL, a_.up.rows - panel * PANEL);
    if (alternate()) return of(a_.gate, panel, 2 * features, tokens, x, first_);
    if (GATED) of(a_.gate, panel, features, tokens, x, first_);
    of(a_.up, panel, features, tokens, x, second_);
  }

  // Those of a panel, zero past the last feature.
  void take(int token, int64_t panel, int64_t features, float* gate, float* up) {
    const bool both = alternate();
    const float *first = GATED ? first_.of(token) : nullptr, *second = both ? nullptr : second_.of(token);
    for (int64_t i = 0, at = panel * PANEL; i < PANEL; ++i, ++at) {
      const bool exists = at < features;
      gate[i] = !GATED || !exists ? 0.0f : first[both ? 2 * at : at];
      up[i] = !exists ? 0.0f : both ? first[2 * at + 1] : second[at];
    }
  }

 private:
  bool alternate() const { return GATED && a_.up.row_stride == 2; }

  void of(const Matrix& w, int64_t panel, int64_t outputs, int tokens, const float* const* x, Sums& sums) const {
    const Weight* first = w.values[g_.expert] + panel * PANEL * w.row_stride;
    dot::multiply(first, w.col_stride, outputs, w.cols, tokens, x, sums);
  }

  const Arguments& a_;
  const Group& g_;
  Sums first_, second_;
};

// Features of panels first to last of h = activation(gate, up), [slots, width(down)].
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  Features features(a, g);
  for (int64_t s = 0; s < g.count; s += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
    const float* x[TOKENS];
    for (int t = 0; t < tokens; ++t) x[t] = reinterpret_cast<float*>(g.x) + g.row(s + t) * width(a.up);
    for (int64_t panel = first, count; panel < last; panel += count) {
      count = std::min(features.panels(tokens), last - panel);
      features.multiply(panel, count, tokens, x);
      for (int t = 0; t < tokens; ++t) {
        float* h = reinterpret_cast<float*>(g.h) + (s + t) * width(a.down);
        for (int64_t p = 0; p < count; ++p) {
          float gate[PANEL], up[PANEL];
          features.take(t, p, a.up.rows - panel * PANEL, gate, up);
          activate_panel(a, g.expert, panel + p, 1, gate, up, h + (panel + p) * PANEL);
        }
        if (panel + count == a.up.panels()) std::fill(h + (panel + count) * PANEL, h + width(a.down), 0.0f);
      }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  Sums sums;
  for (int64_t s = 0; s < g.count; s += TOKENS) {
    const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
    const float* h[TOKENS];
    for (int t = 0; t < tokens; ++t) h[t] = reinterpret_cast<float*>(g.h) + (s + t) * width(a.down);
    for (int64_t panel = first, stop; panel < last; panel = stop) {
      stop = std::min(panel + most_outputs(tokens) / PANEL, last);
      const int64_t outputs = std::min(stop * PANEL, a.down.rows) - panel * PANEL;
      multiply(a.down.values[g.expert] + panel * PANEL, a.down.col_stride, outputs, a.down.cols, tokens, h, sums);
      for (int t = 0; t < tokens; ++t)
        for (int64_t p = panel; p < stop; ++p) {
          float* y = sums.of(t) + (p - panel) * PANEL;
          add_bias(a.down, g.expert, p, 1, y);
          accumulate(a, g.slots[s + t], p, y, out);
        }
    }
  }
}
}  // namespace dot
