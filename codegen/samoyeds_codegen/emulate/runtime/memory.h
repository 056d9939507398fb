// Loads and stores, checked byte by byte.

struct Place {
  Space* space;
  size_t offset;
  char* host() const { return space->base + offset; }
  uint64_t address() const { return space->shared() ? space->first_address + offset : offset; }
};

inline Space* find_space(const Fiber& who, const void* p) {
  Cta& cta = cta_of(who);
  if (cta.dynamic.holds(p)) return &cta.dynamic;
  if (machine->statics.holds(p)) return &machine->statics;
  auto& all = machine->global;
  auto after = std::upper_bound(all.begin(), all.end(), p, [](const void* x, const Space& s) { return x < s.base; });
  return after != all.begin() && (after - 1)->holds(p) ? &*(after - 1) : nullptr;
}

// An address in no space: named by the buffer that lies nearest, and by how much it misses that.
[[noreturn]] inline void fail_outside(const Fiber& who, const void* p) {
  const char* at = static_cast<const char*>(p);
  for (const Cta& other : machine->ctas)
    if (other.dynamic.holds(p))
      fail(who, Kind::OUT_OF_BOUNDS, 0, "it is shared memory of another block of the cluster");
  std::vector<const Space*> spaces{&cta_of(who).dynamic, &machine->statics};
  for (const Space& s : machine->global) spaces.push_back(&s);
  const Space* nearest = nullptr;
  ptrdiff_t least = 1 << 15;  // half the gap between buffers
  for (const Space* s : spaces) {
    const ptrdiff_t misses = at < s->base ? s->base - at : at - s->base - ptrdiff_t(s->bytes);
    if (s->base && misses < least) nearest = s, least = misses;
  }
  if (!nearest) fail(who, Kind::OUT_OF_BOUNDS, uint64_t(p), "it is in no buffer");
  const bool before = at < nearest->base;
  fail(who, Kind::OUT_OF_BOUNDS, (nearest->shared() ? nearest->first_address : 0) + (at - nearest->base),
       text("%td bytes %s %s of %zu bytes", least, before ? "before" : "past the end of", nearest->name.c_str(),
            nearest->bytes));
}

inline void check_alignment(const Fiber& who, uint64_t address, uint32_t alignment) {
  if (address % alignment) fail(who, Kind::MISALIGNED, address, text("it needs a multiple of %u", alignment));
}

inline void check_bounds(const Fiber& who, Place p, size_t bytes) {
  if (p.offset + bytes <= p.space->bytes) return;
  fail(who, Kind::OUT_OF_BOUNDS, p.address(),
       text("%zu bytes from byte %zu of %s, which has %zu", bytes, p.offset, p.space->name.c_str(), p.space->bytes));
}

inline Place place_of(const Fiber& who, const void* p, size_t bytes) {
  Space* space = find_space(who, p);
  if (!space) fail_outside(who, p);
  Place place{space, size_t(static_cast<const char*>(p) - space->base)};
  check_bounds(who, place, bytes);
  return place;
}

// A place in the dynamic shared memory of a block, by its 32-bit address.
inline Place shared_place(const Fiber& who, Cta& cta, uint32_t address, size_t bytes) {
  Place place{&cta.dynamic, size_t(address) - FIRST_SHARED_ADDRESS};
  if (address < FIRST_SHARED_ADDRESS || place.offset + bytes > cta.dynamic.bytes)
    fail(who, Kind::OUT_OF_BOUNDS, address,
         text("%zu bytes at 0x%x; shared memory is 0x%x to 0x%zx", bytes, address, FIRST_SHARED_ADDRESS,
              FIRST_SHARED_ADDRESS + cta.dynamic.bytes));
  return place;
}

inline std::string slot_name(uint16_t slot) {
  const int threads = machine->threads * machine->cluster;
  if (slot < threads)
    return text("thread %d of block %d of the cluster", slot % machine->threads, slot / machine->threads);
  if (slot < threads + machine->mbarrier_slots) return "a bulk copy";
  return text("a wgmma of warpgroup %d", slot - threads - machine->mbarrier_slots);
}

// Accesses of other clusters: only atomics and fences order them.
inline void check_other_clusters(const Fiber& who, Place p, size_t i, Cell& cell, const Clock& clock, bool write,
                                 bool atomic) {
  if (cell.cluster != machine->cluster_serial) {
    const bool ordered = clock.knows(cell.cluster, cell.write_slot, cell.write_epoch);
    if (cell.write_epoch && !ordered && !(atomic && cell.flags & Cell::ATOMIC))
      fail(who, Kind::RACE, p.address() + i, "another block wrote it, and nothing orders the two");
    for (int r = 0; r < cell.readers; ++r)
      if (!clock.knows(cell.cluster, cell.read_slot[r], cell.read_epoch[r])) cell.flags |= Cell::READ_BEFORE;
    cell.cluster = machine->cluster_serial;
    cell.write_epoch = cell.readers = 0;
  }
  if (write && cell.flags & Cell::READ_BEFORE)
    fail(who, Kind::RACE, p.address() + i, "another block reads it, and nothing orders the two");
}

