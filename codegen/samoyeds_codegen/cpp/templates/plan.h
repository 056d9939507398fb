// What a call does with which tokens.

// Memory for one call, aligned to cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(::operator new(size_t(bytes) + 64, std::align_val_t(64))) {}
  Buffer(Buffer&& other) : data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// A token at one of its experts.
struct Slot {
  int64_t token;
  float weight;
};

// The slots of one expert, whether the kernel for few tokens suits them, and where rows and activations are, in the
// layout of that kernel. Tokens of a few-token group have rows of their own if `gathered`, else all tokens have rows.
struct Group {
  int64_t expert, next_expert, count;
  const Slot* slots;
  bool few, gathered;
  char *x, *h;
  Weight *x_rows, *h_rows;  // on the way to tiles, token by token; only where the specification says so

  // Which row of x is that of a slot.
  int64_t row(int64_t slot) const { return gathered ? slot : slots[slot].token; }
};

// Rows that become tiles: those of the slots of a group, or all there are.
struct Rows {
  const Weight* first;
  int64_t stride, cols;
  const Slot* slots;

  const Weight* row(int64_t i) const { return first + (slots ? slots[i].token : i) * stride; }
};

// Slots sorted by expert, stably, so that sums have one order whatever the number of threads. Ids that are no expert
// (sentinels) get no slot.
struct Routing {
  std::vector<int64_t> ends;
  std::vector<Slot> slots;

  explicit Routing(const Arguments& a) : ends(size_t(a.experts) + 1) {
    const int64_t total = a.tokens * a.top_k;
    for (int64_t s = 0; s < total; ++s)
      if (is_expert(a, s)) ++ends[size_t(a.id(s)) + 1];
    for (size_t e = 1; e < ends.size(); ++e) ends[e] += ends[e - 1];
    slots.resize(size_t(ends.back()));
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (int64_t s = 0; s < total; ++s)
      if (is_expert(a, s)) slots[size_t(next[size_t(a.id(s))]++)] = {s / a.top_k, a.weight(s)};
  }

 private:
  static bool is_expert(const Arguments& a, int64_t slot) { return a.id(slot) >= 0 && a.id(slot) < a.experts; }
};

// Tiles or panels of a group.
struct Task {
  const Group* group;
  int64_t first, last;
};

// Tokens that an expert computes at a time, so that their rows stay in the second cache; a multiple of all tiles.
constexpr int64_t CROWD = 512;

// Groups of the slots of an expert.
static void add_groups(std::vector<Group>& groups, int64_t expert, const Slot* slots, int64_t count, bool few) {
  const int64_t parts = few ? 1 : ceil_div(count, CROWD), each = round_up(ceil_div(count, parts), 64);
  for (int64_t begin = 0; begin < count; begin += each)
    groups.push_back({expert, expert, std::min(each, count - begin), slots + begin, few, few, nullptr, nullptr, nullptr,
                      nullptr});
}

// As many that each thread comes back for more SHARES times, of one matrix alone: one expert may have all tokens.
static int64_t grain(const Matrix& w, int64_t threads) {
  return std::clamp<int64_t>(w.panels() / (SHARES * threads), 1, GRAIN);
}
