// Dense weights whose rows, an output each, are contiguous; they are used where they lie.

// PANEL output rows of one expert. Past the last one they repeat it, and nobody reads that.
struct Panel {
  const Weight* rows[PANEL];

  Panel() = default;
  Panel(const Matrix& w, int64_t expert, int64_t panel) {
    const Weight* first = w.values[expert];
    for (int r = 0; r < PANEL; ++r) rows[r] = first + std::min(panel * PANEL + r, w.rows - 1) * w.row_stride;
  }

  // Whether all rows are there, evenly apart, so that a tile can be read where it lies: from where, and how far apart.
  bool whole() const { return rows[PANEL - 1] - rows[0] == (PANEL - 1) * (rows[1] - rows[0]) && rows[1] != rows[0]; }
  const char* tile(int64_t column) const { return reinterpret_cast<const char*>(rows[0] + column); }
  int64_t row_bytes() const { return (rows[1] - rows[0]) * int64_t(sizeof(Weight)); }
  // What of row r is read at a column.
  const Weight* at(int r, int64_t column) const { return rows[r] + column; }
};

// The first `count` of LANES weights, the others zero, without reading past the last one.
static inline Vec load_some(const Weight* p, int64_t count) {
  Weight some[LANES] = {};
  std::memcpy(some, p, size_t(count) * sizeof(Weight));
  return load(some);
}

// Columns first to first + depth of a panel, as floats.
template <int DEPTH>
static void copy_floats(const Panel& w, int64_t first, int64_t depth, float* out) {
  for (int r = 0; r < PANEL; ++r, out += DEPTH) {
    const Weight* row = w.rows[r] + first;
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) store(out + k, load(row + k));
    for (; k < depth; ++k) out[k] = to_float(row[k]);
  }
}
