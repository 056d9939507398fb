// What a thread holds of a slab of 16 condensed rows: quads of sums, one quad for each 8 tokens. Lane 4 g + q has rows
// g (elements 0, 1) and g + 8 (elements 2, 3), tokens 2 q and 2 q + 1.
//
// A condensed row belongs to another of SETS dense rows in every vector. Telescoped accumulation (no reset, no copy):
// set 0 sums all products, S. With S_v after vector v, choice c_v there, and set k the sum of what went to choice k,
//   O_k = sum_v [c_v = k] (S_v - S_{v-1}) = sum_v ([c_v = k] - [c_{v+1} = k]) S_v,
// so at each border of vectors set k gains S times -1, 0 or 1. Sums of choice 0 are S minus all others. If SHARED, the
// rows of half a slab agree, so a warp that keeps its choices has nothing to do. If DIRECT, all rows of an instruction
// agree: then set k itself is what is multiplied into, and nothing of this is needed.
struct Choice {
  int upper = 0, lower = 0;  // of rows g and g + 8
};

DEVICE Choice choice_at(const uint8_t* selection, int row, int vector) {
  const int shift = vector * CHOICE_BITS, mask = (1 << CHOICE_BITS) - 1;
  return {selection[row] >> shift & mask, selection[row + 8] >> shift & mask};
}

DEVICE void telescope(float (&sums)[SETS][TOKENS / 2], const Choice& before, const Choice& now) {
  if (DIRECT || (SHARED && before.upper == now.upper && before.lower == now.lower)) return;
#pragma unroll
  for (int k = 1; k < SETS; ++k) {
    const float upper = float((before.upper == k) - (now.upper == k));
    const float lower = float((before.lower == k) - (now.lower == k));
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i += 4) {
      sums[k][i] += upper * sums[0][i];
      sums[k][i + 1] += upper * sums[0][i + 1];
      sums[k][i + 2] += lower * sums[0][i + 2];
      sums[k][i + 3] += lower * sums[0][i + 3];
    }
  }
}

// The adjacent dense rows that a condensed row stands for.
struct Dense {
  float row[DENSE_ROWS];
};
