// The launch: cluster after cluster, one thread at a time, until all have returned or nothing can go on.

inline void run_thread() {
  machine->entry(machine->parameters);
  Fiber& f = self();
  for (const Group& g : machine->warpgroups)
    if (!g.products.empty() && lane_of(g, f) >= 0 && lane_of(g, f) < g.size)
      fail(f, Kind::IN_FLIGHT, 0, "the thread returned, and a wgmma has not been waited for");
  if (--cta_of(f).live == 0 && !cta_of(f).copies.empty())
    fail(f, Kind::IN_FLIGHT, cta_of(f).copies[0].barrier,
         "the block returned, and a bulk copy into it has not been waited for");
  f.state = Fiber::DONE;
  setcontext(&machine->scheduler);
}

inline void reset_fiber(Fiber& f, int number, size_t slots) {
  f.state = Fiber::READY;
  f.cta = number / machine->threads;
  f.index = number % machine->threads;
  f.slot = uint16_t(number);
  f.site = {"nothing yet", 0, nullptr};
  f.clock = Clock(slots);
  f.advance();
  f.released.clear();
  f.acquired.clear();
  f.copies.clear();
  f.groups = 0;
  f.wgmma_fenced = false;
  f.registers = 0;
  f.steps = 0;
  getcontext(&f.context);
  f.context.uc_stack = {f.stack, 0, STACK_BYTES};
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_thread, 0);
}

inline void reset_groups(std::vector<Group>& groups, int size, int first_slot) {
  groups.clear();
  for (int cta = 0; cta < machine->cluster; ++cta)
    for (int first = 0; first < machine->threads; first += size, ++first_slot)
      groups.push_back(
          {cta * machine->threads + first, std::min(size, machine->threads - first), uint16_t(first_slot), {}, {}});
}

inline void reset_cta(Cta& cta, uint64_t block) {
  const uint64_t x = block % machine->grid[0], y = block / machine->grid[0] % machine->grid[1];
  cta.block[0] = x, cta.block[1] = y, cta.block[2] = block / machine->grid[0] / machine->grid[1];
  for (NamedBarrier& b : cta.named) b = NamedBarrier();
  cta.mbarriers.clear();
  cta.copies.clear();
  cta.live = machine->threads;
  std::memset(cta.dynamic.base, 0xfe, cta.dynamic.bytes);
  std::memset(cta.dynamic.cells, 0, cta.dynamic.bytes * sizeof(Cell));
}

inline void reset_cluster(uint64_t cluster) {
  const int threads = machine->threads * machine->cluster;
  machine->mbarrier_slots = machine->cluster * MBARRIERS;
  const size_t slots = threads + machine->mbarrier_slots + machine->cluster * ((machine->threads + 127) / 128);
  ++machine->cluster_serial;
  for (int i = 0; i < machine->cluster; ++i) reset_cta(machine->ctas[i], cluster * machine->cluster + i);
  for (int i = 0; i < threads; ++i) reset_fiber(machine->fibers[i], i, slots);
  reset_groups(machine->warps, 32, 0);
  reset_groups(machine->warpgroups, 128, threads + machine->mbarrier_slots);
  machine->cluster_barrier = NamedBarrier();
  if (machine->statics.base) std::memset(machine->statics.cells, 0, machine->statics.bytes * sizeof(Cell));
}

inline bool failed() { return machine->failure->kind != Kind::NONE; }

// "thread 3 is at line 12, __syncthreads" for everybody who is stuck, neighbours at the same line together.
inline std::string stuck_threads() {
  std::string all;
  auto same = [](const Fiber& a, const Fiber& b) {
    return a.state == b.state && a.cta == b.cta &&
           (a.state == Fiber::DONE || (a.site.line == b.site.line && a.waits_for == b.waits_for));
  };
  const auto& fibers = machine->fibers;
  for (size_t i = 0, end; i < fibers.size(); i = end) {
    for (end = i + 1; end < fibers.size() && same(fibers[i], fibers[end]);) ++end;
    const Fiber& f = fibers[i];
    all += text("; threads %d to %d of block (%u, %u, %u) ", f.index, fibers[end - 1].index, cta_of(f).block[0],
                cta_of(f).block[1], cta_of(f).block[2]);
    all += f.state == Fiber::DONE
               ? "returned"
               : text("are at line %d, %s, and wait for %s", f.site.line, f.site.instruction, f.waits_for.c_str());
  }
  return all.substr(2);
}

inline std::string owed(const Mbarrier& b) {
  return text("the mbarrier at 0x%x is in phase %u and still needs %u arrivals and %lld bytes", b.address, b.phase,
              b.pending, (long long)b.bytes);
}

// Nobody can go on. To blame is a wait for an mbarrier, or a warp that lacks threads which returned, or another
// barrier.
inline void note_deadlock() {
  for (Cta& cta : machine->ctas)
    for (auto& entry : cta.mbarriers)
      if (!entry.second.waiting.empty())
        return note_failure(machine->fibers[entry.second.waiting[0]], Kind::DEADLOCK, entry.first,
                            owed(entry.second) + "; " + stuck_threads());
  for (auto* groups : {&machine->warps, &machine->warpgroups})
    for (Group& group : *groups)
      for (Collective* c : group.pending)
        for (int lane = 0; lane < group.size; ++lane)
          if (c->mask[lane] && !c->arrived[lane] && member(group, lane).state == Fiber::DONE) {
            for (lane = 0; !c->arrived[lane];) ++lane;
            return note_failure(member(group, lane), Kind::DIVERGENCE, 0,
                                "some threads of its warp returned; " + stuck_threads());
          }
  for (const Fiber& f : machine->fibers)
    if (f.state == Fiber::BLOCKED) return note_failure(f, Kind::DEADLOCK, 0, stuck_threads());
}

inline Fiber* next_fiber(size_t& turn) {
  const size_t count = machine->fibers.size();
  if (machine->shuffled) turn = random_below(uint32_t(count));
  for (size_t i = 0; i < count; ++i) {
    Fiber& f = machine->fibers[(turn + i) % count];
    if (f.state == Fiber::READY) return turn = (turn + i) % count, &f;
  }
  return nullptr;
}

inline void run_cluster() {
  volatile size_t live = machine->fibers.size();  // volatile: a failure jumps back into this function
  size_t turn = 0;
  while (live) {
    if (machine->shuffled && random_below(16) == 0) land_something();
    machine->current = next_fiber(turn);
    if (!machine->current) {
      if (!land_something()) note_deadlock();
      if (failed()) return;
      continue;
    }
    swapcontext(&machine->scheduler, &machine->current->context);
    if (failed()) return;
    if (machine->current->state == Fiber::DONE) --live;
  }
}

inline void run_grid() {
  const uint64_t clusters = uint64_t(machine->grid[0]) * machine->grid[1] * machine->grid[2] / machine->cluster;
  const uint64_t first = machine->shuffled && clusters ? random_below(uint32_t(clusters)) : 0;
  for (uint64_t i = 0; i < clusters && !failed(); ++i) {
    reset_cluster((first + i) % clusters);
    run_cluster();
  }
}
