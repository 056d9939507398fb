// Vector clocks. Every thread of a cluster has a slot, and so has everything that runs beside the threads: an mbarrier
// (for the bulk copies it counts) and a warpgroup (for the matrix products it has in flight).

using Stamps = std::vector<uint32_t>;

inline void join(Stamps& into, const Stamps& from) {
  uint32_t* a = into.data();
  const uint32_t* b = from.data();
  for (size_t i = 0; i < into.size(); ++i) a[i] = std::max(a[i], b[i]);
}

inline void meet(Stamps& into, const Stamps& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::min(into[i], from[i]);
}

// What happened before in clusters that ran earlier, by their serial number.
using History = std::map<uint32_t, std::shared_ptr<const Stamps>>;

inline void join(History& into, const History& from) {
  for (const auto& [cluster, stamps] : from) {
    auto& mine = into[cluster];
    if (!mine) mine = stamps;
    if (mine == stamps) continue;
    auto both = std::make_shared<Stamps>(*mine);
    join(*both, *stamps);
    mine = both;
  }
}

// `seen`: what happened before. `fenced`: the part of it that a fence.proxy.async has shown to the async proxy.
// `others`: what happened before in other clusters, which only atomics between two fences can tell.
struct Clock {
  Stamps seen, fenced;
  History others;
  explicit Clock(size_t slots = 0) : seen(slots), fenced(slots) {}
  void join(const Clock& from) {
    ::join(seen, from.seen);
    ::join(fenced, from.fenced);
    ::join(others, from.others);
  }
  void meet(const Clock& from) {
    ::meet(seen, from.seen);
    ::meet(fenced, from.fenced);
  }
  bool knows(uint32_t cluster, uint16_t slot, uint32_t epoch) const {
    auto found = others.find(cluster);
    return found != others.end() && (*found->second)[slot] >= epoch;
  }
};
