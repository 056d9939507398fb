DEVICE void write_row(const Arguments& a, const Tile& tile, int64_t slot, int row, const Dense& x) {
  Dense h = biased(a, x, a.bias ? a.bias + tile.expert * a.bias_expert : nullptr, row);
#pragma unroll
  for (int d = 0; d < DENSE_ROWS; ++d) h.row[d] = activate(h.row[d]);
  store(a, slot, row, h);
}

// Rows row and row + 8 of a slab.
DEVICE void write(const Arguments& a, const Tile& tile, int64_t slot, int slab, int row, const Dense& upper,
                  const Dense& lower) {
  write_row(a, tile, slot, slab * 16 + row, upper);
  write_row(a, tile, slot, slab * 16 + row + 8, lower);
}
