// Dense weights whose columns, an input each, are contiguous: [in, out] storage. They are used as they lie, or turned
// on their way to the first cache where pairs of inputs are multiplied.

// PANEL outputs of one expert, from the column of an input on; past the last one there are none.
struct Panel {
  const Weight* first;
  int64_t step, col_stride, outputs;
  const int64_t* places;

  Panel() = default;
  Panel(const Matrix& w, int64_t expert, int64_t panel)
      : first(w.values[expert] + panel * PANEL * w.row_stride), step(w.row_stride), col_stride(w.col_stride),
        outputs(std::min<int64_t>(PANEL, w.rows - panel * PANEL)), places(w.places) {}

  const Weight* column(int64_t i) const { return first + (places ? places[i] : i) * col_stride; }
  // Also of columns that may not exist.
  void fetch(int64_t i) const { if (!places) __builtin_prefetch(first + i * col_stride); }

  // No tile can be read where it lies.
  bool whole() const { return false; }
  const char* tile(int64_t) const { return nullptr; }
  int64_t row_bytes() const { return 0; }
  // `copy_floats` fetches what comes next, so all else points at what is there already.
  const Weight* at(int, int64_t) const { return first; }
};

// The first `count` of LANES weights, the others zero, without reading past the last one.
static inline Vec load_some(const Weight* p, int64_t count) {
  Weight some[LANES] = {};
  std::memcpy(some, p, size_t(count) * sizeof(Weight));
  return load(some);
}

template <int STEP>
static inline void outputs_as_floats(const Weight* p, float* out) {
  for (int i = 0; i < PANEL; ++i) out[i] = to_float(p[i * STEP]);
}
static inline void outputs_of(const Panel& w, int64_t column, float* out) {
  const Weight* p = w.column(column);
  if (w.outputs == PANEL && w.step == 1) return outputs_as_floats<1>(p, out);
  if (w.outputs == PANEL && w.step == 2) return outputs_as_floats<2>(p, out);
  for (int64_t i = 0; i < PANEL; ++i) out[i] = i < w.outputs ? to_float(p[i * w.step]) : 0.0f;
}

// Columns first to first + depth of a panel, as floats, one after the other.
template <int DEPTH>
static void copy_floats(const Panel& w, int64_t first, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; ++k) {
    outputs_of(w, first + k, out + k * PANEL);
    w.fetch(first + k + DEPTH);
  }
}
