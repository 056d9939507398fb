// Sparse wgmma (sm_90a). Blocks stay and take one piece of work after the other: 128 condensed rows of TOKENS tokens.
// Two warpgroups multiply, 64 rows each; the third copies weights and gathers tokens. The two blocks of a cluster have
// either the same rows of the same expert and other tokens, or the same tokens and the next rows: each copies half of
// what they share and sends it to the other one, so that it comes from the cache once.
constexpr int CONSUMERS = 2, GROUP_THREADS = 128, THREADS = (CONSUMERS + 1) * GROUP_THREADS;
constexpr int STAGE_BYTES = (TOKEN_BYTES + CONSUMERS * PIECE_BYTES + 1023) / 1024 * 1024;
constexpr int LAG = STAGES / 2;  // copies are waited for this many stages later
static_assert(ROW_TILES == CONSUMERS, "a piece for each warpgroup that multiplies");
static_assert(CLUSTER == 1 || CLUSTER == CONSUMERS, "a piece for each block of a cluster to copy");
constexpr int TILES_TOGETHER = TOKENS_SHARED ? CLUSTER * CONSUMERS : CONSUMERS;  // pieces of rows, of a cluster

// Of this block in its cluster.
DEVICE uint32_t rank() {
  if constexpr (CLUSTER > 1) return ptx::cluster_rank();
  return 0;
}

// Waits for all threads of the cluster.
DEVICE void together() {
  if constexpr (CLUSTER > 1)
    ptx::cluster_sync();
  else
    __syncthreads();
}

// Barriers behind the stages: `full` for 128 copying threads and what the other block sends, `empty` for each warp that
// reads, in both blocks of a cluster, as either writes there.
struct Ring {
  uint32_t shared;

  DEVICE uint32_t stage(uint32_t turn) const { return turn % STAGES * STAGE_BYTES; }
  DEVICE uint32_t full(uint32_t turn) const { return shared + STAGES * STAGE_BYTES + turn % STAGES * 16; }
  DEVICE uint32_t empty(uint32_t turn) const { return full(turn) + 8; }
  DEVICE uint32_t parity(uint32_t turn) const { return turn / STAGES & 1; }

  DEVICE void init() const {
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(full(i), GROUP_THREADS);
      ptx::mbarrier_init(empty(i), CONSUMERS * 4 * CLUSTER);
    }
    if constexpr (CLUSTER > 1) ptx::fence_barrier_init();
  }
};

// The pieces of work of this block. Blocks that share weights divide the tokens of a tile; there may be none for the
// second one.
struct Work {
  int first, step, row_groups, tiles, count;

  DEVICE explicit Work(const Arguments& a)
      : first(blockIdx.x / CLUSTER),
        step(gridDim.x / CLUSTER),
        row_groups(a.row_tiles / TILES_TOGETHER),
        tiles(*a.tile_count),
        count(tiles * row_groups) {}

  DEVICE Tile tile(const Arguments& a, int piece) const {
    Tile tile = a.tiles[place_of(piece, tiles, row_groups).tile];
    if constexpr (WEIGHTS_SHARED) {
      const int before = int(rank()) * TOKENS, rest = tile.count - before;
      tile.count = rest < 0 ? 0 : rest < TOKENS ? rest : TOKENS;
      if (tile.count) tile.first_slot += before;
    }
    return tile;
  }
  DEVICE int row_tile(int piece) const {
    const int first = place_of(piece, tiles, row_groups).row_group * TILES_TOGETHER;
    return TOKENS_SHARED ? first + int(rank()) * CONSUMERS : first;
  }
};

// To the same place in the other block's shared memory.
DEVICE void send(const Ring& ring, uint32_t turn, uint32_t first, uint32_t bytes) {
  const uint32_t from = ring.shared + ring.stage(turn) + first;
  ptx::bulk_copy_peer(from, from, bytes, ring.full(turn), rank() ^ 1);
}

