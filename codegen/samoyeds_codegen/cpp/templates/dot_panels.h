// Few tokens an expert, weights that are contiguous by rows: the panels of both products, by `multiply`.

namespace dot {

// What `multiply<T>` does, for any number of tokens up to TOKENS.
static void multiply(int tokens, const Panel& w, const Panel& next, int64_t cols, const Row* const* x,
                     float (*out)[PANEL]) {
  switch (tokens) {
    case 1: return multiply<1>(w, next, cols, x, out);
    case 2: return multiply<2>(w, next, cols, x, out);
    case 3: return multiply<3>(w, next, cols, x, out);
    case 4: return multiply<4>(w, next, cols, x, out);
    case 5: return multiply<std::min(5, TOKENS)>(w, next, cols, x, out);
    case 6: return multiply<std::min(6, TOKENS)>(w, next, cols, x, out);
    case 7: return multiply<std::min(7, TOKENS)>(w, next, cols, x, out);
    default: return multiply<TOKENS>(w, next, cols, x, out);
  }
}

// Features of panels first to last of h = activation(gate, up), [slots, width(down)].
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const bool ends = panel + 1 == a.up.panels();
    const Panel ups(a.up, g.expert, panel), gates(a.gate, g.expert, panel);
    const Panel next(GATED ? a.gate : a.up, g.expert, ends ? panel : panel + 1);
    for (int64_t s = 0; s < g.count; s += TOKENS) {
      const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
      const Row* x[TOKENS];
      float features[PANEL], gate[TOKENS][PANEL], up[TOKENS][PANEL];
      for (int t = 0; t < tokens; ++t) x[t] = reinterpret_cast<Row*>(g.x) + g.row(s + t) * width(a.up);
      if (GATED) multiply(tokens, gates, ups, a.gate.cols, x, gate);
      multiply(tokens, ups, next, a.up.cols, x, up);
      for (int t = 0; t < tokens; ++t) {
        Row* h = reinterpret_cast<Row*>(g.h) + (s + t) * width(a.down);
        activate_panel(a, g.expert, panel, 1, gate[t], up[t], features);
        for (int i = 0; i < PANEL; ++i) store_as(h + panel * PANEL + i, features[i]);
        if (ends) std::fill(h + (panel + 1) * PANEL, h + width(a.down), Row{});
      }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  for (int64_t panel = first; panel < last; ++panel) {
    const bool ends = panel + 1 == last;
    const Panel w(a.down, g.expert, panel), next(a.down, ends ? g.next_expert : g.expert, ends ? first : panel + 1);
    for (int64_t s = 0; s < g.count; s += TOKENS) {
      const int tokens = int(std::min<int64_t>(TOKENS, g.count - s));
      const Row* h[TOKENS];
      float y[TOKENS][PANEL];
      for (int t = 0; t < tokens; ++t) h[t] = reinterpret_cast<Row*>(g.h) + (s + t) * width(a.down);
      multiply(tokens, w, next, a.down.cols, h, y);
      for (int t = 0; t < tokens; ++t) {
        add_bias(a.down, g.expert, panel, 1, y[t]);
        accumulate(a, g.slots[s + t], panel, y[t], out);
      }
    }
  }
}
}  // namespace dot
