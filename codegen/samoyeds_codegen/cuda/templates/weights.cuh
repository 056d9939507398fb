// Packed weights, as checkpoints hold them: rows of kept values, of metadata, and of choices of sub-rows.
struct Matrix {
  const Element* values;
  const uint16_t* metadata;
  const uint8_t* selection;
  int first_block;
};

DEVICE Matrix matrix_of(const Arguments& a, int64_t expert, bool up) {
  if (GATED && up)
    return {a.up_values + expert * a.up_values_expert, a.up_metadata + expert * a.up_metadata_expert,
            a.up_selection + expert * a.up_selection_expert, a.up_first_block};
  return {a.values + expert * a.values_expert, a.metadata + expert * a.metadata_expert,
          a.selection + expert * a.selection_expert, 0};
}

// The stored row of a row of a row tile. With gates, rows 0 to 7 of a slab of 16 are gates and rows 8 to 15 the ups of
// the same features, so one thread holds both. Rows beyond the last one repeat it; nobody reads what becomes of them.
DEVICE int stored_row(const Arguments& a, int row_tile, int row) {
  const int slab = row_tile * 4 + row / 16, stored = GATED ? slab * 8 + row % 8 : slab * 16 + row % 16;
  return stored < a.rows ? stored : a.rows - 1;
}

// 128 threads copy pieces of 64 rows and 128 columns. Eight lanes have eight rows, so they fill 128 bytes in a row;
// the four chunks of a warp are 64 bytes of each row. What is beyond the last column is zero, with metadata of others.
// Values that are wanted IN_REGISTERS only come near, halves of a row at a time; their metadata is copied.
struct WeightRows {
  static constexpr int COPIED = WEIGHTS_SHARED ? ROW_TILES / CLUSTER : ROW_TILES;  // others send the others
  Matrix matrix;
  int rows[COPIED][4];  // where the values of a row begin; its metadata begins at an eighth of that
  int row, chunk, width;

  DEVICE WeightRows(const Arguments& a, const Tile& tile, int first_row_tile, int thread)
      : row(thread / 64 * 8 + thread % 8), chunk(thread / 8 % 8), width(a.width) {
    matrix = matrix_of(a, tile.expert, row >= 8);
#pragma unroll
    for (int t = 0; t < COPIED; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[t][i] = stored_row(a, first_row_tile + t, row + 16 * i) * (width / 2);
  }

  DEVICE void copy(uint32_t to, int block) const {
    const int column = block * 64 + chunk * 8, last = width / 32 - 1;
    const int pair = block * 4 + chunk < last ? block * 4 + chunk : last;
    const bool exists = column < width / 2;
#pragma unroll
    for (int t = 0; t < COPIED; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t piece = to + t * PIECE_BYTES;
        const Element* from = matrix.values + (rows[t][i] + (exists ? column : 0));
        if constexpr (!IN_REGISTERS)
          ptx::cp_async<16>(piece + value_offset(row + 16 * i, chunk % 2, chunk / 2), from, exists);
        else if (exists && chunk % 4 == 0)
          ptx::prefetch(from);
        const uint16_t* words = matrix.metadata + (rows[t][i] / 8 + 2 * pair);
        if (chunk < 4) ptx::cp_async<4>(piece + VALUE_BYTES + metadata_offset(row + 16 * i, 2 * chunk), words, true);
      }
  }
};

// A lane's metadata of a slab: a word for steps 0 and 1, another one for steps 2 and 3.
DEVICE uint2 metadata_of(const unsigned char* piece, int slab, int lane) {
  const auto half = [=](int row, int sixteen) {
    const int offset = VALUE_BYTES + metadata_offset(slab * 16 + row, sixteen);
    return uint32_t(*reinterpret_cast<const uint16_t*>(piece + offset));
  };
  const int g = lane / 4, q = lane % 4;
  return make_uint2(half(g, q) | half(g + 8, q) << 16, half(g, 4 + q) | half(g + 8, 4 + q) << 16);
}
