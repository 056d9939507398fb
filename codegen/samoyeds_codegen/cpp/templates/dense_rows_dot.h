// Few tokens an expert, dense weights: lanes are columns, and several rows are read side by side; for one token one
// after the other, where memory is faster in one place.
//
// Side by side up to eight rows go together, and what each of them needs next is fetched ahead, across the end of the
// row. The weights are read from memory once; tokens past TOKENS find them in a cache.

namespace dot {

constexpr int TOKENS = LANES == 16 ? 6 : 4;
constexpr int64_t AHEAD = 1024 / sizeof(Weight);  // weights of a row that are on their way

// Rows at a time, so that their sums stay in registers.
constexpr int height(int tokens) {
  return LANES == 16 ? tokens <= 2 ? 8 : 4 : tokens <= 1 ? 8 : tokens <= 2 ? 4 : 2;
}

template <int T, int R>
static inline void step(const Weight* const* w, const Weight* const* ahead, int64_t k, const Row* const* x,
                        Vec (*sum)[T]) {
  Vec columns[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) columns[t] = columns_of(x[t] + k);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (k * sizeof(Weight) % 64 == 0) __builtin_prefetch(ahead[r] + k);
    const Vec values = weights_of(w[r] + k);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = times(values, columns[t], sum[r][t]);
  }
}

// sums[r * T + t] = row r times x[t], lane by lane; next are the rows that follow. Rows of x are zero past cols.
template <int T, int R>
static inline void multiply_rows(const Weight* const* w, const Weight* const* next, int64_t cols,
                                 const Row* const* x, Vec* sums) {
  Vec sum[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sum[r][t] = zero();
  const int64_t whole = cols / WIDE * WIDE, turn = std::max<int64_t>(0, whole - AHEAD);
  const Weight* ahead[R];
  for (int r = 0; r < R; ++r) ahead[r] = w[r] + AHEAD;
  int64_t k = 0;
  for (; k < turn; k += WIDE) step<T, R>(w, ahead, k, x, sum);
  for (int r = 0; r < R; ++r) ahead[r] = next[r] - turn;
  for (; k < whole; k += WIDE) step<T, R>(w, ahead, k, x, sum);
  for (int r = 0; r < R; ++r) {
    const Vec rest = some_weights(w[r] + k, cols - k);
    for (int t = 0; t < T; ++t) sums[r * T + t] = k < cols ? times(rest, columns_of(x[t] + k), sum[r][t]) : sum[r][t];
  }
}

// The same for one row and one token.
static inline void multiply_row(const Weight* w, int64_t cols, const Row* x, Vec* sum) {
  Vec part[4] = {zero(), zero(), zero(), zero()};  // that do not wait for each other
  int64_t k = 0;
  for (; k + 4 * WIDE <= cols; k += 4 * WIDE)
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
      part[p] = times(weights_of(w + k + p * WIDE), columns_of(x + k + p * WIDE), part[p]);
  for (; k < cols; k += WIDE) {
    const Vec rest = k + WIDE <= cols ? weights_of(w + k) : some_weights(w + k, cols - k);
    part[0] = times(rest, columns_of(x + k), part[0]);
  }
  *sum = add(add(part[0], part[1]), add(part[2], part[3]));
}

// out[t][i] = row i of the panel times x[t].
template <int T>
static void multiply(const Panel& w, const Panel& next, int64_t cols, const Row* const* x, float (*out)[PANEL]) {
  constexpr int R = height(T);
  Vec sum[PANEL * T];
  const bool one = T == 1 && ONE_PLACE;
  for (int r = 0; one && r < PANEL; ++r) multiply_row(w.rows[r], cols, x[0], sum + r);
  for (int r = 0; !one && r < PANEL; r += R)
    multiply_rows<T, R>(w.rows + r, r + R < PANEL ? w.rows + r + R : next.rows, cols, x, sum + r * T);
  for (int t = 0; t < T; ++t) sums(sum + t, T, out[t]);
}
}  // namespace dot
