// Rows 0 to 7 of a slab are gates, rows 8 to 15 the ups of the same features: a thread has both.
DEVICE void write(const Arguments& a, int64_t slot, int slab, int row, const Dense& gate, const Dense& up) {
  Dense h;
#pragma unroll
  for (int d = 0; d < DENSE_ROWS; ++d) h.row[d] = activate(gate.row[d], up.row[d]);
  store(a, slot, slab * 8 + row, h);
}
