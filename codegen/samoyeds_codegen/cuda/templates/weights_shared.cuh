// A warpgroup's weights of a block of columns, in shared memory, where copies put them; wgmma reads them there.
struct Weights {
  uint64_t descriptor;
  uint2 metadata;
  int slab, lane;

  DEVICE Weights(const Arguments&, const Tile&, int, int slab, int lane) : slab(slab), lane(lane) {}

  DEVICE void go_on(int) {}

  // Core matrices without a swizzle (PTX ISA, "Matrix descriptor"): 128 bytes to the next kept values of eight rows,
  // 256 to the next eight rows.
  DEVICE void take(const unsigned char* piece) {
    const uint32_t start = ptx::shared_address(piece) >> 4 & 0x3fff;
    metadata = metadata_of(piece, slab, lane);
    descriptor = uint64_t(start) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
  }

  template <int STEP> DEVICE void multiply(float (&set)[TOKENS / 2], uint64_t tokens) const {
    ptx::wgmma_sp<Element, TOKENS, STEP % 2>(set, descriptor + (value_offset(0, 0, STEP) >> 4), tokens,
                                             STEP < 2 ? metadata.x : metadata.y);
  }
};
