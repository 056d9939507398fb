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

// The choices of a lane's two rows of a slab, in the vectors of a column block. They are read from global memory a
// block ahead. Of the sub-rows that a block keeps, the i-th is its choice i or a later one: code 0 and on.
struct Choices {
  static constexpr int VECTORS = COLUMNS / VECTOR;
  const uint8_t *upper, *lower;
  int code, last;
  Choice found[VECTORS], asked[VECTORS];

  DEVICE Choices() {}
  DEVICE Choices(const Arguments& a, const Tile& tile, int row_tile, int slab, int lane) : last(a.width / VECTOR - 1) {
    const int g = slab * 16 + lane / 4, first = stored_row(a, row_tile, g), second = stored_row(a, row_tile, g + 8);
    upper = row_of(matrix_of(a, tile.expert, false), first);
    lower = row_of(matrix_of(a, tile.expert, true), second);
    code = first % KEPT_ROWS << 8 | second % KEPT_ROWS;
    if constexpr (SETS > 1) ask(0);
  }

  DEVICE const uint8_t* row_of(const Matrix& matrix, int row) const {
    const int block = row / KEPT_ROWS + matrix.first_block;
    return matrix.selection + int64_t(block / GROUP * KEPT_ROWS + row % KEPT_ROWS) * (last + 1);
  }

  DEVICE void ask(int block) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int vector = block * VECTORS + v < last ? block * VECTORS + v : last;
      asked[v] = {upper[vector], lower[vector]};
    }
  }

  // What was asked for is found; the next block is asked for.
  DEVICE void go_on(int block) {
    if constexpr (SETS > 1) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) found[v] = {asked[v].upper - (code >> 8), asked[v].lower - (code & 0xff)};
      ask(block + 1);
    }
  }
};

DEVICE void telescope(float (&sums)[SETS][TOKENS / 2], const Choice& before, const Choice& now) {
  if constexpr (!DIRECT) {
    if (SHARED && before.upper == now.upper && before.lower == now.lower) return;
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
}

// The adjacent dense rows that a condensed row stands for.
struct Dense {
  float row[DENSE_ROWS];
};
