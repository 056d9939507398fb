// A tile of tokens in shared memory: for each half of a column block, [TOKENS] rows of 64 columns (128 bytes), with
// the 16-byte chunks of a row swapped by the last three bits of the row's number: the 128-byte swizzle of wgmma, and
// free of bank conflicts for ldmatrix.
constexpr int TOKEN_HALF = TOKENS * 128, TOKEN_BYTES = 2 * TOKEN_HALF;

DEVICE uint32_t token_chunk(int row, int chunk) { return uint32_t(row * 128 + ((chunk ^ (row & 7)) << 4)); }

// The place in a row of 128 bytes of columns that are `chunk` in memory: as weights IN_REGISTERS come to be ordered.
DEVICE int ordered_chunk(int chunk) { return IN_REGISTERS ? chunk % 4 * 2 + chunk / 4 : chunk; }

// 128 threads copy the rows of a tile, or from the first one of theirs on, eight threads to a row of 128 bytes. What is
// beyond the tile or beyond the last column becomes zero; GATHER looks up the token of a slot, as the routing plan
// sorted them.
struct TokenRows {
  static constexpr int COPIED = TOKENS_SHARED ? TOKENS / CLUSTER : TOKENS, PASSES = (COPIED + 15) / 16;
  const Element* rows[PASSES];
  uint32_t valid;
  int row, chunk, columns;

  DEVICE TokenRows(const Arguments& a, const Tile& tile, int first, int thread)
      : valid(0), row(first + thread / 8), chunk(thread % 8), columns(a.columns) {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const bool inside = row + 16 * i < tile.count;
      const int64_t slot = inside ? tile.first_slot + row + 16 * i : tile.first_slot;
      const int64_t from = GATHER ? a.order[slot] / a.top_k : slot;
      rows[i] = a.x + from * a.x_stride + chunk * 8;
      valid |= uint32_t(inside) << i;
    }
  }

  DEVICE void copy(uint32_t to, int block) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = block * COLUMNS + half * 64;
      const bool exists = column + chunk * 8 < columns;
#pragma unroll
      for (int i = 0; i < PASSES; ++i)
        if (TOKENS >= 16 || row < TOKENS) {
          const bool wanted = exists && (valid >> i & 1);
          const uint32_t there = to + half * TOKEN_HALF + token_chunk(row + 16 * i, ordered_chunk(chunk));
          ptx::cp_async<16>(there, rows[i] + column, wanted);
        }
    }
  }
};
