// Many tokens an expert, bfloat16, on the matrix unit: 16 output rows times 16 tokens, 32 columns at a time.
//
// Weights are expanded to dense rows, a block of chunks at a time, which stay in the first cache while all tokens go
// over them; meanwhile the next block is expanded.

namespace amx {

constexpr int SPACE = 8;  // expanded tiles at a time; twice as many fill a third of the first cache, beside tokens

// Of which of its 32 columns a row keeps values, for BATCH chunks: each code of two positions becomes four bits.
constexpr int BATCH = 8;
static inline __m256i kept(const uint16_t* metadata, int64_t cols) {
  const __mmask32 exist = cols >= BATCH * COLUMNS ? 0xffffffffu : (1u << cols / 8) - 1;
  const __m256i codes = _mm256_maskz_loadu_epi8(exist, metadata);
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i bits = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));  // 1 << (code & 3) | 1 << (code >> 2)
  const __m256i low = _mm256_shuffle_epi8(bits, _mm256_and_si256(codes, nibble));
  const __m256i high = _mm256_shuffle_epi8(bits, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
  return _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
}

// Where in a tile a condensed row's values belong, in bytes, for each half of BATCH chunks.
static inline __m256i offsets(const Panel& w, int r, int64_t column, int64_t cols) {
  const __m128i half = _mm_setr_epi8(0, 16 / V, 32 / V, 48 / V, 64 / V, 80 / V, 96 / V, 112 / V, 128 / V, 144 / V,
                                     160 / V, 176 / V, 192 / V, 208 / V, 224 / V, 240 / V);
  const int64_t left = std::min<int64_t>(ceil_div(cols - column, V), 16);
  const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << left) - 1), w.selection[r] + column / V);
  const __m256i selected = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(bytes, half));
  const __m256i row = _mm256_add_epi16(_mm256_and_si256(selected, _mm256_set1_epi16(M - 1)),
                                       _mm256_set1_epi16(short(r / N * M)));
  return _mm256_slli_epi16(row, 6);
}

// Weights of P panels on their way from packed storage to dense tiles, DEPTH chunks of columns at a time. Work is cut
// into tiles, so that it can be done while the matrix unit multiplies the chunks before.
template <int P>
class Expansion {
 public:
  static constexpr int DEPTH = SPACE / P;

  // `next` are the panels that come after these, to be fetched.
  Expansion(const Panel* w, const Panel* next, int64_t cols) : w_(w), next_(next), cols_(cols) {}

  // Chunks of a block: all that is left of the columns, DEPTH at most.
  int64_t chunks(int64_t first) const { return std::min<int64_t>(DEPTH, ceil_div(cols_, COLUMNS) - first); }

  // Begin with the block of chunks `first` and following; there may be none.
  void begin(int64_t first) {
    first_ = first, chunk_ = 0, panel_ = 0, left_ = std::max<int64_t>(chunks(first), 0) * P;
    if (left_ && first % BATCH == 0)
      for (int p = 0; p < P; ++p) decode(w_[p], first * COLUMNS, codes_[p]);
  }

  // One more tile of the block, if there is one: out[chunk][panel][row][column].
  void step(char (*out)[P][TILE]) {
    if (left_ == 0) return;
    const int64_t c = first_ + chunk_;
    tile(w_[panel_], codes_[panel_], c, out[chunk_][panel_]);
    prefetch(next_[panel_], c);
    --left_, ++panel_;
    if (panel_ == P) panel_ = 0, ++chunk_;
  }

  void finish(char (*out)[P][TILE]) {
    while (left_ > 0) step(out);
  }

