// Some panels times one or two tiles of tokens, on the matrix unit.

namespace amx {

constexpr bool LINES = true;  // of a row are read at once

// Sums of P panels and Q tiles, y[q * PANELS + p], over some columns; `fresh` starts them at zero. KEEP leaves what was
// read in `copies`.
template <int P, int Q, bool KEEP>
static inline void block(const Rows<P>& w, int64_t cols, const char* x, int64_t stride, bool fresh, Piece* copies,
                         float (*y)[PANEL * WIDTH]) {
  if (fresh) {
    _tile_zero(0);
    if (P > 1) _tile_zero(1);
    if (Q > 1) _tile_zero(2);
    if (P > 1 && Q > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, y[0], 64);
    if (P > 1) _tile_loadd(1, y[1], 64);
    if (Q > 1) _tile_loadd(2, y[(Q - 1) * PANELS], 64);
    if (P > 1 && Q > 1) _tile_loadd(3, y[(Q - 1) * PANELS + 1], 64);
  }
  for (int64_t c = 0; c * COLUMNS < cols; ++c) {
    _tile_loadd(4, w.first[0] + c * w.chunk_bytes, w.row_bytes);
    _tile_loadd(6, x + c * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (KEEP) _tile_stored(4, copies[0][c], 64);
    if (P > 1) {
      _tile_loadd(5, w.first[P - 1] + c * w.chunk_bytes, w.row_bytes);
      _tile_dpbf16ps(1, 5, 6);
      if (KEEP) _tile_stored(5, copies[P - 1][c], 64);
    }
    if (Q > 1) {
      _tile_loadd(7, x + stride + c * TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (P > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y[0], 64);
  if (P > 1) _tile_stored(1, y[1], 64);
  if (Q > 1) _tile_stored(2, y[(Q - 1) * PANELS], 64);
  if (P > 1 && Q > 1) _tile_stored(3, y[(Q - 1) * PANELS + 1], 64);
}
}  // namespace amx
