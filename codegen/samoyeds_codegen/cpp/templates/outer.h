// out[e] = sum over the slots s of expert e of outer(left[s], right[s]): the derivative of `linear.h` by W.
//
// It is a product as well: slots are inputs, the columns of `left` are outputs, and those of `right` take the place of
// tokens.

// What a call is given; every field takes eight bytes.
struct OuterCall {
  Side left, right;
  Runs runs;
  Weight* out;  // [E, left, right]
  int64_t threads;
};

class Outer {
 public:
  explicit Outer(const OuterCall& c) : c_(c) {
    for (int64_t s = 0; s < c.runs.slots(); ++s) tokens_.push_back(c.runs.token(s)), slots_.push_back(s);
    for (int64_t e = 0; e < c.runs.experts; ++e) {
      Group g{};
      g.expert = e, g.count = c.right.cols;
      groups_.push_back(g);
    }
  }

  void run() {
    const Waves waves(groups_, [this](const Group& g) { return bytes(g); });
    const Buffer buffer(waves.most);
    for (size_t w = 0; w + 1 < waves.begins.size(); ++w) wave(waves.begins[w], waves.begins[w + 1], buffer.data());
  }

 private:
  const int64_t* places(const Side& side, int64_t expert) const {
    return (side.of_tokens ? tokens_ : slots_).data() + c_.runs.first(expert);
  }
  // An expert's rows of the left side, whose columns are outputs.
  Matrix matrix(int64_t expert) const {
    Matrix w{};
    w.values = {c_.left.first, 0, nullptr};
    w.row_stride = 1, w.col_stride = c_.left.stride, w.rows = c_.left.cols, w.cols = c_.runs.count(expert);
    w.places = places(c_.left, expert);
    return w;
  }
  int64_t bytes(const Group& g) const { return many::bytes(g.count, matrix(g.expert)); }

  void wave(size_t begin, size_t end, char* next) {
    std::vector<Task> tiles, panels;
    for (size_t i = begin; i < end; ++i) {
      Group& g = groups_[i];
      const Matrix w = matrix(g.expert);
      const int64_t step = grain(w, c_.threads);
      g.x = next, next += bytes(g);
      for (int64_t t = 0; w.cols && t < many::tiles(g); ++t) tiles.push_back({&g, t, t + 1});
      for (int64_t p = 0; p < w.panels(); p += step) panels.push_back({&g, p, std::min(p + step, w.panels())});
    }
#pragma omp parallel num_threads(int(c_.threads))
    {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(tiles.size()); ++i) gather(tiles[size_t(i)]);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(panels.size()); ++i) multiply(panels[size_t(i)]);
    }
  }

  void gather(const Task& task) const {
    const Group& g = *task.group;
    const int64_t* row = places(c_.right, g.expert);
    many::gather_lanes(c_.right, row, c_.runs.count(g.expert), g, task.first, g.x);
  }

  void multiply(const Task& task) const {
    const Group& g = *task.group;
    const Matrix w = matrix(g.expert);
    Weight* out = c_.out + g.expert * w.rows * g.count;
    if (!w.cols) return zero(out, task, w.rows);
    many::outer(w, g, task.first, task.last, out);
  }

  // No slots, so all sums are empty.
  void zero(Weight* out, const Task& task, int64_t rows) const {
    const int64_t cols = c_.right.cols;
    std::fill(out + task.first * PANEL * cols, out + std::min(task.last * PANEL, rows) * cols, Weight{});
  }

  const OuterCall& c_;
  std::vector<int64_t> tokens_, slots_;  // of each slot
  std::vector<Group> groups_;
};
