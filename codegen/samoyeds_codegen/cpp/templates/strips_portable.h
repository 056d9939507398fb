// Lanes that are rows, eight: a strip is two vectors.

// Four columns of a token, in every four lanes.
static inline Vec four(const float* x) {
  return each([&](int i) { return x[i % 4]; });
}

// For each lane the positions of its values, two bits each; the lowest come first.
struct Codes {
  uint32_t bits[LANES];
  Codes() = default;
  Codes(const uint32_t* positions, int skipped) {
    for (int i = 0; i < LANES; ++i) bits[i] = positions[i] >> skipped;
  }
  void next() {
    for (uint32_t& b : bits) b >>= 2;
  }
};
static inline Vec pick(Vec four_columns, Codes codes) {
  return each([&](int i) { return four_columns.lane[codes.bits[i] & 3]; });
}

// The two values that each lane keeps of four columns.
struct Pair {
  Vec first, second;
};
static inline Pair load_pair(const float* values, int half) {
  return {load(values + half * LANES), load(values + 16 + half * LANES)};
}
static inline Pair load_pair(const bf16* values, int half) {
  const bf16* both = values + half * 2 * LANES;
  return {each([&](int i) { return to_float(both[2 * i]); }), each([&](int i) { return to_float(both[2 * i + 1]); })};
}

// a + b in the lanes named, a in the others.
static inline Vec add_where(uint32_t lanes, int half, Vec a, Vec b) {
  return each([&](int i) { return lanes >> (half * LANES + i) & 1 ? a.lane[i] + b.lane[i] : a.lane[i]; });
}

// Which of 16 bytes are this one, but for their upper bits.
static inline uint32_t equal(const uint8_t* bytes, uint8_t bits, uint8_t value) {
  uint32_t found = 0;
  for (int i = 0; i < 16; ++i) found |= uint32_t((bytes[i] & bits) == value) << i;
  return found;
}
