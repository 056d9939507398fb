// Many tokens an expert, bfloat16, on the matrix unit: 16 output rows times 16 tokens, 32 columns at a time.
//
// Weights are expanded to dense rows, DEPTH chunks at a time, which stay in the first cache while all tokens go over
// them. Tokens lie in tiles as the unit wants them: for 32 columns [16 pairs of columns, 16 tokens] of two bf16.

namespace amx {

constexpr int WIDTH = 16;     // tokens of a tile
constexpr int COLUMNS = 32;   // of a chunk
constexpr int TILE = 1024;    // bytes of a chunk of a tile, and of expanded weights
constexpr int DEPTH = 8;
constexpr int MOST = 32;      // tiles whose sums are kept at a time

struct Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The unit is set up while one of these lives.
struct Unit {
  Unit() {
    const Configuration whole;
    _tile_loadconfig(&whole);
  }
  ~Unit() { _tile_release(); }
};

// For 8 chunks of a row, which of its 32 columns are kept: each code of two positions becomes four bits.
static inline __m256i kept(const uint16_t* metadata, int64_t cols) {
  const __mmask32 exist = cols >= 256 ? 0xffffffffu : (1u << cols / 8) - 1;
  const __m256i codes = _mm256_maskz_loadu_epi8(exist, metadata);
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i bits = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));  // 1 << (code & 3) | 1 << (code >> 2)
  const __m256i low = _mm256_shuffle_epi8(bits, _mm256_and_si256(codes, nibble));
  const __m256i high = _mm256_shuffle_epi8(bits, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
  return _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
}

// Chunks first and following of a panel as dense rows: out[chunk][row][column], zero where nothing is kept.
static inline void expand(const Panel& w, int64_t first, int64_t chunks, int64_t cols, char (*out)[TILE]) {
  alignas(32) uint32_t masks[ROWS][DEPTH];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t left = cols - first * COLUMNS;
    _mm256_store_si256(reinterpret_cast<__m256i*>(masks[r]), kept(w.metadata[r] + first * 2, left));
    if (left < DEPTH * COLUMNS && left % COLUMNS) masks[r][left / COLUMNS] &= 0xffff;
    for (int line = 0; line < DEPTH / 2; ++line)
      __builtin_prefetch(w.values[r] + (first + DEPTH + 2 * line) * COLUMNS / 2);
    __builtin_prefetch(w.metadata[r] + (first + 2 * DEPTH) * 2);
  }
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t column = (first + c) * COLUMNS;
    if (N != M)
      for (int i = 0; i < PANEL; ++i) _mm512_store_si512(out[c] + i * 64, _mm512_setzero_si512());
    for (int r = 0; r < ROWS; ++r) {
      const __m512i row = _mm512_maskz_expandloadu_epi16(masks[r][c], w.values[r] + column / 2);
      if (V >= COLUMNS || N == M) {
        _mm512_store_si512(out[c] + w.target(r, column) * 64, row);
      } else {
        const bool whole = column + V < cols;
        __m256i* half = reinterpret_cast<__m256i*>(out[c]);
        _mm256_store_si256(half + w.target(r, column) * 2, _mm512_castsi512_si256(row));
        if (whole) _mm256_store_si256(half + w.target(r, column + V) * 2 + 1, _mm512_extracti64x4_epi64(row, 1));
      }
    }
  }
}

