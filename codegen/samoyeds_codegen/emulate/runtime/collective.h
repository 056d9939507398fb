// Instructions that a warp or a warpgroup executes together: the last thread to come executes it for all.

inline Group& warp_of(const Fiber& f) { return machine->warps[f.cta * ((machine->threads + 31) / 32) + f.index / 32]; }

inline int lane_of(const Group& group, const Fiber& f) { return int(&f - machine->fibers.data()) - group.first; }

inline Fiber& member(const Group& group, int lane) { return machine->fibers[group.first + lane]; }

inline std::bitset<128> full_mask(const Group& group) { return ~std::bitset<128>() >> (128 - group.size); }

// The instruction that some of these threads already wait at.
inline Collective* find_pending(Group& group, const Fiber& f, const Collective& mine) {
  for (Collective* c : group.pending) {
    if ((c->mask & mine.mask).none()) continue;
    if (std::strcmp(c->name, mine.name) || c->line != mine.line)
      fail(f, Kind::DIVERGENCE, 0, text("other threads of its warp execute %s at line %d", c->name, c->line));
    if (c->mask != mine.mask || c->immediates != mine.immediates)
      fail(f, Kind::DIVERGENCE, 0, "other threads of its warp execute it with another mask or other immediates");
    return c;
  }
  return nullptr;
}

// `execute(collective)` runs once, with the operands of every lane in its mask; then all of them go on.
template <class F>
void collective(Group& group, std::bitset<128> mask, uint64_t immediates, void* operands, F execute) {
  Fiber& f = self();
  const int lane = lane_of(group, f);
  Collective mine{f.site.instruction, immediates, f.site.line, mask, {}, {}};
  if (!mask[lane]) fail(f, Kind::DIVERGENCE, 0, "the mask does not have the thread that executes it");
  Collective* c = find_pending(group, f, mine);
  if (!c) group.pending.push_back(c = &mine);
  c->operands[lane] = operands;
  c->arrived[lane] = true;
  if (c->arrived != mask) return block("the rest of its warp or warpgroup");
  execute(*c);
  group.pending.erase(std::find(group.pending.begin(), group.pending.end(), c));
  for (int i = 0; i < group.size; ++i)
    if (mask[i] && i != lane) wake(group.first + i);
}

template <class F>
void warp_collective(uint64_t immediates, void* operands, F execute) {
  Group& warp = warp_of(self());
  if (warp.size < 32) fail(self(), Kind::DIVERGENCE, 0, "the block ends in a warp that is not whole");
  collective(warp, full_mask(warp), immediates, operands, execute);
}

extern "C" void emulated_warp_barrier(uint32_t mask, int line) {
  enter("__syncwarp", line);
  Group& warp = warp_of(self());
  // The default mask means the threads that there are.
  const auto threads = std::bitset<128>(mask) & full_mask(warp);
  collective(warp, threads, 0, nullptr, [&](Collective& c) {
    Clock all = self().clock;
    for (int i = 0; i < warp.size; ++i)
      if (c.mask[i]) all.join(member(warp, i).clock);
    for (int i = 0; i < warp.size; ++i)
      if (c.mask[i]) member(warp, i).clock = all, member(warp, i).advance();
  });
}

struct Shuffle {
  uint64_t value, result;
  int argument;
};

// Modes: 0 a lane, 1 up, 2 down, 3 xor, as in PTX shfl.sync with segments of `width` lanes.
inline int shuffle_source(int mode, int lane, int argument, int width) {
  const int first = lane / width * width;
  int from = argument % width + first;
  if (mode == 1) from = lane - argument < first ? lane : lane - argument;
  if (mode == 2) from = lane + argument >= first + width ? lane : lane + argument;
  if (mode == 3) from = (lane ^ argument) >= first + width ? lane : lane ^ argument;
  return from;
}

extern "C" uint64_t emulated_shuffle(uint32_t mask, uint64_t value, int mode, int argument, int width, int line) {
  Fiber& f = enter("shfl.sync", line);
  Group& warp = warp_of(f);
  Shuffle mine{value, 0, argument};
  collective(warp, mask, mode << 8 | width, &mine, [&](Collective& c) {
    for (int lane = 0; lane < warp.size; ++lane) {
      if (!c.mask[lane]) continue;
      Shuffle& to = *static_cast<Shuffle*>(c.operands[lane]);
      const int from = shuffle_source(mode, lane, to.argument, width);
      if (!c.mask[from])
        fail(member(warp, lane), Kind::DIVERGENCE, 0, text("it reads lane %d, which is not in the mask", from));
      to.result = static_cast<Shuffle*>(c.operands[from])->value;
    }
  });
  return mine.result;
}

extern "C" uint32_t emulated_vote(uint32_t mask, int predicate, int line) {
  Fiber& f = enter("vote.sync", line);
  Group& warp = warp_of(f);
  Shuffle mine{predicate != 0, 0, 0};
  collective(warp, mask, 0, &mine, [&](Collective& c) {
    uint64_t votes = 0;
    for (int i = 0; i < warp.size; ++i)
      if (c.mask[i]) votes |= static_cast<Shuffle*>(c.operands[i])->value << i;
    for (int i = 0; i < warp.size; ++i)
      if (c.mask[i]) static_cast<Shuffle*>(c.operands[i])->result = votes;
  });
  return uint32_t(mine.result);
}
