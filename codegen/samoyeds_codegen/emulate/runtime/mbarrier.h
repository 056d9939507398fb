// mbarrier objects: phases, arrivals and bytes that asynchronous copies still owe (PTX ISA, "Parallel
// Synchronization").

inline void check_barrier_order(const Fiber& f, const Mbarrier& b, bool needs_fence) {
  if (f.clock.seen[b.init_slot] < b.init_epoch)
    fail(f, Kind::RACE, b.address, "it uses an mbarrier, and nothing orders this after mbarrier_init");
  if (needs_fence && !b.fenced && f.clock.fenced[b.init_slot] < b.init_epoch)
    fail(f, Kind::FENCE, b.address, "the init of this mbarrier was not followed by fence_barrier_init");
}

inline Mbarrier& find_mbarrier(const Fiber& f, int cta, uint32_t address, bool needs_fence) {
  check_alignment(f, address, 8);
  shared_place(f, machine->ctas[cta], address, 8);
  auto found = machine->ctas[cta].mbarriers.find(address);
  if (found == machine->ctas[cta].mbarriers.end()) fail(f, Kind::BARRIER, address, "no mbarrier was initialised there");
  check_barrier_order(f, found->second, needs_fence || cta != f.cta);
  return found->second;
}

extern "C" void emulated_mbarrier_init(uint32_t address, uint32_t count, int line) {
  Fiber& f = enter("mbarrier_init", line);
  Cta& cta = cta_of(f);
  check_alignment(f, address, 8);
  const Place place = shared_place(f, cta, address, 8);
  if (!count || count >= 1u << 20) fail(f, Kind::BARRIER, address, text("an arrival count of %u", count));
  if (cta.mbarriers.count(address)) fail(f, Kind::BARRIER, address, "this mbarrier is initialised already");
  if (int(cta.mbarriers.size()) == MBARRIERS)
    fail(f, Kind::BARRIER, address, text("the emulator has %d mbarriers for a block", MBARRIERS));
  write_as_thread(f, place, 8);
  for (int i = 0; i < 8; ++i) place.space->cells[place.offset + i].flags |= Cell::MBARRIER;
  const size_t slots = f.clock.seen.size();
  const uint16_t slot = machine->threads * machine->cluster + f.cta * MBARRIERS + cta.mbarriers.size();
  cta.mbarriers[address] = {address, count,        count,        0, 0, slot, f.slot, f.epoch(),
                            false,   Clock(slots), Clock(slots), {}};
}

extern "C" void emulated_fence_barrier_init(int line) {
  Fiber& f = enter("fence_barrier_init", line);
  for (auto& entry : cta_of(f).mbarriers)
    if (entry.second.init_slot == f.slot) entry.second.fenced = true;
}

// Opens the phase once all have arrived and all bytes are there.
inline void complete_phase(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.arriving.seen[b.slot] = std::max(b.arriving.seen[b.slot], ++b.phase);
  b.completed.join(b.arriving);
  b.pending = b.count;
  for (int i : b.waiting) wake(i);
  b.waiting.clear();
}

inline void arrive(const Fiber& f, Mbarrier& b, const Clock& release) {
  if (!b.pending) fail(f, Kind::BARRIER, b.address, text("an arrival more than its count of %u in one phase", b.count));
  --b.pending;
  b.arriving.join(release);
  complete_phase(b);
}

// `expected`: bytes that bulk copies will bring in this phase; cta: -1 is the thread's own.
extern "C" void emulated_mbarrier_arrive(uint32_t address, int cta, uint32_t expected, const char* name, int line) {
  Fiber& f = enter(name, line);
  if (cta >= machine->cluster) fail(f, Kind::OPERAND, address, text("the cluster has no block %d", cta));
  if (cta >= 0 && !machine->ctas[cta].live)
    fail(f, Kind::BARRIER, address, text("block %d of the cluster has exited", cta));
  Mbarrier& b = find_mbarrier(f, cta < 0 ? f.cta : cta, address, false);
  b.bytes += expected;
  arrive(f, b, f.clock);
  f.advance();
}

extern "C" void emulated_mbarrier_wait(uint32_t address, uint32_t parity, int line) {
  Fiber& f = enter("mbarrier_wait", line);
  if (parity > 1) fail(f, Kind::OPERAND, address, text("a parity of %u", parity));
  Mbarrier& b = find_mbarrier(f, f.cta, address, false);
  while ((b.phase & 1) == parity) {  // the phase of that parity is the current one, so it is not complete
    b.waiting.push_back(int(&f - machine->fibers.data()));
    block(text("phase %u of the mbarrier at 0x%x", b.phase, address));
  }
  f.clock.join(b.completed);
}
