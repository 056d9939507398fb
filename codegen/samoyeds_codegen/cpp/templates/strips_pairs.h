// How values meet the columns they were kept from: both at once, as pairs of bfloat16.

// Where in four columns the two of a code are, in bytes.
struct Spots {
  uint32_t bytes[16] = {};
  constexpr Spots() {
    for (uint32_t code = 0; code < 16; ++code)
      bytes[code] = 0x01000100 + (code & 3) * 0x0202 + (code >> 2) * 0x02020000;
  }
};
alignas(64) static constexpr Spots SPOTS;

// Four columns of a token, in every half of four lanes.
static inline Vec four(const bf16* x) {
  int64_t columns;
  std::memcpy(&columns, x, sizeof(columns));
  return _mm512_castsi512_ps(_mm512_set1_epi64(columns));
}

// Two values of each row, out of four columns.
struct Kept {
  __m512i values, from;

  // Takes the codes of these columns, and goes on to the next ones.
  Kept(const bf16* packed, int, Codes& codes)
      : values(_mm512_loadu_si512(packed)),
        from(_mm512_permutexvar_epi32(codes.bits, _mm512_load_si512(SPOTS.bytes))) {
    codes.next();
    codes.next();
  }
  Vec times(Vec columns, Vec sum) const {
    const __m512i met = _mm512_shuffle_epi8(_mm512_castps_si512(columns), from);
    return _mm512_dpbf16_ps(sum, __m512bh(met), __m512bh(values));
  }
};
