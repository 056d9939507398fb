// Columns in the place of tokens, for `dense_gemm.h`.

namespace gemm {

// A tile [slots, lanes]; zero past the last lane.
static void gather_lanes(const Side& side, const int64_t* rows, int64_t slots, const Group& g, int64_t number,
                         char* out) {
  const Tile tile(g.count, number);
  const int64_t lanes = std::min(g.count - tile.slot, tile.width);
  float* x = tile.in(out, slots);
  for (int64_t s = 0; s < slots; ++s, x += tile.width) {
    const Weight* from = side.first + rows[s] * side.stride + tile.slot;
    for (int64_t l = 0; l < lanes; ++l) x[l] = to_float(from[l]);
    std::fill(x + lanes, x + tile.width, 0.0f);
  }
}

// Where results are floats, sums may be written there.
static float* as_sums(float* out) { return out; }
static float* as_sums(bf16*) { return nullptr; }

// Rows of out, [outputs, lanes], of panels first to last. Where one piece of a panel is all there is, sums go there
// without a detour.
static void outer(const Matrix& w, const Group& g, int64_t first, int64_t last, Weight* out) {
  alignas(64) Sums y[MOST];
  for (int64_t panel = first; panel < last; panel += PANELS) {
    const int64_t stop = std::min<int64_t>(panel + PANELS, last), rows = std::min(stop * PANEL, w.rows);
    Strip strip;
    for (int64_t p = panel; p < stop; ++p) strip.add(w, 0, p, 0, std::min(p + PANELS, last - 1));
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t end = std::min<int64_t>(begin + MOST, tiles(g));
      const Tile ends(g.count, end - 1);
      const bool whole = w.cols <= DEPTH && stop * PANEL == rows && ends.slot + ends.width <= g.count;
      float* direct = whole ? as_sums(out + panel * PANEL * g.count) : nullptr;
      multiply(strip, w, g, g.x, begin, end, y, direct, g.count);
      if (direct) continue;
      for (int64_t row = panel * PANEL; row < rows; ++row)
        for (int64_t t = begin; t < end; ++t) {
          const Tile tile(g.count, t);
          const float* sums = y[t - begin][row / PANEL - panel] + row % PANEL * tile.width;
          write(sums, std::min(tile.width, g.count - tile.slot), out + row * g.count + tile.slot);
        }
    }
  }
}
}  // namespace gemm
