// Lanes that are rows, sixteen: a strip is one vector.

// Four columns of a token, in every four lanes.
static inline Vec four(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }

// For each lane the positions of its values, two bits each; the lowest come first.
struct Codes {
  __m512i bits;
  Codes() = default;
  Codes(const uint32_t* positions, int skipped) : bits(_mm512_srli_epi32(_mm512_loadu_si512(positions), skipped)) {}
  void next() { bits = _mm512_srli_epi32(bits, 2); }
};
static inline Vec pick(Vec four_columns, Codes codes) { return _mm512_permutevar_ps(four_columns, codes.bits); }

// The two values that each lane keeps of four columns.
struct Pair {
  Vec first, second;
};
static inline Pair load_pair(const float* values, int) { return {load(values), load(values + 16)}; }
static inline Pair load_pair(const bf16* values, int) {
  const __m512i both = _mm512_loadu_si512(values);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))))};
}

// a + b in the lanes named, a in the others.
static inline Vec add_where(uint32_t lanes, int, Vec a, Vec b) {
  return _mm512_mask_add_ps(a, __mmask16(lanes), a, b);
}

// Which of 16 bytes are this one, but for their upper bits.
static inline uint32_t equal(const uint8_t* bytes, uint8_t bits, uint8_t value) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i low = _mm_and_si128(all, _mm_set1_epi8(char(bits)));
  return uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(low, _mm_set1_epi8(char(value)))));
}
