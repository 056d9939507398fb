// Lanes that are rows, eight: a strip is two vectors.

// Four columns of a token, in every four lanes.
static inline Vec four(const float* x) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }

// For each lane the positions of its values, two bits each; the lowest come first.
struct Codes {
  __m256i bits;
  Codes() = default;
  Codes(const uint32_t* positions, int skipped)
      : bits(_mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions)), skipped)) {}
  void next() { bits = _mm256_srli_epi32(bits, 2); }
};
static inline Vec pick(Vec four_columns, Codes codes) { return _mm256_permutevar_ps(four_columns, codes.bits); }

// The two values that each lane keeps of four columns.
struct Pair {
  Vec first, second;
};
static inline Pair load_pair(const float* values, int half) {
  return {load(values + half * LANES), load(values + 16 + half * LANES)};
}
static inline Pair load_pair(const bf16* values, int half) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + half * 2 * LANES));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))))};
}

// a + b in the lanes named, a in the others.
static inline Vec add_where(uint32_t lanes, int half, Vec a, Vec b) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i named = _mm256_and_si256(_mm256_set1_epi32(int(lanes >> half * LANES)), bits);
  return _mm256_add_ps(a, _mm256_and_ps(b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(named, bits))));
}

// Which of 16 bytes are this one, but for their upper bits.
static inline uint32_t equal(const uint8_t* bytes, uint8_t bits, uint8_t value) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i low = _mm_and_si128(all, _mm_set1_epi8(char(bits)));
  return uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(low, _mm_set1_epi8(char(value)))));
}
