// Columns in the place of tokens, for `dense_amx.h`.

namespace amx {

// A tile in pairs of slots; zero past the last slot and lane.
static void gather_lanes(const Side& side, const int64_t* rows, int64_t slots, const Group& g, int64_t number,
                         char* out) {
  const int64_t lanes = std::min<int64_t>(WIDTH, g.count - number * WIDTH);
  const __mmask16 exist = __mmask16((1u << lanes) - 1);
  const auto lanes_of = [&](int64_t slot) {
    if (slot >= slots) return _mm512_setzero_si512();
    const Weight* from = side.first + rows[slot] * side.stride + number * WIDTH;
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, from));
  };
  char* x = out + number * ceil_div(slots, COLUMNS) * TILE;
  for (int64_t s = 0; s < round_up(slots, COLUMNS); s += 2, x += 64)
    _mm512_store_si512(x, _mm512_or_si512(lanes_of(s), _mm512_slli_epi32(lanes_of(s + 1), 16)));
}

// Rows of out, [outputs, lanes], of panels first to last.
static void outer(const Matrix& of, const Group& g, int64_t first, int64_t last, Weight* out) {
  const Unit unit;
  alignas(64) Sums y[MOST];
  const int64_t stride = tile_bytes(of);
  for (int64_t panel = first; panel < last; panel += PANELS) {
    const int64_t stop = std::min<int64_t>(panel + PANELS, last), rows = std::min(stop * PANEL, of.rows);
    Panel w[PANELS];
    for (int64_t p = panel; p < stop; ++p) w[p - panel] = Panel(of, 0, p);
    if (stop * PANEL == rows && write_panels(w, int(stop - panel), of.cols, g, out + panel * PANEL * g.count)) continue;
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, tiles(g) - begin);
      multiply(w, int(stop - panel), of.cols, g.x + begin * stride, stride, count, y);
      for (int64_t row = panel * PANEL; row < rows; ++row)
        for (int64_t t = 0, lane = begin * WIDTH; t < count; ++t, lane += WIDTH)
          write(y[t][row / PANEL - panel] + row % PANEL * WIDTH, std::min<int64_t>(WIDTH, g.count - lane),
                out + row * g.count + lane);
    }
  }
}
}  // namespace amx
