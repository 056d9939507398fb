// Asynchronous copies. They land as late as they may; until then nobody may touch the bytes they go to.

inline const char* check_source(const Fiber& f, const void* source, uint32_t bytes, uint32_t alignment) {
  check_alignment(f, uint64_t(source), alignment);
  const Place from = place_of(f, source, bytes);
  if (from.space->shared()) fail(f, Kind::OPERAND, from.address(), "the source of a copy must be global memory");
  read_as_thread(f, from, bytes);
  return from.host();
}

extern "C" void emulated_cp_async(uint32_t target, const void* source, uint32_t bytes, int valid, int line) {
  Fiber& f = enter("cp_async", line);
  check_alignment(f, target, bytes);
  const Place to = shared_place(f, cta_of(f), target, bytes);
  const char* from = valid ? check_source(f, source, bytes, bytes) : nullptr;
  check_write(f, to, bytes, as_thread(f));
  mark_in_flight(to, bytes);
  f.copies.push_back({to.space, to.offset, from, bytes, valid != 0, -1, 0, Clock(), false});
}

extern "C" void emulated_cp_async_commit(int line) {
  Fiber& f = enter("cp_async_commit", line);
  for (Copy& c : f.copies)
    if (c.group < 0 && !c.arrival) c.group = f.groups;
  ++f.groups;
}

extern "C" void emulated_cp_async_mbarrier_arrive(uint32_t address, int line) {
  Fiber& f = enter("cp_async_mbarrier_arrive", line);
  find_mbarrier(f, f.cta, address, false);
  f.copies.push_back({nullptr, 0, nullptr, 0, false, -1, address, f.clock, true});
  f.advance();
}

// The oldest copy (or arrival) of a thread. What it wrote is as old as `epoch`.
inline void land_one(Fiber& f, uint32_t epoch) {
  const Copy c = std::move(f.copies.front());
  f.copies.pop_front();
  if (c.arrival) return arrive(f, find_mbarrier(f, f.cta, c.barrier, false), c.release);
  char* to = c.space->base + c.offset;
  if (c.valid)
    std::memcpy(to, c.source, c.bytes);
  else
    std::memset(to, 0, c.bytes);
  note_write({c.space, c.offset}, c.bytes, f.slot, epoch, 0);
}

// Wait until at most `pending` committed groups are under way. Copies of a thread land in the order of issue.
extern "C" void emulated_cp_async_wait(int pending, int line) {
  Fiber& f = enter("cp_async_wait", line);
  size_t last = 0;
  for (size_t i = 0; i < f.copies.size(); ++i)
    if (!f.copies[i].arrival && f.copies[i].group >= 0 && f.copies[i].group < f.groups - pending) last = i + 1;
  while (last--) land_one(f, f.epoch());
}

// What mbarriers wait for: all copies of a thread that come before its first arrival.
inline bool land_until_arrival(Fiber& f) {
  auto arrival = std::find_if(f.copies.begin(), f.copies.end(), [](const Copy& c) { return c.arrival; });
  if (arrival == f.copies.end()) return false;
  const uint32_t epoch = arrival->release.seen[f.slot];
  for (size_t n = arrival - f.copies.begin() + 1; n--;) land_one(f, epoch);
  return true;
}

inline void start_bulk(const Fiber& f, int cta, uint32_t target, const char* from, uint32_t bytes, uint32_t barrier) {
  find_mbarrier(f, cta, barrier, true);
  const Place to = shared_place(f, machine->ctas[cta], target, bytes);
  if (!machine->ctas[cta].live) fail(f, Kind::BARRIER, target, text("block %d of the cluster has exited", cta));
  check_write(f, to, bytes, as_thread(f, true));
  mark_in_flight(to, bytes);
  machine->ctas[cta].copies.push_back({to.space, to.offset, from, bytes, barrier});
}

// `mask`: the blocks of the cluster that get the bytes, at the same address; 0: the thread's own alone.
extern "C" void emulated_bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier, uint32_t mask,
                                   const char* name, int line) {
  Fiber& f = enter(name, line);
  if (!bytes || bytes % 16) fail(f, Kind::MISALIGNED, target, text("%u bytes are no multiple of 16", bytes));
  check_alignment(f, target, 16);
  const char* from = check_source(f, source, bytes, 16);
  if (mask >> machine->cluster)
    fail(f, Kind::OPERAND, target, text("the mask 0x%x has blocks outside the cluster", mask));
  for (int cta = 0; cta < machine->cluster; ++cta)
    if (mask ? mask >> cta & 1 : cta == f.cta) start_bulk(f, cta, target, from, bytes, barrier);
}

// From shared memory to that of another block of the cluster, whose mbarrier gets the bytes. The source is read until
// that phase is over.
extern "C" void emulated_bulk_copy_peer(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier, int cta,
                                        int line) {
  Fiber& f = enter("bulk_copy_peer", line);
  if (!bytes || bytes % 16) fail(f, Kind::MISALIGNED, target, text("%u bytes are no multiple of 16", bytes));
  check_alignment(f, target, 16);
  check_alignment(f, source, 16);
  if (cta < 0 || cta >= machine->cluster || cta == f.cta)
    fail(f, Kind::OPERAND, target, text("block %d is no other block of the cluster", cta));
  const Place from = shared_place(f, cta_of(f), source, bytes);
  const Mbarrier& b = find_mbarrier(f, cta, barrier, true);
  check_read(f, from, bytes, {b.slot, b.phase + 1, f.clock, true});
  start_bulk(f, cta, target, from.host(), bytes, barrier);
}

inline void land_bulk(Cta& cta, size_t which) {
  const BulkCopy c = cta.copies[which];
  cta.copies.erase(cta.copies.begin() + which);
  Mbarrier& b = cta.mbarriers.at(c.barrier);
  std::memcpy(c.space->base + c.offset, c.source, c.bytes);
  note_write({c.space, c.offset}, c.bytes, b.slot, b.phase + 1, Cell::ASYNC);
  b.bytes -= c.bytes;
  complete_phase(b);
}

// Lands something; false: nothing is under way that anybody could wait for.
inline bool land_something() {
  for (Cta& cta : machine->ctas)
    if (!cta.copies.empty()) return land_bulk(cta, machine->shuffled ? random_below(cta.copies.size()) : 0), true;
  for (Fiber& f : machine->fibers)
    if (land_until_arrival(f)) return true;
  return false;
}

extern "C" void emulated_fence_proxy_async(int line) {
  Fiber& f = enter("fence_proxy_async", line);
  f.clock.fenced = f.clock.seen;
}
