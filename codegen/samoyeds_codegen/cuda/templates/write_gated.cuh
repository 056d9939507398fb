// Rows 0 to 7 of a slab are gates, rows 8 to 15 the ups of the same features: a thread has both.
DEVICE void write(const Arguments& a, const Tile& tile, int64_t slot, int slab, int row, Dense gate, Dense up) {
  gate = biased(a, gate, a.bias ? a.bias + tile.expert * a.bias_expert : nullptr, slab * 8 + row);
  up = biased(a, up, a.up_bias ? a.up_bias + tile.expert * a.up_bias_expert : nullptr, slab * 8 + row);
  Dense h;
#pragma unroll
  for (int d = 0; d < DENSE_ROWS; ++d) h.row[d] = activate(gate.row[d], up.row[d]);
  store(a, slot, slab * 8 + row, h);
}
