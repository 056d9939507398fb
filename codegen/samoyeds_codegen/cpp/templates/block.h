// The whole block: sort slots by expert, gather, gate and up with activation, down with the weighted sum.
//
// Work is cut into panels of rows, of all experts alike, and taken by whoever is free: one hot expert keeps all threads
// busy. A thread that has panels of `out` adds all experts to them, in the order of experts: no sum depends on timing.

// As many that each thread comes back for more SHARES times, of one matrix alone: one expert may have all tokens.
static int64_t grain(const Matrix& w, int64_t threads) {
  return std::clamp<int64_t>(w.panels() / (SHARES * threads), 1, GRAIN);
}

struct Task {
  const Group* group;
  int64_t first, last;
};

class Block {
 public:
  explicit Block(const Arguments& a)
      : a_(a), routing_(a), groups_(groups(a, routing_)), few_(any_few() ? a.tokens : 0),
        rows_(dot::bytes(few_, a.up)), x_(place(&Group::x, a.up, false)), h_(place(&Group::h, a.down, true)),
        sums_(a.out_is_bf16 ? a.tokens * a.hidden * int64_t(sizeof(float)) : 0) {
    for (Group& g : groups_) {
      if (g.few) g.x = rows_.data();
      for (int64_t tile = 0; !g.few && tile < many::tiles(g); ++tile) gathers_.push_back({&g, tile, tile + 1});
      const int64_t step = grain(a.up, a.threads);
      for (int64_t p = 0; p < a.up.panels(); p += step) ups_.push_back({&g, p, std::min(p + step, a.up.panels())});
    }
    // The longest first, so that nobody is left with one at the end; short ones keep the order in which they prefetch.
    const auto cost = [](const Task& t) { return t.group->few ? 0 : t.group->count; };
    std::stable_sort(ups_.begin(), ups_.end(), [&](const Task& s, const Task& t) { return cost(s) > cost(t); });
  }

  void run() {
    const int64_t gathers = few_ + int64_t(gathers_.size()), panels = a_.down.panels();
    const int64_t step = grain(a_.down, a_.threads);
#pragma omp parallel num_threads(int(a_.threads))
    {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < gathers; ++i) gather(i);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(ups_.size()); ++i) up(ups_[size_t(i)]);
#pragma omp for schedule(dynamic)
      for (int64_t p = 0; p < panels; p += step) down(p, std::min(p + step, panels));
    }
  }

 private:
  static std::vector<Group> groups(const Arguments& a, const Routing& routing) {
    std::vector<Group> found;
    for (int64_t e = 0; e < a.experts; ++e) {
      const int64_t first = routing.ends[size_t(e)], count = routing.ends[size_t(e) + 1] - first;
      if (!count) continue;
      if (!found.empty()) found.back().next_expert = e;
      found.push_back({e, e, count, routing.slots.data() + first, count <= DOT_TOKENS, nullptr, nullptr});
    }
    return found;
  }

  bool any_few() const {
    return std::any_of(groups_.begin(), groups_.end(), [](const Group& g) { return g.few; });
  }

  // One buffer for what a matrix takes, of all groups; rows of tokens of few-token groups are shared and not in it.
  Buffer place(char* Group::*field, const Matrix& w, bool few_too) {
    const auto bytes = [&](const Group& g) {
      return !g.few ? many::bytes(g.count, w) : few_too ? round_up(dot::bytes(g.count, w), 64) : 0;
    };
    int64_t total = 0;
    for (const Group& g : groups_) total += bytes(g);
    Buffer buffer(total);
    total = 0;
    for (Group& g : groups_) {
      g.*field = buffer.data() + total;
      total += bytes(g);
    }
    return buffer;
  }

  float* sums() const { return a_.out_is_bf16 ? reinterpret_cast<float*>(sums_.data()) : static_cast<float*>(a_.out); }

  void gather(int64_t i) const {
    if (i < few_) return dot::gather(a_, i, rows_.data());
    const Task& task = gathers_[size_t(i - few_)];
    many::gather(a_, *task.group, task.first);
  }

  void up(const Task& task) const {
    const auto kernel = task.group->few ? dot::up : many::up;
    kernel(a_, *task.group, task.first, task.last);
  }

  void down(int64_t first, int64_t last) const {
    const int64_t begin = first * PANEL, end = std::min(last * PANEL, a_.hidden);
    for (int64_t t = 0; t < a_.tokens; ++t) {
      float* row = sums() + t * a_.hidden;
      std::fill(row + begin, row + end, 0.0f);
    }
    for (const Group& g : groups_) {
      const auto kernel = g.few ? dot::down : many::down;
      kernel(a_, g, first, last, sums());
    }
    if (!a_.out_is_bf16) return;
    bf16* out = static_cast<bf16*>(a_.out);
    for (int64_t t = 0; t < a_.tokens; ++t)
      for (int64_t i = begin; i < end; ++i) out[t * a_.hidden + i] = to_bf16(sums()[t * a_.hidden + i]);
  }

  const Arguments& a_;
  Routing routing_;
  std::vector<Group> groups_;
  int64_t few_;  // rows of tokens that are converted for few-token groups: all or none
  Buffer rows_, x_, h_, sums_;
  std::vector<Task> gathers_, ups_;
};
