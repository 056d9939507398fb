// Sixteen floats at a time. Needs AVX-512 F, BW, DQ and VL.

constexpr int LANES = 16;
using Vec = __m512;

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// The lower half of the values, without reading the others; and either half of a vector, zero elsewhere.
static inline Vec load_half(const float* p) { return _mm512_maskz_loadu_ps(0x00ff, p); }
static inline Vec load_half(const bf16* p) {
  const __m256i narrow = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0x00ff, _mm512_cvtepu16_epi32(narrow), 16));
}
static inline Vec half(Vec x, bool upper) { return _mm512_maskz_mov_ps(upper ? 0xff00 : 0x00ff, x); }

// 32 columns of a token, and for each of 16 values the one that it is multiplied with.
struct Columns {
  Vec low, high;
};
static inline Columns load_columns(const float* x) { return {load(x), load(x + 16)}; }
struct Positions {
  __m512i index;
  explicit Positions(uint32_t codes) {
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i group = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512i code = _mm512_srlv_epi32(_mm512_set1_epi32(int(codes)), shifts);
    index = _mm512_ternarylogic_epi32(code, _mm512_set1_epi32(3), group, 0xea);  // (code & 3) | group
  }
};
static inline Vec take(const Columns& x, const Positions& at) {
  return _mm512_permutex2var_ps(x.low, at.index, x.high);
}

// Sums of 16 vectors, in order: halve the number of vectors and the width of their parts, four times.
static inline void sums(const Vec* x, int64_t stride, float* out) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 p = x[2 * i * stride], q = x[(2 * i + 1) * stride];
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  store(out, _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd)));
}

// 16 x 16, in place.
static inline void transpose(__m512* r) {
  __m512 a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d p = _mm512_castps_pd(a[i + j]), q = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    }
  for (int i = 0; i < 4; ++i) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    r[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    r[4 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    r[12 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}
// out[i] of 16 rows that are stride apart; the 16 of each lie out_stride after those before.
static inline void transpose_from(const float* rows, int64_t stride, float* out, int64_t out_stride = 16) {
  __m512 r[16];
  for (int i = 0; i < 16; ++i) r[i] = load(rows + i * stride);
  transpose(r);
  for (int i = 0; i < 16; ++i) store(out + i * out_stride, r[i]);
}
