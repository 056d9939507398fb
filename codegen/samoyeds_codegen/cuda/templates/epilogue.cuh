// A slab's tile of results.
DEVICE void finish(const Arguments& a, const Tile& tile, int slab, const float (&sums)[SETS][TOKENS / 2], int lane) {
  const int row = lane / 4;
  const int64_t packed_row = (int64_t(tile.expert) * a.row_tiles * 4 + slab) * 16 + row;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i += 4)
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      Dense upper = biased(a, dense_rows(sums, i + t, lane), packed_row);
      Dense lower = biased(a, dense_rows(sums, i + 2 + t, lane), packed_row + 8);
      const int token = i * 2 + lane % 4 * 2 + t;
      if (token >= tile.count) continue;
      const int64_t slot = tile.first_slot + token;
      write(a, slot, slab, row, upper, lower);
    }
}
