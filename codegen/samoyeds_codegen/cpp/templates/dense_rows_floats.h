// How vectors of weights meet columns of tokens: as floats.

namespace dot {

constexpr int WIDE = LANES;  // columns of a vector

static inline Vec weights_of(const Weight* w) { return load(w); }
static inline Vec some_weights(const Weight* w, int64_t count) { return load_some(w, count); }
static inline Vec columns_of(const float* x) { return load(x); }
static inline Vec times(Vec weights, Vec columns, Vec sum) { return fma(weights, columns, sum); }
}  // namespace dot
