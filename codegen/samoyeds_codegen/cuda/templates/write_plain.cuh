DEVICE Dense activated(Dense x) {
#pragma unroll
  for (int d = 0; d < DENSE_ROWS; ++d) x.row[d] = activate(x.row[d]);
  return x;
}

// Rows row and row + 8 of a slab.
DEVICE void write(const Arguments& a, int64_t slot, int slab, int row, const Dense& upper, const Dense& lower) {
  store(a, slot, slab * 16 + row, activated(upper));
  store(a, slot, slab * 16 + row + 8, activated(lower));
}
