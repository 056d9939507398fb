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
}  // namespace dot
