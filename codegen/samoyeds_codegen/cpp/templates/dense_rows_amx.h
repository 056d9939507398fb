// A chunk of a panel as a tile, for `dense_amx.h`.

namespace amx {

// 16 rows of 32 columns, zero past the last of those that are left; what is read next is fetched.
static inline void copy_chunk(const Panel& w, int64_t column, int64_t left, char* out) {
  const __mmask32 exist = existing(left);
  const int64_t next = std::min<int64_t>(DEPTH * COLUMNS, left - 1);
  for (int r = 0; r < PANEL; ++r) {
    __builtin_prefetch(w.rows[r] + column + next);
    _mm512_store_si512(out + r * 64, _mm512_maskz_loadu_epi16(exist, w.rows[r] + column));
  }
}
}  // namespace amx
