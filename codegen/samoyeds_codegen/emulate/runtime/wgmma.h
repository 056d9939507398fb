// wgmma.mma_async.sp m64nNk32: operands are read and accumulators written when the product is waited for.

// How a descriptor places rows of 16-byte pieces (PTX ISA, "Shared Memory Matrix Layout", K-major).
struct Descriptor {
  uint32_t start, leading, stride, base_offset;
  int swizzle;  // address bits from 7 on that are folded into those from 4 on
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        swizzle((4 - int(bits >> 62)) % 4) {}
  uint32_t address(int row, int piece) const {
    if (!swizzle) return start + row / 8 * stride + piece * leading + row % 8 * 16;
    const uint32_t linear = start + row / 8 * stride + row % 8 * (16 << swizzle) + piece * 16;
    return linear ^ ((linear >> 7 & ((1u << swizzle) - 1)) << 4);
  }
};

struct WgmmaOperands {
  float* d;
  const uint32_t* registers;  // four of them are a; null: the descriptor is
  uint64_t a, b;
  uint32_t metadata;
};

struct Matmul {
  int type, columns, selector, group;  // group: of the commit; -1: not yet
  uint32_t epoch;                      // of the warpgroup's slot, for the bytes that it reads
  Descriptor a, b;
  float* d[128];
  const uint32_t* registers[128];
  uint32_t metadata[128];
};

bool is_pending_product(uint16_t slot, uint32_t epoch) {
  for (const Group& g : machine->warpgroups)
    for (const Matmul* m : g.products)
      if (g.slot == slot && m->epoch == epoch) return true;
  return false;
}

inline Group& warpgroup_of() {
  Fiber& f = self();
  Group& group = machine->warpgroups[f.cta * ((machine->threads + 127) / 128) + f.index / 128];
  if (group.size < 128) fail(f, Kind::DIVERGENCE, 0, "the block ends in a warpgroup that is not whole");
  return group;
}

// What all four warps know: a barrier that one lane of each passed counts, one that a whole warp missed does not.
inline Clock known_to_all_warps(const Group& group) {
  Clock all;
  for (int warp = 0; warp < 4; ++warp) {
    Clock known = member(group, 32 * warp).clock;
    for (int lane = 1; lane < 32; ++lane) known.join(member(group, 32 * warp + lane).clock);
    if (warp)
      all.meet(known);
    else
      all = known;
  }
  return all;
}

inline void check_operand(const Group& group, const Descriptor& x, int rows, int pieces, const Agent& agent,
                          const char* name) {
  const Fiber& f = self();
  const uint32_t row_of_atom = x.swizzle ? x.start >> 7 & ((1u << x.swizzle) - 1) : 0;
  if (row_of_atom != x.base_offset)
    fail(f, Kind::OPERAND, x.start,
         text("descriptor %s: the start address is in row %u of its swizzle atom, its base offset says %u", name,
              row_of_atom, x.base_offset));
  for (int row = 0; row < rows; ++row)
    for (int piece = 0; piece < pieces; ++piece)
      check_read(f, shared_place(f, cta_of(f), x.address(row, piece), 16), 16, agent);
}

inline bool in_flight(const Fiber& f, const float* d) { return *const_cast<Fiber&>(f).touched_at(d) == Fiber::OWNED; }

// Registers of a product must be fenced after any other access; those of one under way belong to it.
inline void take_registers(Fiber& f, const char* name, const void* first, int count) {
  const auto* registers = static_cast<const uint32_t*>(first);
  if (!f.on_stack(first)) fail(f, Kind::OPERAND, uint64_t(first), text("%ss must be local variables", name));
  if (!f.wgmma_fenced) fail(f, Kind::FENCE, 0, "no wgmma_fence comes before it");
  for (int i = 0; i < count; ++i) {
    uint32_t& touched = *f.touched_at(registers + i);
    if (touched != Fiber::OWNED && touched > f.fence_tick)
      fail(f, Kind::FENCE, 0, text("%s %d was read or written after the last wgmma_fence", name, i));
  }
}

inline void mark_registers(Group& group, const Matmul& m, uint32_t mark) {
  for (int i = 0; i < 128; ++i) {
    std::fill_n(member(group, i).touched_at(m.d[i]), m.columns / 2, mark);
    if (m.registers[i]) std::fill_n(member(group, i).touched_at(m.registers[i]), 4, mark);
  }
}

inline void check_uniform(const Group& group, const Collective& c) {
  const auto& first = *static_cast<WgmmaOperands*>(c.operands[0]);
  for (int i = 1; i < 128; ++i) {
    const auto& mine = *static_cast<WgmmaOperands*>(c.operands[i]);
    if (mine.a != first.a || mine.b != first.b)
      fail(member(group, i), Kind::OPERAND, 0,
           "its descriptors differ from those of the first thread of its warpgroup");
  }
}