// Sums of P panels and Q tiles, y[q][p][row][token], over some chunks; `fresh` starts them at zero.
template <int P, int Q>
static inline void block(char (*w)[DEPTH][TILE], int64_t chunks, const char* x, int64_t stride, bool fresh,
                         float (*y)[2][PANEL * WIDTH]) {
  if (fresh) {
    _tile_zero(0);
    if (P > 1) _tile_zero(1);
    if (Q > 1) _tile_zero(2);
    if (P > 1 && Q > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, y[0][0], 64);
    if (P > 1) _tile_loadd(1, y[0][1], 64);
    if (Q > 1) _tile_loadd(2, y[Q - 1][0], 64);
    if (P > 1 && Q > 1) _tile_loadd(3, y[Q - 1][1], 64);
  }
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_loadd(4, w[0][c], 64);
    _tile_loadd(6, x + c * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (P > 1) {
      _tile_loadd(5, w[P - 1][c], 64);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (Q > 1) {
      _tile_loadd(7, x + stride + c * TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (P > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y[0][0], 64);
  if (P > 1) _tile_stored(1, y[0][1], 64);
  if (Q > 1) _tile_stored(2, y[Q - 1][0], 64);
  if (P > 1 && Q > 1) _tile_stored(3, y[Q - 1][1], 64);
}

// y[tile][p][row][token] = rows of P panels times tokens of tiles, at most MOST of them, stride bytes apart.
template <int P>
static void multiply(const Panel* w, int64_t cols, const char* x, int64_t stride, int64_t tiles,
                     float (*y)[2][PANEL * WIDTH]) {
  alignas(64) char dense[P][DEPTH][TILE];
  const int64_t all = ceil_div(cols, COLUMNS);
  for (int64_t first = 0; first < all; first += DEPTH) {
    const int64_t chunks = std::min<int64_t>(DEPTH, all - first);
    for (int p = 0; p < P; ++p) expand(w[p], first, chunks, cols, dense[p]);
    const char* columns = x + first * TILE;
    int64_t t = 0;
    for (; t + 1 < tiles; t += 2) block<P, 2>(dense, chunks, columns + t * stride, stride, first == 0, y + t);
    if (t < tiles) block<P, 1>(dense, chunks, columns + t * stride, stride, first == 0, y + t);
  }
}

static void multiply(const Panel* w, int panels, int64_t cols, const char* x, int64_t stride, int64_t tiles,
                     float (*y)[2][PANEL * WIDTH]) {
  panels == 1 ? multiply<1>(w, cols, x, stride, tiles, y) : multiply<2>(w, cols, x, stride, tiles, y);
}

static int64_t tiles(const Group& g) { return ceil_div(g.count, WIDTH); }
static int64_t tile_bytes(const Matrix& w) { return ceil_div(w.cols, COLUMNS) * TILE; }
static int64_t bytes(int64_t count, const Matrix& w) { return ceil_div(count, WIDTH) * tile_bytes(w); }

// Tokens in pairs of columns, zero where there is no token or no column.
static void gather(const Arguments& a, const Group& g, int64_t tile) {
  const int64_t tokens = std::min<int64_t>(WIDTH, g.count - tile * WIDTH);
  char* x = g.x + tile * tile_bytes(a.up);
  for (int64_t c = 0; c < ceil_div(a.up.cols, COLUMNS); ++c) {
    const int64_t left = std::clamp<int64_t>(a.hidden - c * COLUMNS, 0, COLUMNS);
    const __mmask32 exist = left == COLUMNS ? 0xffffffffu : (1u << left) - 1;
    __m512 rows[WIDTH];
    for (int64_t t = 0; t < WIDTH; ++t) {
      const Weight* row = t < tokens ? a.x + g.slots[tile * WIDTH + t].token * a.x_stride + c * COLUMNS : a.x;
      rows[t] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(t < tokens ? exist : 0, row));
    }
    transpose(rows);
    for (int i = 0; i < WIDTH; ++i) _mm512_store_ps(x + c * TILE + i * 64, rows[i]);
  }
}

// A panel's activations as pairs of rows of the tile that `down` reads.
static inline void store_pairs(const float* h, char* out) {
  for (int i = 0; i < PANEL; i += 2) {
    const __m512i even = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(load(h + i * WIDTH))));
    const __m512i odd = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(load(h + (i + 1) * WIDTH))));
    _mm512_store_si512(out + i / 2 * 64, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}

// Features of panels first to last of h.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  const Unit unit;
  alignas(64) float y[MOST][2][PANEL * WIDTH], h[PANEL * WIDTH];
  const int64_t in = tile_bytes(a.up), out = tile_bytes(a.down);
  for (int64_t panel = first; panel < last; ++panel) {
    const Panel w[2] = {Panel(a.up, g.expert, panel), Panel(a.gate, g.expert, panel)};
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, tiles(g) - begin);
      multiply(w, GATED ? 2 : 1, a.up.cols, g.x + begin * in, in, count, y);
      for (int64_t t = 0; t < count; ++t) {
        char* tile = g.h + (begin + t) * out;
        activate_panel(a, g.expert, panel, WIDTH, y[t][1], y[t][0], h);
        store_pairs(h, tile + panel * TILE / 2);
        const int64_t filled = (panel + 1) * TILE / 2;
        if (panel + 1 == a.up.panels()) std::memset(tile + filled, 0, size_t(out - filled));
      }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  const Unit unit;
  alignas(64) float y[MOST][2][PANEL * WIDTH];
  const int64_t stride = tile_bytes(a.down);
  for (int64_t panel = first; panel < last; panel += 2) {
    const int panels = panel + 1 < last ? 2 : 1;
    const Panel w[2] = {Panel(a.down, g.expert, panel), Panel(a.down, g.expert, panel + panels - 1)};
    for (int64_t begin = 0; begin < tiles(g); begin += MOST) {
      const int64_t count = std::min<int64_t>(MOST, tiles(g) - begin);
      multiply(w, panels, a.down.cols, g.h + begin * stride, stride, count, y);
      for (int64_t t = 0; t < count * panels; ++t) {
        const int64_t slot = (begin + t / panels) * WIDTH, p = t % panels;
        accumulate_tile(a, g, slot, panel + p, WIDTH, y[t / panels][p], out);
      }
    }
  }
}
}  // namespace amx
