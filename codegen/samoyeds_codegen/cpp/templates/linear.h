// out[s] = W[e] x[token of s], for the slots s of every expert e.

// What a call is given; every field takes eight bytes.
struct LinearCall {
  const Weight* x;  // rows x_stride apart
  int64_t x_stride;
  Runs runs;
  PerExpert<Weight> weights;
  int64_t row_stride, col_stride, rows, cols;
  Weight* out;  // [slots, rows]; those that belong to no expert come last
  int64_t slots, few, threads;
};

class Linear {
 public:
  explicit Linear(const LinearCall& c) : c_(c), a_(arguments(c)) {
    for (int64_t s = 0; s < c.runs.slots(); ++s) slots_.push_back({c.runs.token(s), 1.0f});
    for (int64_t e = 0; e < c.runs.experts; ++e) {
      const int64_t count = c.runs.count(e);
      if (count) add_groups(groups_, e, slots_.data() + c.runs.first(e), count, a_.is_few(count));
    }
  }

  void run() {
    const Waves waves(groups_, [this](const Group& g) { return bytes(g); });
    const Buffer buffer(waves.most);
    for (size_t w = 0; w + 1 < waves.begins.size(); ++w) wave(waves.begins[w], waves.begins[w + 1], buffer.data());
    std::fill(c_.out + c_.runs.slots() * c_.rows, c_.out + c_.slots * c_.rows, Weight{});
  }

 private:
  static Arguments arguments(const LinearCall& c) {
    Arguments a{};
    a.x = c.x, a.x_stride = c.x_stride, a.hidden = c.cols, a.experts = c.runs.experts;
    a.few = c.few, a.threads = c.threads;
    a.up.values = c.weights, a.up.row_stride = c.row_stride, a.up.col_stride = c.col_stride;
    a.up.rows = c.rows, a.up.cols = c.cols, a.down.cols = c.rows;
    return a;
  }

  // Of rows and, where tokens are few, of what they give.
  int64_t bytes(const Group& g) const {
    if (!g.few) return many::bytes(g.count, a_.up);
    return round_up(dot::bytes(g.count, a_.up), 64) + round_up(dot::bytes(g.count, a_.down), 64);
  }

  void wave(size_t begin, size_t end, char* next) {
    std::vector<Task> tiles, panels;
    const int64_t step = grain(a_.up, c_.threads);
    for (size_t i = begin; i < end; ++i) {
      Group& g = groups_[i];
      g.h_rows = c_.out + (g.slots - slots_.data()) * c_.rows;
      g.x = next, g.h = g.few ? next + round_up(dot::bytes(g.count, a_.up), 64) : next;
      next += bytes(g);
      for (int64_t t = 0; t < (g.few ? 1 : many::tiles(g)); ++t) tiles.push_back({&g, t, t + 1});
      for (int64_t p = 0; p < a_.up.panels(); p += step)
        panels.push_back({&g, p, std::min(p + step, a_.up.panels())});
    }
#pragma omp parallel num_threads(int(c_.threads))
    {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(tiles.size()); ++i) gather(tiles[size_t(i)]);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(panels.size()); ++i) multiply(panels[size_t(i)]);
    }
  }

  void gather(const Task& part) const {
    const Group& g = *part.group;
    if (!g.few) return many::gather({a_.x, a_.x_stride, a_.hidden, g.slots}, a_.up, g, part.first, g.x);
    for (int64_t s = 0; s < g.count; ++s) dot::gather(a_, g.slots[s].token, g.x, s);
  }

  void multiply(const Task& part) const {
    const Group& g = *part.group;
    if (!g.few) return many::up(a_, g, part.first, part.last);
    dot::up(a_, g, part.first, part.last);
    const int64_t begin = part.first * PANEL, end = std::min(part.last * PANEL, c_.rows);
    for (int64_t s = 0; s < g.count; ++s) {
      const Row* row = reinterpret_cast<Row*>(g.h) + s * dot::width(a_.down);
      for (int64_t i = begin; i < end; ++i) store_as(g.h_rows + s * c_.rows + i, to_float(row[i]));
    }
  }

  const LinearCall& c_;
  const Arguments a_;
  std::vector<Slot> slots_;
  std::vector<Group> groups_;
};
