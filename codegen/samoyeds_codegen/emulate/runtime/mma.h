// Matrix instructions of a warp: ldmatrix, mma.sp. Layouts: PTX ISA, "Matrix Fragments for sparse mma.m16n8k32".

constexpr uint32_t POISON = 0xfefefefeu;  // what the compiler fills variables with that have no value

inline void check_registers(const Fiber& f, const char* name, const uint32_t* registers, int count) {
  for (int i = 0; i < count; ++i)
    if (registers[i] == POISON) fail(f, Kind::UNINITIALISED, 0, text("register %s[%d] has no value", name, i));
}

inline float decode(int type, uint16_t bits) { return type ? __half2float({bits}) : __bfloat162float({bits}); }

struct LoadMatrix {
  uint32_t* registers;
  uint32_t address;
};

inline void load_matrix(Group& warp, Collective& c, int matrix, bool transposed) {
  uint16_t rows[8][8];
  for (int r = 0; r < 8; ++r) {
    const int lane = 8 * matrix + r;
    const Fiber& f = member(warp, lane);
    const uint32_t address = static_cast<LoadMatrix*>(c.operands[lane])->address;
    check_alignment(f, address, 16);
    const Place row = shared_place(f, cta_of(f), address, 16);
    read_as_thread(f, row, 16);
    std::memcpy(rows[r], row.host(), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4 * 2;
    const uint32_t low = transposed ? rows[q][g] : rows[g][q], high = transposed ? rows[q + 1][g] : rows[g][q + 1];
    static_cast<LoadMatrix*>(c.operands[lane])->registers[matrix] = low | high << 16;
  }
}

extern "C" void emulated_ldmatrix(uint32_t* registers, int count, uint32_t address, int transposed, const char* name,
                                  int line) {
  Group& warp = warp_of(enter(name, line));
  LoadMatrix mine{registers, address};
  warp_collective(count, &mine, [&](Collective& c) {
    for (int m = 0; m < count; ++m) load_matrix(warp, c, m, transposed);
  });
}

// Where the two values of each group of four columns go: `half` describes the 16 columns from `column` on of one row.
inline void expand(const Fiber& f, uint16_t half, const float* values, float* dense) {
  for (int j = 0; j < 4; ++j) {
    const int nibble = half >> (4 * j) & 15, first = nibble & 3, second = nibble >> 2;
    if (first >= second)
      fail(f, Kind::METADATA, 0,
           text("group %d of metadata 0x%04x: positions %d and %d do not ascend", j, half, first, second));
    dense[4 * j + first] = values[2 * j];
    dense[4 * j + second] = values[2 * j + 1];
  }
}

// One warp's 16 rows: compressed [16][16] to dense [16][32]; lanes 4g + 2*selector and the next have rows g and g + 8.
inline void expand_rows(const Group& warp, const uint32_t* metadata, int selector, const float (*a)[16],
                        float (*dense)[32]) {
  for (int g = 0; g < 8; ++g)
    for (int half = 0; half < 2; ++half) {
      const int lane = 4 * g + 2 * selector + half;
      const Fiber& f = member(warp, lane);
      check_registers(f, "metadata", &metadata[lane], 1);
      expand(f, metadata[lane] & 0xffff, &a[g][8 * half], &dense[g][16 * half]);
      expand(f, metadata[lane] >> 16, &a[g + 8][8 * half], &dense[g + 8][16 * half]);
    }
}

struct SparseMma {
  float* d;
  const uint32_t *a, *b;
  uint32_t metadata;
};

inline void sparse_mma(Group& warp, Collective& c, int type, int selector) {
  float a[16][16], b[32][8], dense[16][32] = {};
  uint32_t metadata[32];
  for (int lane = 0; lane < 32; ++lane) {
    const SparseMma& mine = *static_cast<SparseMma*>(c.operands[lane]);
    const Fiber& f = member(warp, lane);
    check_registers(f, "a", mine.a, 4);
    check_registers(f, "b", mine.b, 4);
    check_registers(f, "d", reinterpret_cast<const uint32_t*>(mine.d), 4);
    metadata[lane] = mine.metadata;
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 8; ++i) {
      a[g + i / 2 % 2 * 8][2 * q + i % 2 + i / 4 * 8] = decode(type, mine.a[i / 2] >> i % 2 * 16);
      b[2 * q + i % 2 + i / 2 * 8][g] = decode(type, mine.b[i / 2] >> i % 2 * 16);
    }
  }
  expand_rows(warp, metadata, selector, a, dense);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& sum = static_cast<SparseMma*>(c.operands[lane])->d[i];
      for (int k = 0; k < 32; ++k) sum += dense[row][k] * b[k][column];
    }
}

extern "C" void emulated_mma_sp(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int type,
                                int selector, int line) {
  Group& warp = warp_of(enter("mma_sp_m16n8k32", line));
  SparseMma mine{d, a, b, metadata};
  warp_collective(type << 1 | selector, &mine, [&](Collective& c) { sparse_mma(warp, c, type, selector); });
}
