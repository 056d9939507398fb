// Dense weights, used where they lie.

// PANEL output rows of one expert. Past the last one they repeat it, and nobody reads that.
struct Panel {
  const Weight* rows[PANEL];

  Panel() = default;
  Panel(const Matrix& w, int64_t expert, int64_t panel) {
    const Weight* first = w.values[expert];
    for (int r = 0; r < PANEL; ++r) rows[r] = first + std::min(panel * PANEL + r, w.rows - 1) * w.row_stride;
  }

  // Whether all rows are there, evenly apart.
  bool whole() const { return rows[PANEL - 1] - rows[0] == (PANEL - 1) * (rows[1] - rows[0]) && rows[1] != rows[0]; }
};

// The first `count` of LANES weights, the others zero, without reading past the last one.
static inline Vec load_some(const Weight* p, int64_t count) {
  Weight some[LANES] = {};
  std::memcpy(some, p, size_t(count) * sizeof(Weight));
  return load(some);
}