inline void check_order(const Fiber& who, Place p, size_t i, const Cell& cell, const Agent& agent, const char* verb) {
  if (cell.flags & Cell::IN_FLIGHT)
    fail(who, Kind::IN_FLIGHT, p.address() + i,
         text("an asynchronous copy to this byte has not been waited for, and it is %s", verb));
  if (!cell.write_epoch) return;
  if (agent.clock.seen[cell.write_slot] < cell.write_epoch)
    fail(who, Kind::RACE, p.address() + i,
         text("%s by this thread, written by %s, and no barrier is between", verb, slot_name(cell.write_slot).c_str()));
  if (agent.async && !(cell.flags & Cell::ASYNC) && agent.clock.fenced[cell.write_slot] < cell.write_epoch)
    fail(who, Kind::FENCE, p.address() + i,
         text("%s through the async proxy, written by %s through the generic one, and no fence_proxy_async is between",
              verb, slot_name(cell.write_slot).c_str()));
}

inline void note_reader(Cell& cell, const Agent& agent) {
  int keep = 0;
  for (int r = 0; r < cell.readers; ++r) {  // those that happened before this read are covered by it
    if (agent.clock.seen[cell.read_slot[r]] >= cell.read_epoch[r]) continue;
    cell.read_slot[keep] = cell.read_slot[r];
    cell.read_epoch[keep++] = cell.read_epoch[r];
  }
  const int at = keep < Cell::READERS ? keep++ : random_below(Cell::READERS);
  cell.read_slot[at] = agent.slot;
  cell.read_epoch[at] = agent.epoch;
  cell.readers = keep;
}

inline void check_read(const Fiber& who, Place p, size_t bytes, const Agent& agent) {
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = p.space->cells[p.offset + i];
    check_other_clusters(who, p, i, cell, agent.clock, false, false);
    check_order(who, p, i, cell, agent, "read");
    if (!(cell.flags & Cell::INITIALISED))
      fail(who, Kind::UNINITIALISED, p.address() + i,
           text("byte %zu of %s was never written, or will be by a thread that no barrier makes come first",
                p.offset + i, p.space->name.c_str()));
    note_reader(cell, agent);
  }
}

bool is_pending_product(uint16_t slot, uint32_t epoch);  // wgmma.h

// Everything that must hold before `agent` may overwrite these bytes.
inline void check_write(const Fiber& who, Place p, size_t bytes, const Agent& agent, bool atomic = false) {
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = p.space->cells[p.offset + i];
    check_other_clusters(who, p, i, cell, agent.clock, true, atomic);
    if (cell.flags & Cell::MBARRIER) fail(who, Kind::BARRIER, p.address() + i, "an mbarrier lies there");
    if (!(atomic && cell.flags & Cell::ATOMIC)) check_order(who, p, i, cell, agent, "written");
    for (int r = 0; r < cell.readers; ++r)
      if (agent.clock.seen[cell.read_slot[r]] < cell.read_epoch[r]) {
        const bool pending = is_pending_product(cell.read_slot[r], cell.read_epoch[r]);
        fail(who, pending ? Kind::IN_FLIGHT : Kind::RACE, p.address() + i,
             text("written while %s %s", slot_name(cell.read_slot[r]).c_str(),
                  pending ? "still reads it: wgmma_wait is missing" : "reads it, and no barrier is between"));
      }
  }
}

inline void note_write(Place p, size_t bytes, uint16_t slot, uint32_t epoch, uint8_t flags) {
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = p.space->cells[p.offset + i];
    cell.write_slot = slot;
    cell.write_epoch = epoch;
    cell.readers = 0;
    cell.flags = Cell::INITIALISED | flags;
    cell.cluster = machine->cluster_serial;
  }
}

inline void mark_in_flight(Place p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = p.space->cells[p.offset + i];
    cell.flags |= Cell::IN_FLIGHT;
    cell.readers = 0;
  }
}

inline Agent as_thread(const Fiber& f, bool async = false) { return {f.slot, f.epoch(), f.clock, async}; }

inline void read_as_thread(const Fiber& f, Place p, size_t bytes) { check_read(f, p, bytes, as_thread(f)); }

inline void write_as_thread(const Fiber& f, Place p, size_t bytes, bool atomic = false) {
  check_write(f, p, bytes, as_thread(f), atomic);
  note_write(p, bytes, f.slot, f.epoch(), atomic ? Cell::ATOMIC : 0);
}
