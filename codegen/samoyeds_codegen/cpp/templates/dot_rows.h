// Few tokens an expert: tokens as rows of floats.

namespace dot {

static int64_t width(const Matrix& w) { return round_up(w.cols, 32); }
static int64_t bytes(int64_t count, const Matrix& w) { return count * width(w) * int64_t(sizeof(float)); }

// One token as floats, padded with zeros.
static void gather(const Arguments& a, int64_t token, char* rows, int64_t place) {
  const Weight* row = a.x + token * a.x_stride;
  float* x = reinterpret_cast<float*>(rows) + place * width(a.up);
  for (int64_t i = 0; i < a.hidden; ++i) x[i] = to_float(row[i]);
  std::fill(x + a.hidden, x + width(a.up), 0.0f);
}
}  // namespace dot
