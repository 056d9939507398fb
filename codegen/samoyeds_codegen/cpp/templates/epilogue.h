// What stands between the products and memory: bias, activation, and the weighted sum of a token's experts.
//
// y is what a panel's rows give, [PANEL, tokens].

static void add_bias(const Matrix& w, int64_t expert, int64_t panel, int64_t tokens, float* y) {
  if (!w.has_bias()) return;
  const Weight* bias = w.bias[expert] + panel * PANEL * w.bias_step;
  const int64_t rows = std::min<int64_t>(PANEL, w.rows - panel * PANEL);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t t = 0; t < tokens; ++t) y[i * tokens + t] += to_float(bias[i * w.bias_step]);
}

// h = activation(gate + bias, up + bias) for the features of a panel, zero past the last one.
static void activate_panel(const Arguments& a, int64_t expert, int64_t panel, int64_t tokens, float* gate, float* up,
                           float* h) {
  add_bias(a.up, expert, panel, tokens, up);
  if (GATED) add_bias(a.gate, expert, panel, tokens, gate);
  const int64_t all = PANEL * tokens, rows = std::min<int64_t>(PANEL, a.up.rows - panel * PANEL);
#pragma omp simd
  for (int64_t i = 0; i < all; ++i) h[i] = activate(GATED ? gate[i] : 0.0f, up[i]);
  std::fill(h + rows * tokens, h + all, 0.0f);
}

// A panel's activations of one slot, as part of its row.
static inline void store_row(const Arguments& a, const Group& g, int64_t slot, int64_t panel, const float* h) {
  const int64_t features = std::min<int64_t>(PANEL, a.up.rows - panel * PANEL);
  Weight* row = g.h_rows + slot * a.up.rows + panel * PANEL;
  for (int64_t f = 0; f < features; ++f) store_as(row + f, h[f]);
}

// The same for the slots of a tile, from `slot` on: h is [PANEL, width].
static void store_rows(const Arguments& a, const Group& g, int64_t slot, int64_t panel, int64_t width, const float* h) {
  const int64_t tokens = std::min(width, g.count - slot);
  for (int64_t t = 0; t < tokens; t += LANES) {
    alignas(64) float turned[LANES][PANEL];
    for (int i = 0; i < PANEL; i += 16) transpose_from(h + i * width + t, width, turned[0] + i, PANEL);
    for (int64_t i = 0; i < std::min<int64_t>(LANES, tokens - t); ++i)
      store_row(a, g, slot + t + i, panel, turned[i]);
  }
}

// out[token] += weight * y, for the rows of a panel and one slot.
static inline void accumulate(const Arguments& a, const Slot& slot, int64_t panel, const float* y, float* out) {
  float* row = out + slot.token * a.hidden + panel * PANEL;
  const int64_t rows = std::min<int64_t>(PANEL, a.hidden - panel * PANEL);
  if (rows == PANEL)  // known at compile time: a vector
    for (int64_t i = 0; i < PANEL; ++i) row[i] += slot.weight * y[i];
  else
    for (int64_t i = 0; i < rows; ++i) row[i] += slot.weight * y[i];
}

// The same for the slots of a tile: y is [PANEL, width].
static void accumulate_tile(const Arguments& a, const Group& g, int64_t slot, int64_t panel, int64_t width, float* y,
                            float* out) {
  add_bias(a.down, g.expert, panel, width, y);
  const int64_t tokens = std::min(width, g.count - slot);
  for (int64_t t = 0; t < tokens; t += LANES) {
    alignas(64) float turned[LANES][PANEL];
    for (int i = 0; i < PANEL; i += 16) transpose_from(y + i * width + t, width, turned[0] + i, PANEL);
    for (int64_t i = 0; i < std::min<int64_t>(LANES, tokens - t); ++i)
      accumulate(a, g.slots[slot + t + i], panel, turned[i], out);
  }
}
