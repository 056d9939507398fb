// Few tokens an expert: lanes are rows of a strip, and each pair of values meets the columns that it was kept from.
//
// What a vector of columns gives goes to the output rows that it was chosen for. Several strips at a time, as memory is
// read faster in several places, and their sums do not wait for each other.

namespace dot {

constexpr int TOKENS = LANES == 16 ? 8 : 4;
constexpr int HALVES = STRIP / LANES;
constexpr int MOST = 4;  // strips at a time
using Rows = float[TOKENS][PANEL];

template <int S, int T>
struct Sums {
  Vec of[S][T][HALVES];
  Sums() {
    for (auto& strip : of)
      for (auto& token : strip)
        for (Vec& v : token) v = zero();
  }
};

// PART columns from `column` on.
template <int S, int T, bool FETCH>
[[gnu::always_inline]] static inline void part(const Strip* w, const Strip* next, int64_t column, int64_t chunks,
                                               const Row* const* x, Sums<S, T>& sums) {
  constexpr int EACH = Strip::LINES / 8;  // lines of four columns
  const int64_t chunk = column / CHUNK;
  const int begin = int(column % CHUNK) / 4;
  Codes codes[S][HALVES];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
    for (int h = 0; h < HALVES; ++h) codes[s][h] = Codes(w[s].positions + chunk * STRIP + h * LANES, begin * 4);
#pragma GCC unroll 8
  for (int g = begin; g < begin + PART / 4; ++g) {
    Vec columns[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) columns[t] = four(x[t] + chunk * CHUNK + g * 4);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      for (int i = 0; FETCH && i < EACH; ++i) prefetch(w[s], next[s], chunk, chunks, g * EACH + i);
#pragma GCC unroll 2
      for (int h = 0; h < HALVES; ++h) {
        const Kept kept(w[s].values + chunk * RECORD + g * FOUR, h, codes[s][h]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sums.of[s][t][h] = kept.times(columns[t], sums.of[s][t][h]);
      }
    }
  }
}

// y[s][t][i] = row i of strip s times token t. Rows of x are zero from the columns that exist on.
template <int S, int T, bool FETCH>
static void multiply(const Strip* w, const Strip* next, int64_t cols, const Row* const* x, Rows* y) {
  Sums<S, T> all[M];
  const int64_t chunks = cols / CHUNK;
  for (int64_t vector = 0; vector < cols / V; ++vector) {
    Sums<S, T> one;
    for (int64_t column = vector * V; column < (vector + 1) * V; column += PART)
      part<S, T, FETCH>(w, next, column, chunks, x, one);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s)
      for (int sub_row = 0; sub_row < M; ++sub_row) {
        const uint32_t lanes = N == M ? 0xffff : w[s].lanes(vector, sub_row);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          for (int h = 0; h < HALVES; ++h) {
            Vec& sum = all[sub_row].of[s][t][h];
            sum = N == M ? add(sum, one.of[s][t][h]) : add_where(lanes, h, sum, one.of[s][t][h]);
          }
      }
  }
  for (int s = 0; s < S; ++s)
    for (int t = 0; t < T; ++t) {
      alignas(64) float kept[M][STRIP];
      for (int sub_row = 0; sub_row < M; ++sub_row)
        for (int h = 0; h < HALVES; ++h) store(kept[sub_row] + h * LANES, all[sub_row].of[s][t][h]);
      for (int i = 0; i < PANEL; ++i) {
        y[s][t][i] = 0;
        for (int r = 0; r < N; ++r) y[s][t][i] += kept[i % M][i / M * N + r];
      }
    }
}

// For a number of tokens that is one of 1, 2, 4 and 8, as many strips at a time as registers hold sums of.
template <int T>
static void multiply_strips(int strips, const Strip* w, const Strip* next, int64_t cols, const Row* const* x,
                            Rows* y) {
  constexpr bool pairs = !std::is_same_v<Row, float>;  // these read columns faster than sums are kept elsewhere
  constexpr int WIDE = LANES == 16 ? (T <= 2 ? 4 : T <= 4 || !pairs ? 2 : 1) : (T <= 2 ? 2 : 1);
  const bool fetch = !ONE_PLACE || T > 4;  // with more tokens products take longer than memory does
  const auto wide = fetch ? multiply<WIDE, T, true> : multiply<WIDE, T, false>;
  const auto one = fetch ? multiply<1, T, true> : multiply<1, T, false>;
  int s = 0;
  for (; s + WIDE <= strips; s += WIDE) wide(w + s, next + s, cols, x, y + s);
  for (; s < strips; ++s) one(w + s, next + s, cols, x, y + s);
}

