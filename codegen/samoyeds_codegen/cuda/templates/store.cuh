// From sums to memory: bias, activation, and a row of the result for each slot.
DEVICE Dense biased(const Arguments& a, Dense x, const Element* bias, int condensed_row) {
  const int feature = condensed_row * DENSE_ROWS;
#pragma unroll
  for (int d = 0; d < DENSE_ROWS && BIAS; ++d)
    if (bias && feature + d < a.features) x.row[d] += to_float(bias[feature + d]);
  return x;
}

struct alignas(2 * DENSE_ROWS) Stored {
  Element row[DENSE_ROWS];
};

// Padding is zero whatever the activation makes of it, as the next projection reads some of it.
DEVICE void store(const Arguments& a, int64_t slot, int condensed_row, const Dense& x) {
  const int feature = condensed_row * DENSE_ROWS;
  Stored stored;
#pragma unroll
  for (int d = 0; d < DENSE_ROWS; ++d)
    stored.row[d] = from_float<Element>(feature + d < a.features ? x.row[d] : 0.0f);
  *reinterpret_cast<Stored*>(a.out + slot * a.out_stride + feature) = stored;
}