inline void start_product(Group& group, Collective& c, int type, int columns, int selector) {
  check_uniform(group, c);
  const auto& first = *static_cast<WgmmaOperands*>(c.operands[0]);
  for (const Matmul* other : group.products)
    if (other->d[0] == first.d && other->columns != columns)
      fail(self(), Kind::FENCE, 0, "a product of another shape is under way in the same accumulators");
  auto* m = new Matmul{
      type, columns, selector, -1, uint32_t(group.committed + 1), Descriptor(first.a), Descriptor(first.b), {}, {}};
  const Clock known = known_to_all_warps(group);
  const Agent agent{group.slot, m->epoch, known, true};
  if (!first.registers) check_operand(group, m->a, 64, 2, agent, "a");
  check_operand(group, m->b, columns, 4, agent, "b");
  for (int i = 0; i < 128; ++i) {
    const auto& mine = *static_cast<WgmmaOperands*>(c.operands[i]);
    Fiber& f = member(group, i);
    m->d[i] = mine.d;
    m->registers[i] = mine.registers;
    m->metadata[i] = mine.metadata;
    take_registers(f, "accumulator", mine.d, columns / 2);
    if (mine.registers) take_registers(f, "register of a", mine.registers, 4);
    if (mine.registers) check_registers(f, "a", mine.registers, 4);
    if (!in_flight(f, mine.d)) check_registers(f, "d", reinterpret_cast<const uint32_t*>(mine.d), columns / 2);
  }
  mark_registers(group, *m, Fiber::OWNED);
  group.products.push_back(m);
}

inline void multiply_with(WgmmaOperands mine, int type, int columns, int selector) {
  Group& group = warpgroup_of();
  collective(group, full_mask(group), uint64_t(columns) << 3 | bool(mine.registers) << 2 | type << 1 | selector, &mine,
             [&](Collective& c) { start_product(group, c, type, columns, selector); });
}

extern "C" void emulated_wgmma_sp(float* d, uint64_t a, uint64_t b, uint32_t metadata, int type, int columns,
                                  int selector, int line) {
  enter("wgmma_sp", line);
  multiply_with({d, nullptr, a, b, metadata}, type, columns, selector);
}

extern "C" void emulated_wgmma_sp_registers(float* d, const uint32_t* a, uint64_t b, uint32_t metadata, int type,
                                            int columns, int selector, int line) {
  enter("wgmma_sp_registers", line);
  multiply_with({d, a, 0, b, metadata}, type, columns, selector);
}

inline float element(const Cta& cta, const Descriptor& x, int type, int row, int k) {
  const uint32_t address = x.address(row, k / 8) + k % 8 * 2;
  uint16_t bits;
  std::memcpy(&bits, cta.dynamic.base + (address - FIRST_SHARED_ADDRESS), 2);
  return decode(type, bits);
}

// The kept values of a warp's rows: PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", which hold kept ones.
inline void kept_values(const Group& group, const Matmul& m, int warp, float (&a)[16][16]) {
  const Cta& cta = cta_of(member(group, 0));
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) {
      const int lane = row % 8 * 4 + k % 8 / 2, held = row / 8 + k / 8 * 2;
      const uint32_t* mine = m.registers[32 * warp + lane];
      a[row][k] = mine ? decode(m.type, mine[held] >> k % 2 * 16) : element(cta, m.a, m.type, 16 * warp + row, k);
    }
}

inline void multiply_warp(Group& group, const Matmul& m, int warp, const std::vector<float>& b) {
  float a[16][16], dense[16][32] = {};
  kept_values(group, m, warp, a);
  const Group lanes{group.first + 32 * warp, 32, 0, {}, {}};
  expand_rows(lanes, &m.metadata[32 * warp], m.selector, a, dense);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < m.columns / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float& sum = m.d[32 * warp + lane][i];
      for (int k = 0; k < 32; ++k) sum += dense[row][k] * b[column * 32 + k];
    }
}

// Does the oldest product, and gives its registers back unless a younger one has them.
inline void finish_product(Group& group) {
  const std::unique_ptr<Matmul> m(group.products.front());
  group.products.pop_front();
  std::vector<float> b(m->columns * 32);
  for (int n = 0; n < m->columns; ++n)
    for (int k = 0; k < 32; ++k) b[n * 32 + k] = element(cta_of(self()), m->b, m->type, n, k);
  for (int warp = 0; warp < 4; ++warp) multiply_warp(group, *m, warp, b);
  mark_registers(group, *m, 0);
  for (const Matmul* other : group.products) mark_registers(group, *other, Fiber::OWNED);
}

extern "C" void emulated_wgmma_fence(int line) {
  Fiber& f = enter("wgmma_fence", line);
  warp_collective(0, nullptr, [](Collective&) {});
  f.fence_tick = f.tick;
  f.wgmma_fenced = true;
}

extern "C" void emulated_wgmma_commit(int line) {
  enter("wgmma_commit", line);
  Group& group = warpgroup_of();
  collective(group, full_mask(group), 0, nullptr, [&](Collective&) {
    for (Matmul* m : group.products)
      if (m->group < 0) m->group = group.committed;
    ++group.committed;
  });
}

extern "C" void emulated_wgmma_wait(int pending, int line) {
  enter("wgmma_wait", line);
  Group& group = warpgroup_of();
  collective(group, full_mask(group), pending, nullptr, [&](Collective&) {
    const int finished = group.committed - pending;
    while (!group.products.empty() && group.products.front()->group >= 0 && group.products.front()->group < finished)
      finish_product(group);
    for (int i = 0; i < 128 && finished > 0; ++i) {
      uint32_t& seen = member(group, i).clock.seen[group.slot];
      seen = std::max(seen, uint32_t(finished));
    }
  });
}
