// The whole block: sort slots by expert, gather, gate and up with activation, down with the weighted sum.
//
// Work is cut into panels of rows, of all experts alike, and taken by whoever is free: one hot expert keeps all threads
// busy. A thread that has panels of `out` adds all experts to them, in the order of experts: no sum depends on timing.

class Block {
 public:
  explicit Block(const Arguments& a)
      : a_(a), routing_(a), groups_(groups(a, routing_)), shared_(shared_rows()), rows_(dot::bytes(shared_, a.up)),
        x_(place(&Group::x, a.up, shared_ == 0)), h_(place(&Group::h, a.down, true)),
        x_rows_(place_rows(&Group::x_rows, X_BY_ROWS, a.hidden)),
        h_rows_(place_rows(&Group::h_rows, H_BY_ROWS, a.up.rows)),
        sums_(a.out_is_bf16 ? a.tokens * a.hidden * int64_t(sizeof(float)) : 0) {
    for (Group& g : groups_) {
      g.gathered = g.few && !shared_;
      if (g.few && shared_) g.x = rows_.data();
      if (g.gathered) gathers_.push_back({&g, 0, g.count});
      for (int64_t tile = 0; !g.few && tile < many::tiles(g); ++tile) tiles_.push_back({&g, tile, tile + 1});
      const int64_t step = grain(a.up, a.threads);
      for (int64_t p = 0; p < a.up.panels(); p += step) ups_.push_back({&g, p, std::min(p + step, a.up.panels())});
    }
    // The longest first, so that nobody is left with one at the end; short ones keep the order in which they prefetch.
    const auto cost = [](const Task& t) { return t.group->few ? 0 : t.group->count; };
    std::stable_sort(ups_.begin(), ups_.end(), [&](const Task& s, const Task& t) { return cost(s) > cost(t); });
  }

  void run() {
    gathers_.insert(gathers_.end(), tiles_.begin(), tiles_.end());
    const int64_t gathers = shared_ + int64_t(gathers_.size()), panels = a_.down.panels();
    const int64_t step = grain(a_.down, a_.threads);
#pragma omp parallel num_threads(int(a_.threads))
    {
      if (X_BY_ROWS) {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < int64_t(groups_.size()); ++i) copy_rows(groups_[size_t(i)]);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < gathers; ++i) gather(i);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(ups_.size()); ++i) up(ups_[size_t(i)]);
      if (H_BY_ROWS) {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < int64_t(tiles_.size()); ++i) turn(tiles_[size_t(i)]);
      }
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
      add_groups(found, e, routing.slots.data() + first, count, a.is_few(count));
    }
    return found;
  }

  // Rows for few-token groups: of all tokens, unless these groups have fewer slots, which get rows of their own then.
  int64_t shared_rows() const {
    int64_t slots = 0;
    for (const Group& g : groups_) slots += g.few ? g.count : 0;
    return slots < a_.tokens ? 0 : a_.tokens;
  }

  // One buffer for what a matrix takes, of all groups, or without those of few tokens.
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

  // One buffer for rows of tiles, if there are such.
  Buffer place_rows(Weight* Group::*field, bool wanted, int64_t cols) {
    int64_t total = 0;
    for (const Group& g : groups_) total += wanted && !g.few ? g.count * cols : 0;
    Buffer buffer(total * int64_t(sizeof(Weight)));
    Weight* next = reinterpret_cast<Weight*>(buffer.data());
    for (Group& g : groups_) {
      g.*field = next;
      next += wanted && !g.few ? g.count * cols : 0;
    }
    return buffer;
  }

  float* sums() const { return a_.out_is_bf16 ? reinterpret_cast<float*>(sums_.data()) : static_cast<float*>(a_.out); }

  void gather(int64_t i) const {
    if (i < shared_) return dot::gather(a_, i, rows_.data(), i);
    const Task& task = gathers_[size_t(i - shared_)];
    const Group& g = *task.group;
    for (int64_t s = task.first; g.few && s < task.last; ++s) dot::gather(a_, g.slots[s].token, g.x, s);
    const Rows gathered{g.x_rows, a_.hidden, a_.hidden, nullptr}, tokens{a_.x, a_.x_stride, a_.hidden, g.slots};
    if (!g.few) many::gather(X_BY_ROWS ? gathered : tokens, a_.up, g, task.first, g.x);
  }

  // The conversions of layouts that keep rows between stages.
  void copy_rows(const Group& g) const {
    for (int64_t s = 0; !g.few && s < g.count; ++s) {
      const Weight* row = a_.x + g.slots[s].token * a_.x_stride;
      std::copy(row, row + a_.hidden, g.x_rows + s * a_.hidden);
    }
  }
  void turn(const Task& task) const {
    const Group& g = *task.group;
    many::gather({g.h_rows, a_.up.rows, a_.up.rows, nullptr}, a_.down, g, task.first, g.h);
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
  int64_t shared_;  // rows of tokens that all few-token groups read: all or none
  Buffer rows_, x_, h_, x_rows_, h_rows_, sums_;
  std::vector<Task> gathers_, tiles_, ups_;
};
