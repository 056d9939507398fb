// What of dense weights is multiplied at a time, and where that is read.

namespace amx {

constexpr int DEPTH = 8;
constexpr int PANELS = 4;  // of rows that go over the tiles together, in pairs, so that these are read less often

using Piece = char[DEPTH][TILE];  // of a panel: [chunk][row][column]

// Where the chunks of P panels are read: in the weights themselves, or in a copy.
template <int P>
struct Rows {
  const char* first[P];
  int64_t row_bytes, chunk_bytes;

  explicit Rows(const Piece* copies) : row_bytes(64), chunk_bytes(TILE) {
    for (int p = 0; p < P; ++p) first[p] = copies[p][0];
  }
  Rows(const Panel* w, int64_t column) : row_bytes(w->row_bytes()), chunk_bytes(64) {
    for (int p = 0; p < P; ++p) first[p] = w[p].tile(column);
  }
};
}  // namespace amx
