// A warpgroup's weights of a block of columns, in registers: each warp loads its 16 rows from global memory, a block
// ahead of the products. Shared memory has their metadata only, so it has more time for tokens.
//
// Lane 4 g + q loads 16 bytes, 16 dense columns, of rows g and g + 8 for each 64 columns, but for a product its quad
// has to hold four columns of each lane side by side. So lanes 2 j and 2 j + 1 exchange every other word, and tokens
// lie in shared memory in the order that results (`ordered_chunk`): the eight columns that are number 4 j + 2 s + h of
// the 64 in memory are in step s number 2 h + j of 32. Sums do not depend on the order of columns, but vectors of 32
// would be torn apart.
struct Weights {
  const Element *upper, *lower;  // rows g and g + 8
  uint4 asked[2][2];             // of both halves of a block, both rows
  uint32_t values[4][4];         // the first operand of each step
  uint2 metadata;
  int columns, slab, lane;       // columns: kept ones of a row

  DEVICE Weights(const Arguments& a, const Tile& tile, int row_tile, int slab, int lane)
      : columns(a.width / 2), slab(slab), lane(lane) {
    const int g = slab * 16 + lane / 4;
    upper = matrix_of(a, tile.expert, false).values + int64_t(stored_row(a, row_tile, g)) * columns;
    lower = matrix_of(a, tile.expert, true).values + int64_t(stored_row(a, row_tile, g + 8)) * columns;
    ask(0);
  }

  DEVICE void ask(int block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = block * 64 + half * 32 + lane % 4 * 8;
      const bool exists = column < columns;
      asked[half][0] = exists ? load(upper + column) : make_uint4(0, 0, 0, 0);
      asked[half][1] = exists ? load(lower + column) : make_uint4(0, 0, 0, 0);
    }
  }

  DEVICE static uint4 load(const Element* from) {
    return ptx::load_streaming(reinterpret_cast<const uint4*>(from));
  }

  // What was asked for becomes operands; the next block is asked for.
  DEVICE void go_on(int block) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int row = 0; row < 2; ++row) exchange(asked[half][row], values[2 * half], values[2 * half + 1], row);
    ask(block + 1);
  }

  DEVICE void exchange(const uint4& own, uint32_t (&even)[4], uint32_t (&odd)[4], int row) {
    const bool second = lane % 2;
    const uint32_t low = __shfl_xor_sync(0xffffffffu, second ? own.x : own.y, 1);
    const uint32_t high = __shfl_xor_sync(0xffffffffu, second ? own.z : own.w, 1);
    even[row] = second ? low : own.x;
    even[row + 2] = second ? high : own.z;
    odd[row] = second ? own.y : low;
    odd[row + 2] = second ? own.w : high;
  }

  // Eight columns have a byte of metadata: lane q has numbers q and 4 + q of each 64, for step q / 2.
  DEVICE void take(const unsigned char* piece) {
    const int g = slab * 16 + lane / 4, q = lane % 4, bytes = q | (q + 4) << 4;
    const uint4 first = *reinterpret_cast<const uint4*>(piece + metadata_offset(g, 0));
    const uint4 second = *reinterpret_cast<const uint4*>(piece + metadata_offset(g + 8, 0));
    metadata.x = __byte_perm(__byte_perm(first.x, first.y, bytes), __byte_perm(second.x, second.y, bytes), 0x5410);
    metadata.y = __byte_perm(__byte_perm(first.z, first.w, bytes), __byte_perm(second.z, second.w, bytes), 0x5410);
  }

  template <int STEP> DEVICE void multiply(float (&set)[TOKENS / 2], uint64_t tokens) const {
    ptx::wgmma_sp_registers<Element, TOKENS, STEP % 2>(set, values[STEP], tokens, STEP < 2 ? metadata.x : metadata.y);
  }
};
