// Sparse mma.sync (sm_80 and later). A block of 4 warps computes ROW_TILES * 64 condensed rows of TOKENS tokens; warp w
// has slab w of every row tile. Weights and tokens come through STAGES buffers, one column block of 128 in each.
constexpr int THREADS = 128;
constexpr int STAGE_BYTES = TOKEN_BYTES + ROW_TILES * PIECE_BYTES;

struct Copier {
  TokenRows tokens;
  WeightRows weights;
  uint32_t shared;

  DEVICE void copy(int block) const {
    const uint32_t stage = shared + block % STAGES * STAGE_BYTES;
    tokens.copy(stage, block);
    weights.copy(stage + TOKEN_BYTES, block);
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
  DEVICE void step(const Choices (&choices)[ROW_TILES], uint32_t address, const uint2 (&metadata)[ROW_TILES]) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      if constexpr (SETS > 1 && STEP * 32 % VECTOR == 0) choose(r, choices[r].found[STEP * 32 / VECTOR]);
      const uint32_t piece = address + TOKEN_BYTES + r * PIECE_BYTES;
      ptx::ldmatrix_x4(a[r], piece + value_offset(warp * 16 + lane % 16, lane / 16, STEP));
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

  DEVICE void block(const unsigned char* stage, const Choices (&choices)[ROW_TILES]) {
    uint2 metadata[ROW_TILES];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) metadata[r] = metadata_of(stage + TOKEN_BYTES + r * PIECE_BYTES, warp, lane);
    const uint32_t address = ptx::shared_address(stage);
    step<0>(choices, address, metadata);
    step<1>(choices, address, metadata);
    step<2>(choices, address, metadata);
    step<3>(choices, address, metadata);
  }
};

// Grid: most tiles there can be, times row_tiles / ROW_TILES.
extern "C" __global__ void __launch_bounds__(THREADS) samoyeds_kernel(const __grid_constant__ Arguments a) {
  SAMOYEDS_SHARED(shared);
  const int row_groups = a.row_tiles / ROW_TILES, tiles = *a.tile_count;
  if (int(blockIdx.x) >= tiles * row_groups) return;
  const Place place = place_of(blockIdx.x, tiles, row_groups);
  const Tile tile = a.tiles[place.tile];
  const int first_row_tile = place.row_group * ROW_TILES;
  const Copier copier{TokenRows(a, tile, 0, threadIdx.x), WeightRows(a, tile, first_row_tile, threadIdx.x),
                      ptx::shared_address(shared)};
  Multiplier multiplier;
  Choices choices[ROW_TILES];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
    choices[r] = Choices(a, tile, first_row_tile + r, multiplier.warp, multiplier.lane);
  for (int block = 0; block < STAGES - 1; ++block) {
    if (block < a.column_blocks) copier.copy(block);
    ptx::cp_async_commit();
  }
  for (int block = 0; block < a.column_blocks; ++block) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) choices[r].go_on(block);
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the copies of all threads are there, and all have read the buffer that is filled next
    if (block + STAGES - 1 < a.column_blocks) copier.copy(block + STAGES - 1);
    ptx::cp_async_commit();
    multiplier.block(shared + block % STAGES * STAGE_BYTES, choices);
  }
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    if constexpr (SETS > 1) multiplier.choose(r, Choice());
    finish(a, tile, (first_row_tile + r) * 4 + multiplier.warp, multiplier.sums[r], multiplier.lane);
  }
}
