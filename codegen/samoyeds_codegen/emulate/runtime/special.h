// Special registers, and the few instructions that need nothing else.

extern "C" {
uint3 emulated_index(int which) {
  const Fiber& f = self();
  const uint32_t *b = machine->block, *g = machine->grid, *at = cta_of(f).block, x = f.index;
  if (which == 0) return {x % b[0], x / b[0] % b[1], x / (b[0] * b[1])};
  if (which == 1) return {at[0], at[1], at[2]};
  return which == 2 ? uint3{b[0], b[1], b[2]} : uint3{g[0], g[1], g[2]};
}

unsigned char* emulated_shared() { return reinterpret_cast<unsigned char*>(cta_of(self()).dynamic.base); }

uint32_t emulated_shared_address(const void* p, int line) {
  const Fiber& f = enter("shared_address", line);
  const Space& shared = cta_of(f).dynamic;
  // One past the end is an address too, as long as nothing is read there.
  if (p < shared.base || p > shared.base + shared.bytes)
    fail(f, Kind::OPERAND, uint64_t(p), "it is not in dynamic shared memory");
  return FIRST_SHARED_ADDRESS + (static_cast<const char*>(p) - shared.base);
}

uint32_t emulated_cluster_rank() { return self().cta; }

// setmaxnreg: the registers of all warps must fit the 65,536 of a multiprocessor.
void emulated_set_registers(int count, const char* name, int line) {
  Fiber& f = enter(name, line);
  if (count < 24 || count > 256 || count % 8)
    fail(f, Kind::OPERAND, 0, text("%d registers: 24 to 256, a multiple of 8", count));
  warpgroup_of();
  warp_collective(count, nullptr, [](Collective&) {});
  f.registers = count;
  int total = 0;
  for (const Fiber& other : machine->fibers) {
    if (other.cta != f.cta) continue;
    if (!other.registers) return;
    total += other.registers;
  }
  if (total > 65536) fail(f, Kind::OPERAND, 0, text("the block asks for %d registers, there are 65536", total));
}
}
