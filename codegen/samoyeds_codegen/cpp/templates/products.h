// What products of all experts have in common that training computes one by one, as it differentiates what is between.

// Which slots each expert has, ends[e - 1] to ends[e], and which token belongs to slot s: order[s] / top_k.
struct Runs {
  const int32_t* ends;
  const int64_t* order;  // null: rows of tokens are sorted by expert already
  int64_t experts, top_k;

  int64_t slots() const { return experts ? ends[experts - 1] : 0; }
  int64_t first(int64_t expert) const { return expert ? ends[expert - 1] : 0; }
  int64_t count(int64_t expert) const { return ends[expert] - first(expert); }
  int64_t token(int64_t slot) const { return order ? order[slot] / top_k : slot; }
};

// Groups are computed in waves, so that of rows in the layout of a kernel there are about so many bytes at a time.
struct Waves {
  static constexpr int64_t BYTES = 2 << 20;
  std::vector<size_t> begins{0};  // of each wave its first group; then the end of the last one
  int64_t most = 0;               // bytes of a wave

  template <class Bytes>
  Waves(const std::vector<Group>& groups, const Bytes& bytes_of) {
    int64_t bytes = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      const int64_t more = bytes_of(groups[g]);
      if (g > begins.back() && bytes + more > BYTES) begins.push_back(g), bytes = 0;
      bytes += more, most = std::max(most, bytes);
    }
    if (!groups.empty()) begins.push_back(groups.size());
  }
};

// A piece of a row of a result.
static inline void write(const float* y, int64_t count, Weight* out) {
  for (int64_t i = 0; i < count; ++i) store_as(out + i, y[i]);
}