// What strips give for tokens from x on; returns how many tokens it took. Where they are no power of two, the last one
// is computed more than once if that is faster than two calls.
static int multiply(int strips, const Strip* w, const Strip* next, int64_t cols, const Row* const* x, int tokens,
                    Rows* y) {
  if (TOKENS >= 8 && tokens >= 7) multiply_strips<TOKENS>(strips, w, next, cols, x, y);
  else if (tokens >= 3) multiply_strips<4>(strips, w, next, cols, x, y);
  else if (tokens == 2) multiply_strips<2>(strips, w, next, cols, x, y);
  else multiply_strips<1>(strips, w, next, cols, x, y);
  return std::min(tokens, TOKENS >= 8 && tokens >= 7 ? 8 : 4);
}

// Features of panels first to last of h = activation(gate, up), [slots, width(down)].
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  constexpr int EACH = GATED ? 2 : 1;
  Rows y[MOST];
  std::vector<Strip> w, next;
  for (int64_t panel = first; panel < last; panel += MOST / EACH) {
    const int64_t stop = std::min<int64_t>(panel + MOST / EACH, last);
    w.clear(), next.clear();
    for (int64_t p = panel; p < stop; ++p)
      for (const Matrix* m : {&a.gate, &a.up}) {
        if (!GATED && m == &a.gate) continue;
        w.emplace_back(*m, g.expert, p);
        next.emplace_back(*m, g.expert, std::min(p + stop - panel, m->panels() - 1));
      }
    for (int64_t s = 0; s < g.count;) {
      const Row* x[TOKENS];
      for (int t = 0; t < TOKENS; ++t)
        x[t] = reinterpret_cast<Row*>(g.x) + g.row(std::min(s + t, g.count - 1)) * width(a.up);
      const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
      const int done = multiply(int(w.size()), w.data(), next.data(), a.up.cols, x, tokens, y);
      for (int t = 0; t < done; ++t) {
        Row* h = reinterpret_cast<Row*>(g.h) + (s + t) * width(a.down);
        for (int64_t p = panel; p < stop; ++p) {
          Rows* of = y + (p - panel) * EACH;
          float features[PANEL];
          activate_panel(a, g.expert, p, 1, of[0][t], of[EACH - 1][t], features);
          for (int i = 0; i < PANEL; ++i) store_as(h + p * PANEL + i, features[i]);
        }
        if (stop == a.up.panels()) std::fill(h + stop * PANEL, h + width(a.down), Row{});
      }
      s += done;
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  Rows y[MOST];
  std::vector<Strip> w, next;
  for (int64_t panel = first; panel < last; panel += MOST) {
    const int64_t stop = std::min<int64_t>(panel + MOST, last);
    const bool ends = stop == last;
    w.clear(), next.clear();
    for (int64_t p = panel; p < stop; ++p) {
      w.emplace_back(a.down, g.expert, p);
      const int64_t then = ends ? std::min(p - panel + first, last - 1) : std::min(p + MOST, last - 1);
      next.emplace_back(a.down, ends ? g.next_expert : g.expert, then);
    }
    for (int64_t s = 0; s < g.count;) {
      const Row* h[TOKENS];
      for (int t = 0; t < TOKENS; ++t)
        h[t] = reinterpret_cast<Row*>(g.h) + std::min(s + t, g.count - 1) * width(a.down);
      const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
      const int done = multiply(int(w.size()), w.data(), next.data(), a.down.cols, h, tokens, y);
      for (int64_t p = panel; p < stop; ++p)
        for (int t = 0; t < done; ++t) {
          add_bias(a.down, g.expert, p, 1, y[p - panel][t]);
          accumulate(a, g.slots[s + t], p, y[p - panel][t], out);
        }
      s += done;
    }
  }
}
}  // namespace dot
