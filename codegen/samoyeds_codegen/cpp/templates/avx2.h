// Eight floats at a time. Needs AVX2 and FMA.

constexpr int LANES = 8;
using Vec = __m256;

static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline Vec load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

// Never needed: the narrowest vector of columns, 16, holds a whole vector of values.
template <class T>
static inline Vec load_half(const T*) { return zero(); }
static inline Vec half(Vec x, bool) { return x; }

// 16 columns of a token, and for each of 8 values the one that it is multiplied with.
struct Columns {
  Vec low, high;
};
static inline Columns load_columns(const float* x) { return {load(x), load(x + 8)}; }
struct Positions {
  __m256i index;  // among 8 columns: the lower four values take from the low ones, the others from the high ones
  explicit Positions(uint32_t codes) {
    const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i group = _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4);
    const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(int(codes)), shifts);
    index = _mm256_or_si256(_mm256_and_si256(code, _mm256_set1_epi32(3)), group);
  }
};
static inline Vec take(const Columns& x, const Positions& at) {
  return _mm256_blend_ps(_mm256_permutevar8x32_ps(x.low, at.index), _mm256_permutevar8x32_ps(x.high, at.index), 0xf0);
}

// Sums of 16 vectors, in order.
static inline void sums(const Vec* x, int64_t stride, float* out) {
  for (int i = 0; i < 16; i += 8, x += 8 * stride) {
    __m256 a[4], b[2];
    for (int j = 0; j < 4; ++j) a[j] = _mm256_hadd_ps(x[2 * j * stride], x[(2 * j + 1) * stride]);
    for (int j = 0; j < 2; ++j) b[j] = _mm256_hadd_ps(a[2 * j], a[2 * j + 1]);
    store(out + i, _mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31)));
  }
}

// out[t] of 16 rows that are stride apart, LANES of them; the 16 of each lie out_stride after those before.
static inline void transpose_from(const float* rows, int64_t stride, float* out, int64_t out_stride = 16) {
  for (int t = 0; t < LANES; ++t)
    for (int i = 0; i < 16; ++i) out[t * out_stride + i] = rows[i * stride + t];
}
