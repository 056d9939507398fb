// Eight floats at a time, in C++ that any compiler makes vectors of as far as the machine has them.

constexpr int LANES = 8;
struct Vec {
  float lane[LANES];
};

template <class F>
static inline Vec each(F f) {
  Vec y;
  for (int i = 0; i < LANES; ++i) y.lane[i] = f(i);
  return y;
}
static inline Vec zero() { return Vec{}; }
static inline Vec broadcast(float x) {
  return each([&](int) { return x; });
}
template <class T>
static inline Vec load(const T* p) {
  return each([&](int i) { return to_float(p[i]); });
}
static inline void store(float* p, Vec x) { std::memcpy(p, x.lane, sizeof x.lane); }
static inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}

// Never needed: the narrowest vector of columns, 16, holds a whole vector of values.
template <class T>
static inline Vec load_half(const T*) { return zero(); }
static inline Vec half(Vec x, bool) { return x; }

// 16 columns of a token, and for each of 8 values the one that it is multiplied with.
struct Columns {
  const float* x;
};
static inline Columns load_columns(const float* x) { return {x}; }
struct Positions {
  int index[LANES];
  explicit Positions(uint32_t codes) {
    for (int i = 0; i < LANES; ++i) index[i] = i / 2 * 4 + int(codes >> 2 * i & 3);
  }
};
static inline Vec take(const Columns& x, const Positions& at) {
  return each([&](int i) { return x.x[at.index[i]]; });
}

// Sums of 16 vectors, in order.
static inline void sums(const Vec* x, int64_t stride, float* out) {
  for (int i = 0; i < 16; ++i) {
    out[i] = 0;
    for (float lane : x[i * stride].lane) out[i] += lane;
  }
}

// out[t] of 16 rows that are stride apart, LANES of them; the 16 of each lie out_stride after those before.
static inline void transpose_from(const float* rows, int64_t stride, float* out, int64_t out_stride = 16) {
  for (int t = 0; t < LANES; ++t)
    for (int i = 0; i < 16; ++i) out[t * out_stride + i] = rows[i * stride + t];
}
