// Barriers of a block (bar.sync, bar.arrive) and of a cluster.

inline void open_barrier(NamedBarrier& barrier) {
  for (int i : barrier.waiting) {
    machine->fibers[i].clock.join(barrier.clock);
    wake(i);
  }
  barrier = NamedBarrier();
}

// One thread comes to a barrier of `threads`; whether it stays there is its own matter.
inline void arrive(NamedBarrier& barrier, Fiber& f, int threads, bool stays) {
  const int me = int(&f - machine->fibers.data());
  if (barrier.arrived.empty()) barrier.clock = Clock(f.clock.seen.size());
  barrier.expected = threads;
  barrier.arrived.push_back(me);
  barrier.clock.join(f.clock);
  f.advance();
  if (stays) barrier.waiting.push_back(me);
}

extern "C" void emulated_block_barrier(int id, int threads, int stays, const char* name, int line) {
  Fiber& f = enter(name, line);
  if (id < 0 || id > 15) fail(f, Kind::BARRIER, id, text("there is no named barrier %d", id));
  if (threads != machine->threads && (threads % 32 || threads <= 0))
    fail(f, Kind::BARRIER, id, text("%d threads are no whole warps", threads));
  if (threads > machine->threads)
    fail(f, Kind::BARRIER, id, text("the block has %d threads, not %d", machine->threads, threads));
  NamedBarrier& barrier = cta_of(f).named[id];
  if (!barrier.arrived.empty() && barrier.expected != threads)
    fail(f, Kind::BARRIER, id,
         text("it counts %d threads at barrier %d, others count %d", threads, id, barrier.expected));
  const int me = int(&f - machine->fibers.data());
  if (std::count(barrier.arrived.begin(), barrier.arrived.end(), me))
    fail(f, Kind::BARRIER, id, text("this thread arrives twice at barrier %d before it opens", id));
  arrive(barrier, f, threads, stays);
  if (int(barrier.arrived.size()) < threads) {
    if (stays) block(text("barrier %d, where %d threads are needed", id, threads));
    return;
  }
  open_barrier(barrier);
}

extern "C" void emulated_cluster_barrier(int line) {
  Fiber& f = enter("cluster_sync", line);
  NamedBarrier& barrier = machine->cluster_barrier;
  const int threads = machine->threads * machine->cluster;
  arrive(barrier, f, threads, true);
  if (int(barrier.arrived.size()) < threads) return block("the other threads of the cluster");
  open_barrier(barrier);
}
