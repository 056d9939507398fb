// One block: thread t counts the tiles of experts t, t + THREADS, ...; a scan says where each expert's tiles go.
constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Range {
  int32_t first, count;
  DEVICE int32_t tiles() const { return (count + TOKENS - 1) / TOKENS; }
};

DEVICE Range slots_of(const Arguments& a, int expert) {
  if (expert >= a.experts) return {0, 0};
  const int32_t first = expert ? a.offsets[expert - 1] : 0;
  return {first, a.offsets[expert] - first};
}

// The sum of the lanes before and of this one.
DEVICE int32_t scan(int32_t x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t before = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) samoyeds_kernel(const __grid_constant__ Arguments a) {
  __shared__ int32_t totals[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t done = 0;
  for (int first = 0; first < a.experts; first += THREADS) {
    const int expert = first + threadIdx.x;
    const Range range = slots_of(a, expert);
    const int32_t mine = range.tiles(), up_to_here = scan(mine, lane);
    if (lane == 31) totals[warp] = up_to_here;
    __syncthreads();
    int32_t before = done + up_to_here - mine;
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) before += totals[w];
      done += totals[w];
    }
    __syncthreads();  // all have read the totals
    for (int32_t i = 0; i < mine; ++i) {
      const int32_t slots = range.count - i * TOKENS;
      a.tiles[before + i] = {expert, range.first + i * TOKENS, slots < TOKENS ? slots : TOKENS, 0};
    }
  }
  if (threadIdx.x == 0) *a.tile_count = done;
}