// This block's half of what the cluster shares, which is as many bytes as the other one sends.
DEVICE uint32_t send_half(const Ring& ring, uint32_t turn) {
  if constexpr (WEIGHTS_SHARED) {
    send(ring, turn, TOKEN_BYTES + rank() * PIECE_BYTES, PIECE_BYTES);
    return PIECE_BYTES;
  } else {
    for (int half = 0; half < 2; ++half) send(ring, turn, half * TOKEN_HALF + rank() * TOKEN_HALF / 2, TOKEN_HALF / 2);
    return TOKEN_HALF;
  }
}

// What a copying thread's cp.async wrote for a stage is there: tell those who multiply, in either block.
DEVICE void hand_over(const Ring& ring, uint32_t turn, int thread) {
  ptx::fence_proxy_async();
  if constexpr (CLUSTER > 1) {
    ptx::named_barrier_sync(1, GROUP_THREADS);
    if (thread == 0) return ptx::mbarrier_expect(ring.full(turn), send_half(ring, turn));
  }
  ptx::mbarrier_arrive(ring.full(turn));
}

DEVICE void produce(const Arguments& a, const Ring& ring, int thread) {
  const Work work(a);
  uint32_t turn = 0;
  const int mine = WEIGHTS_SHARED ? int(rank()) * WeightRows::COPIED : 0;
  const int first_token = TOKENS_SHARED ? int(rank()) * TokenRows::COPIED : 0;
  for (int piece = work.first; piece < work.count; piece += work.step) {
    const Tile tile = work.tile(a, piece);
    const TokenRows tokens(a, tile, first_token, thread);
    const WeightRows weights(a, tile, work.row_tile(piece) + mine, thread);
    for (int block = 0; block < a.column_blocks; ++block, ++turn) {
      const uint32_t stage = ring.shared + ring.stage(turn);
      ptx::mbarrier_wait(ring.empty(turn), ring.parity(turn) ^ 1);
      weights.copy(stage + TOKEN_BYTES + mine * PIECE_BYTES, block);
      tokens.copy(stage, block);
      ptx::cp_async_commit();
      if (turn >= LAG) {
        ptx::cp_async_wait<LAG>();
        hand_over(ring, turn - LAG, thread);
      }
    }
  }
  ptx::cp_async_wait<0>();
  for (uint32_t last = turn < LAG ? 0 : turn - LAG; last < turn; ++last) hand_over(ring, last, thread);
}

// A descriptor (PTX ISA, "Matrix descriptor"): start, leading and stride byte offset in units of 16 bytes, swizzle.
DEVICE uint64_t tokens_descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

struct Multiplier {
  float sums[SETS][TOKENS / 2];
  Choice before;
  int lane, warp;

  DEVICE explicit Multiplier(int thread) : lane(thread % 32), warp(thread / 32) {}

  DEVICE void start() {
#pragma unroll
    for (int i = 0; i < SETS * TOKENS / 2; ++i) sums[i / (TOKENS / 2)][i % (TOKENS / 2)] = 0.0f;
    before = Choice();
  }

  DEVICE void choose(const Choice& now) {
    telescope(sums, before, now);
    before = now;
  }

  // The steps of one vector, as many as agree on their sub-rows.
  template <int FIRST, int LAST>
  DEVICE void steps(const Choices& choices, const Weights& weights, uint64_t tokens) {
    if constexpr (SETS > 1) choose(choices.found[FIRST * 32 / VECTOR]);
    if (DIRECT && before.upper)
      multiply<FIRST, LAST>(sums[SETS - 1], weights, tokens);
    else
      multiply<FIRST, LAST>(sums[0], weights, tokens);
  }

  template <int FIRST, int LAST>
  DEVICE void multiply(float (&set)[TOKENS / 2], const Weights& weights, uint64_t tokens) {
    ptx::wgmma_fence();
    each_step<FIRST, LAST>(set, weights, tokens);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }

