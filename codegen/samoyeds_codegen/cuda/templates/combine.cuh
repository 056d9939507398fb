// A thread sums 8 columns of a token, over its experts in order, in float. Grid: (tokens, column groups / THREADS).
constexpr int THREADS = 128, WIDTH = 8;

extern "C" __global__ void __launch_bounds__(THREADS) samoyeds_kernel(const __grid_constant__ Arguments a) {
  const int column = (blockIdx.y * THREADS + threadIdx.x) * WIDTH;
  const int64_t token = blockIdx.x;
  if (column >= a.columns) return;
  const int32_t owned = *a.owned;
  float sum[WIDTH] = {};
  for (int k = 0; k < a.top_k; ++k) {
    const int64_t slot = a.slots[token * a.top_k + k];
    if (slot >= owned) continue;
    const float weight = to_float(a.weights[token * a.top_k + k]);
    union {
      uint4 word;
      Element elements[WIDTH];
    } row = {ptx::load_streaming(reinterpret_cast<const uint4*>(a.rows + slot * a.row_stride + column))};
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum[i] += weight * to_float(row.elements[i]);
  }
  Result* out = a.out + token * a.columns + column;
  for (int i = 0; i < WIDTH && column + i < a.columns; ++i) out[i] = from_float<Result>(sum[i]);
}