  // What the next panels need when their chunk c is due; values of two chunks are one line.
  static inline void prefetch(const Panel& next, int64_t c) {
    for (int r = int(c % 2); r < ROWS; r += 2) __builtin_prefetch(next.values[r] + c * COLUMNS / 2);
    if (c % BATCH == 0)
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next.metadata[r] + c * 2, 0, 2);
  }

 private:
  struct Codes {
    alignas(32) uint32_t masks[ROWS][BATCH];
    alignas(32) uint16_t offsets[ROWS][2 * BATCH];
  };

  void decode(const Panel& w, int64_t column, Codes& codes) const {
    const int64_t left = cols_ - column;
    for (int r = 0; r < ROWS; ++r) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes.masks[r]), kept(w.metadata[r] + column / 16, left));
      if (left < BATCH * COLUMNS && left % COLUMNS) codes.masks[r][left / COLUMNS] &= 0xffff;
      if (N != M)
        _mm256_store_si256(reinterpret_cast<__m256i*>(codes.offsets[r]), offsets(w, r, column, cols_));
    }
  }

  static inline void tile(const Panel& w, const Codes& codes, int64_t c, char* out) {
    constexpr bool pairs = N == 1 && M == 2 && V >= COLUMNS;  // then the other row of the pair gets zeros
    const uint32_t* mask = codes.masks[0] + c % BATCH;
    const uint16_t* offset = codes.offsets[0] + 2 * (c % BATCH);
    if (N != M && !pairs)
      for (int i = 0; i < PANEL; ++i) _mm512_store_si512(out + i * 64, _mm512_setzero_si512());
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const __m512i row = _mm512_maskz_expandloadu_epi16(mask[r * BATCH], w.values[r] + c * COLUMNS / 2);
      const uint64_t low = N == M ? uint64_t(r) * 64 : offset[r * 2 * BATCH], high = offset[r * 2 * BATCH + 1];
      if (N == M || V >= COLUMNS) {
        _mm512_store_si512(out + low, row);
        if (pairs) _mm512_store_si512(out + (low ^ 64), _mm512_setzero_si512());
      } else {
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + low), _mm512_castsi512_si256(row));
        _mm256_mask_storeu_epi16(out + high + 32, __mmask16(mask[r * BATCH] >> 16 ? 0xffff : 0),
                                 _mm512_extracti64x4_epi64(row, 1));
      }
    }
  }

  const Panel *w_, *next_;
  int64_t cols_, first_ = 0, chunk_ = 0, left_ = 0;
  int panel_ = 0;
  Codes codes_[P];
};

// Sums y[q][p] of P panels and Q tiles in the unit: 0 to P - 1 for the first tile, P to 2 P - 1 for the second.
template <int P, int Q>
static inline void start(bool fresh, float (*y)[4][PANEL * WIDTH]) {
  if (fresh) {
    _tile_zero(0);
    if (P * Q > 1) _tile_zero(1);
    if (P * Q > 2) _tile_zero(2);
    if (P * Q > 3) _tile_zero(3);
  } else {
    _tile_loadd(0, y[0][0], 64);
    if (P * Q > 1) _tile_loadd(1, y[1 / P][1 % P], 64);
    if (P * Q > 2) _tile_loadd(2, y[2 / P][2 % P], 64);
    if (P * Q > 3) _tile_loadd(3, y[3 / P][3 % P], 64);
  }
}
template <int P, int Q>
static inline void finish(float (*y)[4][PANEL * WIDTH]) {
  _tile_stored(0, y[0][0], 64);
  if (P * Q > 1) _tile_stored(1, y[1 / P][1 % P], 64);
  if (P * Q > 2) _tile_stored(2, y[2 / P][2 % P], 64);
  if (P * Q > 3) _tile_stored(3, y[3 / P][3 % P], 64);
}

// Add a block of chunks to them. After each tile of weights one of the next block is expanded: little at a time, as
// loads wait for stores before them that have the same place in a page.
template <int P, int Q>
static inline void block(char (*w)[P][TILE], int64_t chunks, const char* x, int64_t stride, Expansion<P>& expansion,
                         char (*space)[P][TILE]) {
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_loadd(6, x + c * TILE, 64);
    if (Q > 1) _tile_loadd(7, x + stride + c * TILE, 64);
    _tile_loadd(4, w[c][0], 64);
    _tile_dpbf16ps(0, 4, 6);
    if (Q > 1 && P == 1) _tile_dpbf16ps(1, 4, 7);
    if (Q > 1 && P == 2) _tile_dpbf16ps(2, 4, 7);
    expansion.step(space);
    if (P > 1) {
      _tile_loadd(5, w[c][1 % P], 64);
      _tile_dpbf16ps(1, 5, 6);
      if (Q > 1) _tile_dpbf16ps(3, 5, 7);
      expansion.step(space);
    }
    if (P > 2) {
      _tile_loadd(4, w[c][2 % P], 64);
      _tile_dpbf16ps(2, 4, 6);
      expansion.step(space);
    }
    if (P > 3) {
      _tile_loadd(5, w[c][3 % P], 64);
      _tile_dpbf16ps(3, 5, 6);
      expansion.step(space);
    }
  }
}

// y[tile][p][row][token] = rows of P panels times tokens of tiles, at most MOST of them, stride bytes apart.
template <int P>
static void multiply_dense(const Panel* w, const Panel* next, int64_t cols, const char* x, int64_t stride,
                           int64_t tiles, float (*y)[4][PANEL * WIDTH]) {
  constexpr int Q = P > 2 ? 1 : 2, DEPTH = Expansion<P>::DEPTH;
  alignas(64) char space[2][DEPTH][P][TILE];
  Expansion<P> expansion(w, next, cols);
  const int64_t all = ceil_div(cols, COLUMNS);
  expansion.begin(0);
  expansion.finish(space[0]);
  for (int64_t first = 0; first < all; first += DEPTH) {
    const int64_t chunks = expansion.chunks(first);
    const char* columns = x + first * TILE;
    char(*now)[P][TILE] = space[first / DEPTH % 2];
    char(*then)[P][TILE] = space[(first / DEPTH + 1) % 2];
    expansion.begin(first + DEPTH);
    for (int64_t t = 0; t < tiles; t += Q) {
      const bool pair = t + 1 < tiles && Q == 2;
      if (tiles > Q || first == 0) pair ? start<P, Q>(first == 0, y + t) : start<P, 1>(first == 0, y + t);
      pair ? block<P, Q>(now, chunks, columns + t * stride, stride, expansion, then)
           : block<P, 1>(now, chunks, columns + t * stride, stride, expansion, then);
      if (tiles > Q || first + DEPTH >= all) pair ? finish<P, Q>(y + t) : finish<P, 1>(y + t);
    }
    expansion.finish(then);
  }
}

