// Few tokens an expert: each condensed row is multiplied with the columns that it kept, one vector of values at a time.
//
// Which output row a vector of values belongs to changes from column to column, so sums live in memory, one for each
// output row and token, and the selection is the address. The weights are read once for up to TOKENS tokens.

namespace dot {

constexpr int TOKENS = 8;
constexpr int STEP = 2 * LANES;  // columns of one vector of values

static inline uint32_t load_codes(const uint16_t* metadata, bool whole) {
  return STEP == 32 && whole ? metadata[0] | uint32_t(metadata[1]) << 16 : metadata[0];
}

// Fetch the panel that comes next: it is as long as this one, so its step k is due when this one's step k runs. Values
// go to the second cache only: the first one has just room for this panel and the tokens.
static inline void prefetch_values(const Panel& next, int r, int64_t k) {
  constexpr int every = int(64 / (LANES * sizeof(Weight)));
  if (k % every == 0) __builtin_prefetch(next.values[r] + k * LANES, 0, 2);
}
static inline void prefetch_positions(const Panel& next, int64_t cols) {
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t i = 0; i < cols / 16; i += 32) __builtin_prefetch(next.metadata[r] + i);
    for (int64_t i = 0; N != M && i < cols / V; i += 64) __builtin_prefetch(next.selection[r] + i);
  }
}

// What a vector of values contributes. If columns share a selection by less than STEP, its halves go to two rows.
template <int T>
static inline void add(const Panel& w, int r, int64_t column, Vec values, const Positions& at, const Columns* x,
                       bool whole, Vec* sum) {
  Vec* s = sum + w.target(r, column) * T;
  if constexpr (V >= STEP || N == M) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) s[t] = fma(values, take(x[t], at), s[t]);
  } else {
    const Vec low = half(values, false), high = half(values, true);
    for (int t = 0; t < T; ++t) s[t] = fma(low, take(x[t], at), s[t]);
    s = sum + w.target(r, whole ? column + V : column) * T;
    for (int t = 0; t < T; ++t) s[t] = fma(high, take(x[t], at), s[t]);
  }
}

template <int T>
static inline void step(const Panel& w, const Panel& next, int64_t k, const float* const* x, bool whole, Vec* sum) {
  Columns columns[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) columns[t] = load_columns(x[t] + k * STEP);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    prefetch_values(next, r, k);
    const Weight* values = w.values[r] + k * LANES;
    const Positions at(load_codes(w.metadata[r] + k * STEP / 16, whole));
    add<T>(w, r, k * STEP, whole ? load(values) : load_half(values), at, columns, whole, sum);
  }
}

// out[t][i] = row i of the panel times x[t]. Rows of x are zero from cols up to a multiple of STEP.
template <int T>
static void multiply(const Panel& w, const Panel& next, int64_t cols, const float* const* x, float (*out)[PANEL]) {
  Vec sum[PANEL * T];
  for (Vec& s : sum) s = zero();
  prefetch_positions(next, cols);
  const int64_t whole = cols / STEP;
  for (int64_t k = 0; k < whole; ++k) step<T>(w, next, k, x, true, sum);
  if (V < STEP && cols % STEP) step<T>(w, next, whole, x, false, sum);
  for (int t = 0; t < T; ++t) sums(sum + t, T, out[t]);
}

// The same for any number of tokens up to TOKENS.
static void multiply(int tokens, const Panel& w, const Panel& next, int64_t cols, const float* const* x,
                     float (*out)[PANEL]) {
  switch (tokens) {
    case 1: return multiply<1>(w, next, cols, x, out);
    case 2: return multiply<2>(w, next, cols, x, out);
    case 3: return multiply<3>(w, next, cols, x, out);
    case 4: return multiply<4>(w, next, cols, x, out);
    case 5: return multiply<5>(w, next, cols, x, out);
    case 6: return multiply<6>(w, next, cols, x, out);
    case 7: return multiply<7>(w, next, cols, x, out);
    default: return multiply<8>(w, next, cols, x, out);
  }
}

static int64_t width(const Matrix& w) { return round_up(w.cols, 32); }
static int64_t bytes(int64_t count, const Matrix& w) { return count * width(w) * int64_t(sizeof(float)); }

// One token as floats, padded with zeros.
static void gather(const Arguments& a, int64_t token, char* rows) {
  const Weight* row = a.x + token * a.x_stride;
  float* x = reinterpret_cast<float*>(rows) + token * width(a.up);
  for (int64_t i = 0; i < a.hidden; ++i) x[i] = to_float(row[i]);
  std::fill(x + a.hidden, x + width(a.up), 0.0f);
}

// Features of panels first to last of h = activation(gate, up), [slots, width(down)].
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const bool ends = panel + 1 == a.up.panels();
    const Panel ups(a.up, g.expert, panel), gates(a.gate, g.expert, panel);
    const Panel next(GATED ? a.gate : a.up, g.expert, ends ? panel : panel + 1);
    for (int64_t s = 0; s < g.count; s += TOKENS) {
      const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
      const float* x[TOKENS];
      float gate[TOKENS][PANEL], up[TOKENS][PANEL];
      for (int t = 0; t < tokens; ++t) x[t] = reinterpret_cast<float*>(g.x) + g.slots[s + t].token * width(a.up);
      if (GATED) multiply(tokens, gates, ups, a.gate.cols, x, gate);
      multiply(tokens, ups, next, a.up.cols, x, up);
      for (int t = 0; t < tokens; ++t) {
        float* h = reinterpret_cast<float*>(g.h) + (s + t) * width(a.down);
        activate_panel(a, g.expert, panel, 1, gate[t], up[t], h + panel * PANEL);
        if (ends) std::fill(h + (panel + 1) * PANEL, h + width(a.down), 0.0f);
      }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  for (int64_t panel = first; panel < last; ++panel) {
    const bool ends = panel + 1 == last;
    const Panel w(a.down, g.expert, panel), next(a.down, ends ? g.next_expert : g.expert, ends ? first : panel + 1);
    for (int64_t s = 0; s < g.count; s += TOKENS) {
      const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
      const float* h[TOKENS];
      float y[TOKENS][PANEL];
      for (int t = 0; t < tokens; ++t) h[t] = reinterpret_cast<float*>(g.h) + (s + t) * width(a.down);
      multiply(tokens, w, next, a.down.cols, h, y);
      for (int t = 0; t < tokens; ++t) {
        add_bias(a.down, g.expert, panel, 1, y[t]);
        accumulate(a, g.slots[s + t], panel, y[t], out);
      }
    }
  }
}
}  // namespace dot
