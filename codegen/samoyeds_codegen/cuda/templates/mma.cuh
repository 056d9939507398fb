// Sparse mma.sync (sm_80 and later). A block of 4 warps computes ROW_TILES * 64 condensed rows of TOKENS tokens; warp w
// has slab w of every row tile. Weights and tokens come through STAGES buffers, one column block of 128 in each.
constexpr int THREADS = 128;
constexpr int STAGE_BYTES = TOKEN_BYTES + ROW_TILES * RECORD_BYTES;

struct Copier {
  TokenRows tokens;
  const uint8_t* records;
  uint32_t shared;
  int column_blocks;

  DEVICE void copy(int block) const {
    const uint32_t stage = shared + block % STAGES * STAGE_BYTES;
    tokens.copy(stage, block);
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
      const uint8_t* record = records + (int64_t(tile) * column_blocks + block) * RECORD_BYTES;
#pragma unroll
      for (int at = threadIdx.x * 16; at < RECORD_BYTES; at += THREADS * 16)
        ptx::cp_async<16>(stage + TOKEN_BYTES + tile * RECORD_BYTES + at, record + at, true);
    }
  }
};

// One column block: 4 steps of 32 columns, for all row tiles of a warp.
struct Multiplier {
  float sums[ROW_TILES][SETS][TOKENS / 2];
  Choice before[ROW_TILES];
  int lane, warp;

  DEVICE Multiplier() : lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int i = 0; i < SETS * TOKENS / 2; ++i) sums[r][i / (TOKENS / 2)][i % (TOKENS / 2)] = 0.0f;
  }

  DEVICE void choose(int r, const Choice& now) {
    telescope(sums[r], before[r], now);
    before[r] = now;
  }

  template <int STEP>
  DEVICE void step(const unsigned char* stage, uint32_t address, const uint2 (&metadata)[ROW_TILES]) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const int record = TOKEN_BYTES + r * RECORD_BYTES;
      if constexpr (SETS > 1 && STEP * 32 % VECTOR == 0)
        choose(r, choice_at(stage + record + SELECTION_AT, warp * 16 + lane / 4, STEP * 32 / VECTOR));
      ptx::ldmatrix_x4(a[r], address + record + value_offset(warp * 16 + lane % 16, lane / 16, STEP));
    }
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i += 4) {
      uint32_t b[4];
      const int row = i * 2 + lane % 8, chunk = STEP % 2 * 4 + lane / 8;
      ptx::ldmatrix_x4(b, address + STEP / 2 * TOKEN_HALF + token_chunk(row, chunk));
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
        multiply<STEP % 2>(r, i, a[r], b, STEP < 2 ? metadata[r].x : metadata[r].y);
    }
  }

  template <int SELECTOR>
  DEVICE void multiply(int r, int i, const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    if (DIRECT && before[r].upper)
      ptx::mma_sp_m16n8k32<Element, SELECTOR>(reinterpret_cast<float (&)[4]>(sums[r][SETS - 1][i]), a, b, metadata);
    else
      ptx::mma_sp_m16n8k32<Element, SELECTOR>(reinterpret_cast<float (&)[4]>(sums[r][0][i]), a, b, metadata);
  }

  DEVICE void block(const unsigned char* stage) {
    uint2 metadata[ROW_TILES];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const unsigned char* words = stage + TOKEN_BYTES + r * RECORD_BYTES + metadata_offset(warp, lane);
      metadata[r] = *reinterpret_cast<const uint2*>(words);
    }
    const uint32_t address = ptx::shared_address(stage);
    step<0>(stage, address, metadata);
    step<1>(stage, address, metadata);
    step<2>(stage, address, metadata);
    step<3>(stage, address, metadata);
  }
};

// Grid: most tiles there can be, times row_tiles / ROW_TILES; neighbours share their tokens.
extern "C" __global__ void __launch_bounds__(THREADS) samoyeds_kernel(const __grid_constant__ Arguments a) {
  SAMOYEDS_SHARED(shared);
  const int row_groups = a.row_tiles / ROW_TILES, number = blockIdx.x / row_groups;
  if (number >= *a.tile_count) return;
  const Tile tile = a.tiles[number];
  const int first_row_tile = blockIdx.x % row_groups * ROW_TILES;
  const int64_t record = (int64_t(tile.expert) * a.row_tiles + first_row_tile) * a.column_blocks;
  const Copier copier{TokenRows(a, tile, threadIdx.x), a.weights + record * RECORD_BYTES, ptx::shared_address(shared),
                      a.column_blocks};
  Multiplier multiplier;
  for (int block = 0; block < STAGES - 1; ++block) {
    if (block < a.column_blocks) copier.copy(block);
    ptx::cp_async_commit();
  }
  for (int block = 0; block < a.column_blocks; ++block) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the copies of all threads are there, and all have read the buffer that is filled next
    if (block + STAGES - 1 < a.column_blocks) copier.copy(block + STAGES - 1);
    ptx::cp_async_commit();
    multiplier.block(shared + block % STAGES * STAGE_BYTES);
  }
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    if constexpr (SETS > 1) multiplier.choose(r, Choice());
    finish(a, tile, (first_row_tile + r) * 4 + multiplier.warp, multiplier.sums[r], multiplier.lane);
  }
}