// The same for 1 to 4 panels; where tiles are several, 2 at most are fastest.
static void multiply(const Panel* w, const Panel* next, int panels, int64_t cols, const char* x, int64_t stride,
                     int64_t tiles, float (*y)[4][PANEL * WIDTH]) {
  switch (panels) {
    case 1: return multiply_dense<1>(w, next, cols, x, stride, tiles, y);
    case 2: return multiply_dense<2>(w, next, cols, x, stride, tiles, y);
    case 3: return multiply_dense<3>(w, next, cols, x, stride, tiles, y);
    default: return multiply_dense<4>(w, next, cols, x, stride, tiles, y);
  }
}

// A strip is 16 blocks of two rows, two panels. If they share their choice of a row, condensed rows are a tile of their
// own, which belongs to the even or to the odd output rows: half of the work of the unit falls away. What is left out
// are sums of zeros, so the result is the same bit by bit, and pieces of work that are no whole strips need not care.
constexpr int STRIP = 2;
constexpr int STRIP_DEPTH = 16;  // chunks that are expanded at a time
constexpr bool SHARED = N == 1 && M == 2 && V >= COLUMNS && GROUP % 16 == 0;

// Whether strips of a projection that begin with an even panel lie within a group.
static bool in_groups(const Matrix& w) { return SHARED && w.first / M % 16 == 0; }

class Strip {
 public:
  alignas(64) char tiles[STRIP_DEPTH][TILE];
  int64_t count[2];                // of chunks that belong to the even, and to the odd rows
  int64_t chunks[2][STRIP_DEPTH];  // which these are

  // Chunks first and following of the panels as they are stored.
  void expand(const Panel* w, const Panel* next, int64_t first, int64_t chunks_of_block, int64_t cols) {
    count[0] = count[1] = 0;
    for (int64_t i = 0; i < chunks_of_block; ++i) {
      const int64_t c = first + i;
      const int choice = w[0].target(0, c * COLUMNS);
      chunks[choice][count[choice]++] = i;
      if (c % BATCH == 0) decode(w, c * COLUMNS, cols);
      for (int p = 0; p < STRIP; ++p) {
        Expansion<STRIP>::prefetch(next[p], c);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
          const Weight* values = w[p].values[r] + c * COLUMNS / 2;
          const __m512i row = _mm512_maskz_expandloadu_epi16(masks_[p][r][c % BATCH], values);
          _mm512_store_si512(tiles[i] + (p * ROWS + r) * 64, row);
        }
      }
    }
  }

 private:
  void decode(const Panel* w, int64_t column, int64_t cols) {
    for (int p = 0; p < STRIP; ++p)
      for (int r = 0; r < ROWS; ++r) {
        const __m256i masks = kept(w[p].metadata[r] + column / 16, cols - column);
        _mm256_store_si256(reinterpret_cast<__m256i*>(masks_[p][r]), masks);
      }
  }

  alignas(32) uint32_t masks_[STRIP][ROWS][BATCH];
};

