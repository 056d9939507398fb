// What `linear_wide.h` multiplies elsewhere: floats.

namespace wide {

constexpr int TOKENS = LANES == 16 ? 12 : 6;  // whose sums, two vectors each, are in registers
constexpr int OUTPUTS = 2 * LANES, DEPTH = 128;
using Cell = float;
using Piece = float[DEPTH][OUTPUTS];

static inline Cell cell(Weight x) { return to_float(x); }

// So many inputs from one on at some outputs, zero elsewhere.
static inline void fill(const Panel& w, int64_t first, int64_t depth, int64_t some, Piece& out) {
  for (int64_t k = 0; k < depth; ++k) {
    const Weight* column = w.column(first + k);
    for (int64_t o = 0; o < OUTPUTS; o += LANES) {
      const int64_t left = some - o;
      store(out[k] + o, left >= LANES ? load(column + o) : left > 0 ? load_some(column + o, left) : zero());
    }
    w.fetch(first + k + DEPTH);
  }
}

// Adds T tokens times a piece to their sums, or writes them if they are `fresh`; rows are stride apart.
template <int T>
static void block(const Piece& w, int64_t depth, const Cell* x, int64_t stride, bool fresh, float (*sums)[OUTPUTS]) {
  Vec low[T], high[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) low[t] = high[t] = zero();
  for (int64_t k = 0; k < depth; ++k) {
    const Vec first = load(w[k]), second = load(w[k] + LANES);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const Vec all = broadcast(x[t * stride + k]);
      low[t] = fma(all, first, low[t]);
      high[t] = fma(all, second, high[t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    store(sums[t], fresh ? low[t] : add(load(sums[t]), low[t]));
    store(sums[t] + LANES, fresh ? high[t] : add(load(sums[t] + LANES), high[t]));
  }
}

// Sums of a token as a piece of its row.
static inline void store_outputs(const float* sums, int64_t some, Weight* out) {
  for (int64_t o = 0; o < some; ++o) store_as(out + o, sums[o]);
}
}  // namespace wide
