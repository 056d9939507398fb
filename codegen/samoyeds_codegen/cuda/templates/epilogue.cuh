// A slab's tile of results.
DEVICE void finish(const Arguments& a, const Tile& tile, int slab, const float (&sums)[SETS][TOKENS / 2], int lane) {
  const int row = lane / 4;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i += 4)
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const Dense upper = dense_rows(sums, i + t, lane), lower = dense_rows(sums, i + 2 + t, lane);
      const int token = i * 2 + lane % 4 * 2 + t;
      if (token >= tile.count) continue;
      const int64_t slot = tile.first_slot + token;
      write(a, tile, slot, slab, row, upper, lower);
    }
}