// Sums of a strip and Q tiles of tokens over a block of chunks. Even rows are in 0 and 1, odd ones in 2 and 3; in y
// they alternate, as output rows do. Chunks of either kind are taken in turns, as no sum waits for another then.
template <int Q>
static inline void strip_block(const Strip& w, const char* x, int64_t stride, bool fresh, float (*y)[4][PANEL * WIDTH],
                               int at) {
  float *even[2] = {y[0][at], y[Q - 1][at]}, *odd[2] = {even[0] + WIDTH, even[1] + WIDTH};
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, even[0], 128);
    if (Q > 1) _tile_loadd(1, even[1], 128);
    _tile_loadd(2, odd[0], 128);
    if (Q > 1) _tile_loadd(3, odd[1], 128);
  }
  for (int64_t i = 0; i < std::max(w.count[0], w.count[1]); ++i) {
    if (i < w.count[0]) {
      const int64_t c = w.chunks[0][i];
      _tile_loadd(4, w.tiles[c], 64);
      _tile_loadd(6, x + c * TILE, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (Q > 1) {
        _tile_loadd(7, x + stride + c * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    if (i < w.count[1]) {
      const int64_t c = w.chunks[1][i];
      _tile_loadd(5, w.tiles[c], 64);
      _tile_loadd(6, x + c * TILE, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (Q > 1) {
        _tile_loadd(7, x + stride + c * TILE, 64);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, even[0], 128);
  if (Q > 1) _tile_stored(1, even[1], 128);
  _tile_stored(2, odd[0], 128);
  if (Q > 1) _tile_stored(3, odd[1], 128);
}

// What multiply does, for an even number of panels that are strips.
static void multiply_strips(const Panel* w, const Panel* next, int panels, int64_t cols, const char* x, int64_t stride,
                            int64_t tiles, float (*y)[4][PANEL * WIDTH]) {
  Strip strip;
  const int64_t all = ceil_div(cols, COLUMNS);
  for (int64_t first = 0; first < all; first += STRIP_DEPTH)
    for (int p = 0; p < panels; p += STRIP) {
      strip.expand(w + p, next + p, first, std::min<int64_t>(STRIP_DEPTH, all - first), cols);
      const char* columns = x + first * TILE;
      int64_t t = 0;
      for (; t + 1 < tiles; t += 2) strip_block<2>(strip, columns + t * stride, stride, first == 0, y + t, p);
      if (t < tiles) strip_block<1>(strip, columns + t * stride, stride, first == 0, y + t, p);
    }
}

// Products that are computed together: the more, the fewer times a tile of tokens is read.
static int together(int64_t tiles, bool strips) { return tiles == 1 || strips ? 4 : 2; }

// Features of panels first to last of h.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  const Unit unit;
  constexpr int EACH = GATED ? 2 : 1;  // products that a feature needs
  alignas(64) float y[MOST][4][PANEL * WIDTH], h[PANEL * WIDTH];
  std::vector<Panel> w, next;
  const bool strips = in_groups(a.up) && (!GATED || in_groups(a.gate));
  const int64_t in = tile_bytes(a.up), out = tile_bytes(a.down), step = together(tiles(g), strips) / EACH;
  for (int64_t panel = first; panel < last; panel += step) {
    const int panels = int(std::min(step, last - panel));
    w.clear(), next.clear();
    for (const Matrix* m : {&a.up, &a.gate})
      for (int64_t p = panel; p < panel + panels && (GATED || m == &a.up); ++p) {
        w.emplace_back(*m, g.expert, p);
        next.emplace_back(*m, g.expert, std::min(p + panels, m->panels() - 1));
      }
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, tiles(g) - begin);
      const auto product = strips && panel % 2 == 0 && panels % 2 == 0 ? multiply_strips : multiply;
      product(w.data(), next.data(), panels * EACH, a.up.cols, g.x + begin * in, in, count, y);
      for (int64_t t = 0; t < count; ++t) {
        char* tile = g.h + (begin + t) * out;
        for (int p = 0; p < panels; ++p) {
          float* gate = y[t][GATED ? panels + p : p];
          activate_panel(a, g.expert, panel + p, WIDTH, gate, y[t][p], h);
          if (H_BY_ROWS) store_rows(a, g, (begin + t) * WIDTH, panel + p, WIDTH, h);
          else store_pairs(h, tile + (panel + p) * TILE / 2);
        }
        const int64_t filled = (panel + panels) * TILE / 2;
        if (!H_BY_ROWS && panel + panels == a.up.panels()) std::memset(tile + filled, 0, size_t(out - filled));
      }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  const Unit unit;
  alignas(64) float y[MOST][4][PANEL * WIDTH];
  std::vector<Panel> w, next;
  const bool strips = in_groups(a.down);
  const int64_t stride = tile_bytes(a.down), step = together(tiles(g), strips);
  for (int64_t panel = first; panel < last; panel += step) {
    const int panels = int(std::min(step, last - panel));
    w.clear(), next.clear();
    for (int64_t p = panel; p < panel + panels; ++p) {
      const bool ends = p + panels >= last;
      const int64_t then = ends ? std::min(p - panel + first, last - 1) : p + panels;
      w.emplace_back(a.down, g.expert, p);
      next.emplace_back(a.down, ends ? g.next_expert : g.expert, then);
    }
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, tiles(g) - begin);
      const auto product = strips && panel % 2 == 0 && panels % 2 == 0 ? multiply_strips : multiply;
      product(w.data(), next.data(), panels, a.down.cols, g.h + begin * stride, stride, count, y);
      for (int64_t t = 0; t < count; ++t)
        for (int p = 0; p < panels; ++p)
          accumulate_tile(a, g, (begin + t) * WIDTH, panel + p, WIDTH, y[t][p], out);
    }
  }
}
}  // namespace amx
