// Runs a kernel of packed experts on inputs of its own, and compares with sums in double. Appended to the kernel's text.

#include <cstdio>

using namespace samoyeds;

static uint32_t state = 1;
static uint32_t next_random() { return state = state * 1664525u + 1013904223u, state >> 8; }
static float uniform() { return float(next_random() % 2001) / 1000 - 1; }
static void set(float& to, float x) { to = x; }
static void set(bf16& to, float x) { to = to_bf16(x); }

// A projection of all experts with random weights: storage, in strips or canonical, and the same matrices dense.
struct Projection {
  int64_t experts, rows, cols, padded, blocks, condensed;
  std::vector<Weight> values;
  std::vector<uint16_t> metadata;
  std::vector<uint8_t> selection;
  std::vector<double> dense;

  Projection(int64_t e, int64_t r, int64_t c)
      : experts(e), rows(r), cols(c), padded(round_up(c, V < 16 ? 16 : V)), blocks(ceil_div(r, M)), condensed(blocks * N),
        values(size_t(e * condensed * padded / 2)), metadata(size_t(e * condensed * padded / 16)),
        selection(size_t(e * ceil_div(blocks, GROUP) * N * (padded / V))), dense(size_t(e * r * padded)) {
    for (int64_t i = 0; i < int64_t(selection.size()); ++i) {
      const int64_t j = (IN_STRIPS && GROUP == 1 ? i % 16 : i / (padded / V)) % N;
      selection[size_t(i)] = uint8_t(j * (M / N) + next_random() % (M / N));
    }
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t row = 0; row < condensed; ++row)
        for (int64_t group = 0; group < padded / 4; ++group) keep(e, row, group);
  }

  // Where in an expert's storage things of a condensed row are.
  int64_t value_at(int64_t row, int64_t group, int i) const {
    if (!IN_STRIPS) return row * (padded / 2) + group * 2 + i;
    const int64_t four = (row / 16 * (padded / 32) + group / 8) * 8 + group % 8;
    return four * 32 + (sizeof(Weight) == 2 ? row % 16 * 2 + i : i * 16 + row % 16);
  }
  int64_t word_at(int64_t row, int64_t group) const {
    if (!IN_STRIPS) return row * (padded / 16) + group / 4;
    return ((row / 16 * (padded / 32) + group / 8) * 16 + row % 16) * 2 + group % 8 / 4;
  }
  int64_t choice_at(int64_t row, int64_t vector) const {
    if (IN_STRIPS && GROUP == 1) return (row / 16 * (padded / V) + vector) * 16 + row % 16;
    return (row / N / GROUP * N + row % N) * (padded / V) + vector;
  }

  void keep(int64_t e, int64_t row, int64_t group) {
    static const int pairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
    const int* pair = pairs[next_random() % 6];
    metadata[size_t(e * condensed * (padded / 16) + word_at(row, group))] |=
        uint16_t((pair[0] | pair[1] << 2) << group % 4 * 4);
    const int64_t choices = ceil_div(blocks, GROUP) * N * (padded / V);
    const int64_t choice = e * choices + choice_at(row, group * 4 / V);
    const int64_t output = N == M ? row : row / N * M + selection[size_t(choice)];
    for (int i = 0; i < 2; ++i) {
      const int64_t column = group * 4 + pair[i];
      if (column >= cols || output >= rows) continue;
      Weight& value = values[size_t(e * condensed * (padded / 2) + value_at(row, group, i))];
      set(value, uniform());
      dense[size_t((e * rows + output) * padded + column)] = to_float(value);
    }
  }

  Matrix matrix() const {
    Matrix m{};
    m.values = {values.data(), condensed * (padded / 2), nullptr};
    m.metadata = {metadata.data(), condensed * (padded / 16), nullptr};
    m.selection = {selection.data(), ceil_div(blocks, GROUP) * N * (padded / V), nullptr};
    m.rows = rows, m.cols = padded;
    return m;
  }

  double times(int64_t e, int64_t row, const double* x) const {
    double sum = 0;
    for (int64_t c = 0; c < cols; ++c) sum += dense[size_t((e * rows + row) * padded + c)] * x[c];
    return sum;
  }
};

// The relative error of a call.
static double error(int64_t tokens, int64_t hidden, int64_t width) {
  constexpr int64_t experts = 3, top_k = 2;
  const Projection gate(experts, width, hidden), up(experts, width, hidden), down(experts, hidden, width);
  std::vector<Weight> x(size_t(tokens * hidden));
  for (Weight& value : x) set(value, uniform());
  std::vector<int64_t> ids(size_t(tokens * top_k));
  for (int64_t& id : ids) id = int64_t(next_random() % (experts + 1));  // E is no expert
  std::vector<float> weights(ids.size()), out(size_t(tokens * hidden));
  for (float& weight : weights) weight = uniform();

  Arguments a{};
  a.x = x.data(), a.ids = ids.data(), a.weights = weights.data(), a.out = out.data(), a.x_stride = hidden;
  a.tokens = tokens, a.top_k = top_k, a.experts = experts, a.hidden = hidden, a.ids_are_int64 = 1, a.threads = 2;
  a.few = (int64_t(1) << 15) - 1;
  a.gate = gate.matrix(), a.up = up.matrix(), a.down = down.matrix();
  if (samoyeds_experts(&a)) return 1e9;

  double difference = 0, size = 1e-30;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> row(size_t(hidden), 0), in(size_t(hidden), 0), h(size_t(width), 0);
    for (int64_t i = 0; i < hidden; ++i) in[size_t(i)] = to_float(x[size_t(t * hidden + i)]);
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t e = ids[size_t(t * top_k + k)];
      if (e == experts) continue;
      for (int64_t i = 0; i < width; ++i) h[size_t(i)] = gate.times(e, i, in.data()) * up.times(e, i, in.data());
      for (int64_t i = 0; i < hidden; ++i)
        row[size_t(i)] += double(weights[size_t(t * top_k + k)]) * down.times(e, i, h.data());
    }
    for (int64_t i = 0; i < hidden; ++i) {
      const double found = out[size_t(t * hidden + i)];
      difference += (found - row[size_t(i)]) * (found - row[size_t(i)]), size += row[size_t(i)] * row[size_t(i)];
    }
  }
  return std::sqrt(difference / size);
}

int main() {
  double worst = 0;
  for (const int64_t tokens : {1, 5, 60})
    for (const auto& [hidden, width] : {std::pair<int64_t, int64_t>{64, 32}, {40, 36}, {100, 20}, {96, 160}})
      if (!IN_STRIPS || (hidden % 32 == 0 && width % 32 == 0)) worst = std::max(worst, error(tokens, hidden, width));
  std::printf("%g\n", worst);
  return 0;
}
