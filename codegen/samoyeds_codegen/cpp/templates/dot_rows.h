// Few tokens an expert: tokens as rows, of what its kernel multiplies.

namespace dot {

static int64_t width(const Matrix& w) { return round_up(w.cols, 32); }
static int64_t bytes(int64_t count, const Matrix& w) { return count * width(w) * int64_t(sizeof(Row)); }

// One token, padded with zeros.
static void gather(const Arguments& a, int64_t token, char* rows, int64_t place) {
  const Weight* row = a.x + token * a.x_stride;
  Row* x = reinterpret_cast<Row*>(rows) + place * width(a.up);
  if constexpr (std::is_same_v<Row, Weight>) std::copy(row, row + a.hidden, x);
  else for (int64_t i = 0; i < a.hidden; ++i) store_as(x + i, to_float(row[i]));
  std::fill(x + a.hidden, x + width(a.up), Row{});
}
}  // namespace dot
