// The routing plan in one launch of one block: slots sorted by expert, stably, where each token finds its results,
// where each expert's slots end, and the list of tiles. Warp w has a run of slots, in order. It counts them by expert.
// A scan over experts and, within one, over warps says where the first of each goes; then each warp places its own.
// An id that is no expert goes to a bucket behind the last one.
constexpr int THREADS = 512, WARPS = THREADS / 32, BUCKETS = EXPERTS + 1;

DEVICE int bucket_of(const Arguments& a, int slot) {
  const Id id = a.ids[slot];
  return id >= 0 && id < EXPERTS ? int(id) : EXPERTS;
}

// The lanes of a warp that have a slot of the same bucket.
DEVICE uint32_t alike(int bucket, bool inside) {
  uint32_t same = __ballot_sync(0xffffffffu, inside);
#pragma unroll
  for (int bit = 0; bit < BUCKET_BITS; ++bit) {
    const bool set = bucket >> bit & 1;
    const uint32_t votes = __ballot_sync(0xffffffffu, set);
    same &= set ? votes : ~votes;
  }
  return same;
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

// The sum of the threads before this one; `done` becomes what it was and the sum of all.
DEVICE int32_t before_this(int32_t x, int32_t (&totals)[WARPS], int lane, int warp, int32_t& done) {
  const int32_t up_to_here = scan(x, lane);
  if (lane == 31) totals[warp] = up_to_here;
  __syncthreads();
  int32_t before = done + up_to_here - x;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += totals[w];
    done += totals[w];
  }
  __syncthreads();  // all have read the totals
  return before;
}

// Counts become places: of the first slot of each bucket in each warp's run.
DEVICE void scan_buckets(const Arguments& a, int32_t* counts, int32_t (&totals)[WARPS], int lane, int warp) {
  int32_t slots_done = 0, tiles_done = 0;
  for (int first = 0; first < BUCKETS; first += THREADS) {
    const int bucket = first + threadIdx.x;
    int32_t count = 0;
#pragma unroll 1
    for (int w = 0; w < WARPS && bucket < BUCKETS; ++w) count += counts[w * BUCKETS + bucket];
    const int32_t mine = bucket < EXPERTS ? (count + TOKENS - 1) / TOKENS : 0;
    const int32_t start = before_this(count, totals, lane, warp, slots_done);
    const int32_t tile = before_this(mine, totals, lane, warp, tiles_done);
    int32_t place = start;
#pragma unroll 1
    for (int w = 0; w < WARPS && bucket < BUCKETS; ++w) {
      const int32_t next = place + counts[w * BUCKETS + bucket];
      counts[w * BUCKETS + bucket] = place;
      place = next;
    }
    if (bucket < EXPERTS) a.offsets[bucket] = place;
#pragma unroll 1
    for (int32_t i = 0; i < mine; ++i) {
      const int32_t left = count - i * TOKENS;
      a.tiles[tile + i] = {bucket, start + i * TOKENS, left < TOKENS ? left : TOKENS, 0};
    }
  }
  if (threadIdx.x == 0) *a.tile_count = tiles_done;
}

extern "C" __global__ void __launch_bounds__(THREADS) samoyeds_kernel(const __grid_constant__ Arguments a) {
  SAMOYEDS_SHARED(shared);
  __shared__ int32_t totals[WARPS];
  int32_t* const counts = reinterpret_cast<int32_t*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* const mine = counts + warp * BUCKETS;
  const int run = ((a.slots + WARPS - 1) / WARPS + 31) / 32 * 32, begin = warp * run;
  const int end = begin + run < a.slots ? begin + run : a.slots;
  for (int i = lane; i < BUCKETS; i += 32) mine[i] = 0;
  __syncwarp();
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const bool inside = first + lane < end;
    const int bucket = inside ? bucket_of(a, first + lane) : EXPERTS;
    const uint32_t same = alike(bucket, inside);
    if (inside && lane == __ffs(same) - 1) mine[bucket] += __popc(same);
    __syncwarp();  // the next slots may be of the same buckets
  }
  __syncthreads();
  scan_buckets(a, counts, totals, lane, warp);
  __syncthreads();
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const bool inside = first + lane < end;
    const int bucket = inside ? bucket_of(a, first + lane) : EXPERTS;
    const uint32_t same = alike(bucket, inside);
    const int32_t place = mine[bucket] + __popc(same & ((1u << lane) - 1));
    __syncwarp();  // all have read where their buckets go on
    if (inside) {
      a.order[place] = first + lane;
      a.places[first + lane] = place;
      if (lane == __ffs(same) - 1) mine[bucket] += __popc(same);
    }
    __syncwarp();
  }
}