  template <int STEP, int LAST>
  DEVICE void each_step(float (&set)[TOKENS / 2], const Weights& weights, uint64_t tokens) {
    if constexpr (STEP < LAST) {
      weights.multiply<STEP>(set, tokens + ((STEP / 2 * TOKEN_HALF + STEP % 2 * 64) >> 4));
      each_step<STEP + 1, LAST>(set, weights, tokens);
    }
  }

  DEVICE void block(const unsigned char* stage, const Weights& weights, const Choices& choices) {
    const uint64_t tokens = tokens_descriptor(ptx::shared_address(stage));
    constexpr int TOGETHER = SETS > 1 ? VECTOR / 32 : 4;
    steps<0, TOGETHER>(choices, weights, tokens);
    if constexpr (TOGETHER < 4) steps<TOGETHER, 2 * TOGETHER>(choices, weights, tokens);
    if constexpr (TOGETHER < 2) {
      steps<2, 3>(choices, weights, tokens);
      steps<3, 4>(choices, weights, tokens);
    }
  }
};

// A warp has read a stage.
DEVICE void release(const Ring& ring, uint32_t turn) {
  ptx::mbarrier_arrive(ring.empty(turn));
  if constexpr (CLUSTER > 1) ptx::mbarrier_arrive_cluster(ring.empty(turn), rank() ^ 1);
}

// What a lane knows of a piece of work: all that it reads itself is asked for ahead.
struct Operands {
  Tile tile;
  int row_tile;
  Choices choices;
  Weights weights;

  DEVICE Operands(const Arguments& a, const Work& work, int piece, int group, const Multiplier& multiplier)
      : tile(work.tile(a, piece)),
        row_tile(work.row_tile(piece) + group),
        choices(a, tile, row_tile, multiplier.warp, multiplier.lane),
        weights(a, tile, row_tile, multiplier.warp, multiplier.lane) {}

  DEVICE void go_on(int block) {
    choices.go_on(block);
    weights.go_on(block);
  }
};

DEVICE void consume(const Arguments& a, const Ring& ring, const unsigned char* shared, int group, int thread) {
  const Work work(a);
  if (work.first >= work.count) return;
  Multiplier multiplier(thread);
  Operands operands(a, work, work.first, group, multiplier);
  uint32_t turn = 0;
  for (int piece = work.first; piece < work.count; piece += work.step) {
    multiplier.start();
    for (int block = 0; block < a.column_blocks; ++block, ++turn) {
      const unsigned char* stage = shared + ring.stage(turn);
      operands.go_on(block);
      ptx::mbarrier_wait(ring.full(turn), ring.parity(turn));
      operands.weights.take(stage + TOKEN_BYTES + group * PIECE_BYTES);
      multiplier.block(stage, operands.weights, operands.choices);
      __syncwarp();  // all lanes have read the stage
      if (multiplier.lane == 0) release(ring, turn);
    }
    if constexpr (SETS > 1) multiplier.choose(Choice());
    const Tile tile = operands.tile;
    const int slab = operands.row_tile * 4 + multiplier.warp;
    if (piece + work.step < work.count) operands = Operands(a, work, piece + work.step, group, multiplier);
    finish(a, tile, slab, multiplier.sums, multiplier.lane);
  }
}

// Grid: as many blocks as run at a time.
extern "C" __global__ void SAMOYEDS_CLUSTER __launch_bounds__(THREADS, 1)
    samoyeds_kernel(const __grid_constant__ Arguments a) {
  SAMOYEDS_SHARED(shared);
  const Ring ring{ptx::shared_address(shared)};
  const int group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
  if (threadIdx.x == 0) ring.init();
  together();
  if (group == CONSUMERS) {
    ptx::registers_down<88>();
    produce(a, ring, thread);
  } else {
    ptx::registers_up<208>();
    consume(a, ring, shared, group, thread);
  }
  if constexpr (CLUSTER > 1) together();  // the other block arrives in barriers of this one until it is done
}
