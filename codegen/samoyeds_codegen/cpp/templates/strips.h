// Packed weights in strips: 16 condensed rows side by side, so that lanes of a vector are rows.
//
// A record is 32 columns of a strip: 8 groups of four columns, of each the first and the second value of 16 rows (as
// floats one after the other, as bf16 in pairs), and 32 bits of positions for each row. n of m sub-rows are kept in
// vectors of V columns; GROUP blocks of rows share a choice, so one byte may stand for all rows of a strip.

constexpr int STRIP = 16;                // condensed rows
constexpr int CHUNK = 32;                // columns of a record
constexpr int FOUR = 2 * STRIP;          // values of four columns
constexpr int RECORD = 8 * FOUR;         // values
constexpr int PART = V < CHUNK ? V : CHUNK;  // columns of a record that share a choice
constexpr int TILES = PANEL / STRIP;     // output rows of a strip, in sixteens
constexpr bool SHARED = GROUP > 1;       // then by whole strips

struct Strip {
  const Weight* values;
  const uint32_t* positions;
  const uint8_t* selection;

  Strip(const Matrix& w, int64_t expert, int64_t panel) {
    const int64_t row = (w.first / PANEL + panel) * STRIP;  // condensed
    values = w.values[expert] + row * (w.cols / 2);
    positions = reinterpret_cast<const uint32_t*>(w.metadata[expert] + row * (w.cols / 16));
    if (N == M) selection = nullptr;
    else if (SHARED) selection = w.selection[expert] + row / N / GROUP * N * (w.cols / V);
    else selection = w.selection[expert] + row * (w.cols / V);
    stride_ = w.cols / V;
  }

  // In which lanes sub-row s is kept, as bits. M is a power of two: whatever a damaged file holds, it is one of them.
  uint32_t lanes(int64_t vector, int s) const {
    if (!SHARED) return equal(selection + vector * STRIP, M - 1, uint8_t(s));
    uint32_t found = 0;
    for (int r = 0; r < N; ++r)
      if ((selection[r * stride_ + vector] & (M - 1)) == s) found |= 0xffffu / ((1u << N) - 1) << r;
    return found;
  }

  static constexpr int LINES = RECORD * int(sizeof(Weight)) / 64;  // that hold the values of a record

 private:
  int64_t stride_;
};

// Fetch a line of the record that comes AHEAD of this one, be it of the strip that comes next; with the first line, the
// positions. Inlined, as compilers take a function that only fetches for one that does nothing.
constexpr int AHEAD = 8;
[[gnu::always_inline]] static inline void prefetch(const Strip& now, const Strip& next, int64_t chunk, int64_t chunks,
                                                   int line) {
  const bool ends = chunk + AHEAD >= chunks;
  const Strip& w = ends ? next : now;
  const int64_t ahead = chunk + AHEAD - (ends ? chunks : 0);
  __builtin_prefetch(reinterpret_cast<const char*>(w.values + ahead * RECORD) + line * 64);
  if (line == 0) __builtin_prefetch(w.positions + ahead * STRIP);
}
