// Atomic operations and __threadfence. As in the memory model of C++ and PTX: what a thread knew at its last fence
// before an atomic is known to a thread after its next fence after an atomic on the same address.

// Before the operation itself, which the kernel's side does.
extern "C" void emulated_atomic(const void* p, unsigned bytes, int line) {
  Fiber& f = enter("atomic", line);
  const Place place = place_of(f, p, bytes);
  check_alignment(f, place.address(), bytes);
  for (size_t i = 0; i < bytes; ++i)
    if (!(place.space->cells[place.offset + i].flags & Cell::INITIALISED))
      fail(f, Kind::UNINITIALISED, place.address() + i, "it was never written");
  write_as_thread(f, place, bytes, true);
  History& published = machine->published[p];
  join(f.acquired, published);
  join(published, f.released);
}

extern "C" void emulated_threadfence(int line) {
  Fiber& f = enter("__threadfence", line);
  const uint32_t here = machine->cluster_serial;
  if (f.acquired.count(here)) join(f.clock.seen, *f.acquired[here]);
  f.acquired.erase(here);
  join(f.clock.others, f.acquired);
  f.acquired.clear();
  f.released = f.clock.others;
  f.released[here] = std::make_shared<Stamps>(f.clock.seen);
  f.advance();
}
