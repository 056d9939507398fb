// Many tokens an expert, bfloat16, on the matrix unit: 16 tokens times 16 rows of a strip, 32 columns at a time.
//
// Tokens are the left side, as they lie: for 32 columns [16 tokens, 32 columns]. A record is expanded to the right
// side, [16 pairs of columns, 16 rows], while the unit multiplies those before. Sums are [16 tokens, 16 rows].

namespace amx {

constexpr int ROUTED = 8;  // tokens up to which sums are routed, not expanded weights
constexpr int DEPTH = 8;   // records that are expanded at a time if tokens are in several tiles
using Tile = char[TILE];
using Sum = float[WIDTH * STRIP];
using Sums = Sum[TILES];  // of a strip and a tile of tokens

static int64_t tiles(const Group& g) { return ceil_div(g.count, WIDTH); }
static int64_t tile_bytes(const Matrix& w) { return w.cols / COLUMNS * TILE; }
static int64_t bytes(int64_t count, const Matrix& w) { return ceil_div(count, WIDTH) * tile_bytes(w); }

// Rows of a tile for w, zero where there is no column. Those past the last token are left as they are: nobody reads
// what becomes of them.
static void gather(const Rows& rows, const Matrix& w, const Group& g, int64_t tile, char* out) {
  const int64_t tokens = std::min<int64_t>(WIDTH, g.count - tile * WIDTH);
  char* x = out + tile * tile_bytes(w);
  for (int64_t t = 0; t < tokens; ++t) {
    const Weight* row = rows.row(tile * WIDTH + t);
    for (int64_t c = 0; c < w.cols; c += COLUMNS) {
      const int64_t left = std::clamp<int64_t>(rows.cols - c, 0, COLUMNS);
      const __mmask32 exist = left == COLUMNS ? 0xffffffffu : (1u << left) - 1;
      _mm512_storeu_si512(x + c / COLUMNS * TILE + t * 64, _mm512_maskz_loadu_epi16(exist, left ? row + c : row));
    }
  }
}

// How the two values of four columns become two pairs: a byte of them for each byte of a pair, or zero.
struct Spread {
  uint32_t pair[2][16] = {};
  constexpr Spread() {
    for (uint32_t code = 0; code < 16; ++code)
      for (uint32_t column = 0; column < 4; ++column) {
        const uint32_t from = column == (code & 3) ? 0x0100 : column == code >> 2 ? 0x0302 : 0x8080;
        pair[column / 2][code] |= from << 16 * (column % 2);
      }
  }
};
alignas(64) static constexpr Spread SPREAD;

// To which of the output rows a strip's rows belong in a vector of columns: as lanes of TILES tiles of output rows.
class Route {
 public:
  Route(const Strip& w, int64_t vector) {
    if (TILES == 1) return;
    for (int k = 0; k < TILES; ++k)
      for (int s = 0; s < M / TILES; ++s) {
        const uint32_t kept = w.lanes(vector, k * M / TILES + s);
        lanes_[k] |= __mmask16(M == 2 ? kept : spread(kept, s, from_[k]));
      }
  }
  __m512i to(int k, __m512i x) const {
    if (TILES == 1) return x;
    if (M == 2) return _mm512_maskz_mov_epi32(lanes_[k], x);
    return _mm512_maskz_permutexvar_epi32(lanes_[k], _mm512_cvtepu8_epi32(load_from(k)), x);
  }

 private:
  // Of two lanes a block, which has sub-row s goes to lane s of the two.
  static uint32_t spread(uint32_t kept, int s, uint8_t* from) {
    uint32_t lanes = 0;
    for (int l = 0; l < STRIP; ++l)
      if (kept >> l & 1) lanes |= 1u << (l / 2 * 2 + s), from[l / 2 * 2 + s] = uint8_t(l);
    return lanes;
  }
  __m128i load_from(int k) const { return _mm_load_si128(reinterpret_cast<const __m128i*>(from_[k])); }

  __mmask16 lanes_[2] = {};
  alignas(16) uint8_t from_[2][STRIP] = {};
};

// A record as pairs of columns.
struct Expander {
  __m512i first = _mm512_load_si512(SPREAD.pair[0]), second = _mm512_load_si512(SPREAD.pair[1]);
  __m512i own = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // where in 16 bytes a row's values are

  template <class Store>
  void each(const Strip& w, int64_t chunk, const Store& store) const {
    const __m512i codes = _mm512_loadu_si512(w.positions + chunk * STRIP);
    const Weight* values = w.values + chunk * RECORD;
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const __m512i code = _mm512_srli_epi32(codes, unsigned(4 * g)), both = _mm512_loadu_si512(values + g * FOUR);
      store(2 * g, _mm512_shuffle_epi8(both, _mm512_or_si512(_mm512_permutexvar_epi32(code, first), own)));
      store(2 * g + 1, _mm512_shuffle_epi8(both, _mm512_or_si512(_mm512_permutexvar_epi32(code, second), own)));
    }
  }
  // Its rows as they are stored.
  void condensed(const Strip& w, int64_t chunk, char* out) const {
    each(w, chunk, [&](int row, __m512i x) { _mm512_store_si512(out + row * 64, x); });
  }
  // Its rows where they belong, zero elsewhere. With V < 32 the halves of a record have routes of their own.
  void routed(const Strip& w, const Route* route, int64_t chunk, Tile* out) const {
    each(w, chunk, [&](int row, __m512i x) {
      for (int k = 0; k < TILES; ++k) _mm512_store_si512(out[k] + row * 64, route[row * 2 / PART].to(k, x));
    });
  }
};

[[gnu::always_inline]] static inline void prefetch_all(const Strip& now, const Strip& next, int64_t chunk,
                                                       int64_t chunks) {
  for (int line = 0; line < Strip::LINES; ++line) prefetch(now, next, chunk, chunks, line);
}

// y[s] = up to ROUTED tokens times two strips. Condensed rows are multiplied, a vector of columns at a time, and what
// comes of it is added to the output rows: there are fewer tokens than rows of weights.
class Routed {
 public:
  Routed(const Strip* w, const Strip* next, int64_t cols, const char* x, int tokens, Sums* y)
      : w_(w), next_(next), chunks_(cols / COLUMNS), x_(x), tokens_(tokens), y_(y) {}

  void run() {
    for (int s = 0; s < 2; ++s)
      for (Sum& sum : y_[s]) std::fill(sum, sum + tokens_ * STRIP, 0.0f);
    for (int64_t c = 0; c < std::min<int64_t>(2, chunks_); ++c) expand(c);
    const int64_t vectors = chunks_ / PER;
    for (int64_t v = 0; v < vectors; v += 2) {
      multiply<0>(v);
      if (v) add(v - 1, 1);
      if (v + 1 < vectors) multiply<1>(v + 1);
      add(v, 0);
    }
    if (vectors % 2 == 0) add(vectors - 1, 1);
  }

 private:
  static constexpr int PER = V < COLUMNS ? 1 : V / COLUMNS;  // records of a vector

  void expand(int64_t c) {
    for (int s = 0; s < 2; ++s) expander_.condensed(w_[s], c, space_[c % 4][s]);
  }

  // One vector of both strips, in two tiles of the unit; what comes next is expanded meanwhile.
  template <int TURN>
  void multiply(int64_t vector) {
    if constexpr (TURN == 0) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t c = vector * PER; c < (vector + 1) * PER; ++c) {
      _tile_loadd(4, x_ + c * TILE, 64);
      _tile_loadd(6, space_[c % 4][0], 64);
      _tile_loadd(7, space_[c % 4][1], 64);
      if constexpr (TURN == 0) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      } else {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
      }
      if (c + 2 < chunks_) {
        for (int s = 0; s < 2; ++s) prefetch_all(w_[s], next_[s], c + 2, chunks_);
        expand(c + 2);
      }
    }
    if constexpr (TURN == 0) {
      _tile_stored(0, sums_[0][0], 64);
      _tile_stored(1, sums_[0][1], 64);
    } else {
      _tile_stored(2, sums_[1][0], 64);
      _tile_stored(3, sums_[1][1], 64);
    }
  }

  void add(int64_t vector, int turn) {
    for (int s = 0; s < 2; ++s) {
      const Route route(w_[s], vector);
      for (int t = 0; t < tokens_; ++t) {
        const __m512i sum = _mm512_load_si512(sums_[turn][s] + t * STRIP);
        for (int k = 0; k < TILES; ++k) {
          float* at = y_[s][k] + t * STRIP;
          _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), _mm512_castsi512_ps(route.to(k, sum))));
        }
      }
    }
  }

  const Strip *w_, *next_;
  int64_t chunks_;
  const char* x_;
  int tokens_;
  Sums* y_;
  Expander expander_;
  alignas(64) Tile space_[4][2];
  alignas(64) Sum sums_[2][2];
};

// Whether a strip's rows share their choice, so that a record as it is stored is a tile of output rows, and the other
// tile gets nothing: half of the work of the unit falls away. What is left out are sums of zeros.
constexpr bool SKIPS = SHARED && M == 2 && V >= COLUMNS;

// A record of a strip as tiles of output rows, or as the only one that is not zero.
struct Expanded {
  alignas(64) Tile tiles[SKIPS ? 1 : TILES];
  bool odd;  // which, if it is only one
};

class Expansion {
 public:
  Expansion(const Strip& w, const Strip& next, int64_t cols) : w_(w), next_(next), chunks_(cols / COLUMNS) {}

  void expand(int64_t chunk, Expanded& out) const {
    prefetch_all(w_, next_, chunk, chunks_);
    if (SKIPS) {
      out.odd = w_.lanes(chunk * COLUMNS / V, 1);
      return expander_.condensed(w_, chunk, out.tiles[0]);
    }
    constexpr int HALVES = COLUMNS / PART;
    const Route route[2] = {Route(w_, chunk * COLUMNS / V), Route(w_, (chunk * COLUMNS + (HALVES - 1) * PART) / V)};
    expander_.routed(w_, route, chunk, out.tiles);
  }

 private:
  const Strip &w_, &next_;
  int64_t chunks_;
  Expander expander_;
};

// Sums of Q tiles of tokens and a strip in the unit: tiles q * TILES + k.
template <int Q>
static inline void start(bool fresh, Sums* y) {
  constexpr int ALL = Q * TILES;
  if (fresh) {
    _tile_zero(0);
    if (ALL > 1) _tile_zero(1);
    if (ALL > 2) _tile_zero(2);
    if (ALL > 3) _tile_zero(3);
  } else {
    _tile_loadd(0, y[0][0], 64);
    if (ALL > 1) _tile_loadd(1, y[1 / TILES][1 % TILES], 64);
    if (ALL > 2) _tile_loadd(2, y[2 / TILES][2 % TILES], 64);
    if (ALL > 3) _tile_loadd(3, y[3 / TILES][3 % TILES], 64);
  }
}
template <int Q>
static inline void finish(Sums* y) {
  constexpr int ALL = Q * TILES;
  _tile_stored(0, y[0][0], 64);
  if (ALL > 1) _tile_stored(1, y[1 / TILES][1 % TILES], 64);
  if (ALL > 2) _tile_stored(2, y[2 / TILES][2 % TILES], 64);
  if (ALL > 3) _tile_stored(3, y[3 / TILES][3 % TILES], 64);
}
template <int Q>
static inline void step(const Expanded& w, const char* x, int64_t stride) {
  _tile_loadd(4, x, 64);
  if (Q > 1) _tile_loadd(5, x + stride, 64);
  _tile_loadd(6, w.tiles[0], 64);
  if (SKIPS && w.odd) {
    _tile_dpbf16ps(1, 4, 6);
    if (Q > 1) _tile_dpbf16ps(3, 5, 6);
    return;
  }
  _tile_dpbf16ps(0, 4, 6);
  if (Q > 1 && TILES == 1) _tile_dpbf16ps(1, 5, 6);
  if (Q > 1 && TILES > 1) _tile_dpbf16ps(2, 5, 6);
  if (SKIPS || TILES == 1) return;
  _tile_loadd(7, w.tiles[SKIPS ? 0 : TILES - 1], 64);
  _tile_dpbf16ps(1, 4, 7);
  if (Q > 1) _tile_dpbf16ps(3, 5, 7);
}

// y[t] = tokens of tile t times a strip. While the first tokens go over a record the one after it is expanded.
static void multiply(const Strip& w, const Strip& next, int64_t cols, const char* x, int64_t stride, int64_t tiles,
                     Sums* y) {
  Expanded space[DEPTH];
  const Expansion expansion(w, next, cols);
  const int64_t chunks = cols / COLUMNS;
  for (int64_t first = 0; first < chunks; first += DEPTH) {
    const int64_t depth = std::min<int64_t>(DEPTH, chunks - first);
    expansion.expand(first, space[0]);
    for (int64_t t = 0; t < tiles; t += 2) {
      const bool pair = t + 1 < tiles;
      const char* columns = x + t * stride + first * TILE;
      pair ? start<2>(first == 0, y + t) : start<1>(first == 0, y + t);
      for (int64_t c = 0; c < depth; ++c) {
        pair ? step<2>(space[c], columns + c * TILE, stride) : step<1>(space[c], columns + c * TILE, stride);
        if (t == 0 && c + 1 < depth) expansion.expand(first + c + 1, space[c + 1]);
      }
      pair ? finish<2>(y + t) : finish<1>(y + t);
    }
  }
}

// y[s] = one tile of tokens times two strips. Records are expanded two ahead.
static void multiply_two(const Strip* w, const Strip* next, int64_t cols, const char* x, Sums* y) {
  Expanded space[4][2];
  const Expansion expansion[2] = {{w[0], next[0], cols}, {w[1], next[1], cols}};
  const int64_t chunks = cols / COLUMNS;
  start<2>(true, y);
  for (int64_t c = 0; c < std::min<int64_t>(2, chunks); ++c)
    for (int s = 0; s < 2; ++s) expansion[s].expand(c, space[c][s]);
  for (int64_t c = 0; c < chunks; ++c) {
    const Expanded* now = space[c % 4];
    _tile_loadd(4, x + c * TILE, 64);
    _tile_loadd(6, now[0].tiles[0], 64);
    if (SKIPS && now[0].odd) _tile_dpbf16ps(1, 4, 6);
    else _tile_dpbf16ps(0, 4, 6);
    if (!SKIPS && TILES > 1) {
      _tile_loadd(7, now[0].tiles[SKIPS ? 0 : TILES - 1], 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (c + 2 < chunks) expansion[0].expand(c + 2, space[(c + 2) % 4][0]);
    _tile_loadd(6, now[1].tiles[0], 64);
    if (TILES == 1) _tile_dpbf16ps(1, 4, 6);
    else if (SKIPS && now[1].odd) _tile_dpbf16ps(3, 4, 6);
    else _tile_dpbf16ps(2, 4, 6);
    if (!SKIPS && TILES > 1) {
      _tile_loadd(7, now[1].tiles[SKIPS ? 0 : TILES - 1], 64);
      _tile_dpbf16ps(3, 4, 7);
    }
    if (c + 2 < chunks) expansion[1].expand(c + 2, space[(c + 2) % 4][1]);
  }
  finish<2>(y);
}

// y[strip][tile] for two strips, which may be the same.
static void multiply(const Strip* w, const Strip* next, int64_t cols, const char* x, int64_t stride, int64_t tokens,
                     Sums (*y)[MOST]) {
  Sums one[2];
  const int64_t tiles = ceil_div(tokens, WIDTH);
  if (tiles > 1) {
    for (int s = 0; s < 2; ++s) multiply(w[s], next[s], cols, x, stride, tiles, y[s]);
    return;
  }
  if (tokens <= ROUTED && V >= COLUMNS && TILES > 1) Routed(w, next, cols, x, int(tokens), one).run();
  else multiply_two(w, next, cols, x, one);
  for (int s = 0; s < 2; ++s) std::memcpy(y[s][0], one[s], sizeof(Sums));
}

// The output rows of a strip for one token, in order.
static inline void in_order(const Sums& sums, int token, float* y) {
  const __m512 first = _mm512_load_ps(sums[0] + token * STRIP);
  if (TILES == 1) return store(y, first);
  const __m512 second = _mm512_load_ps(sums[TILES - 1] + token * STRIP);
  const __m512i low = M == 2 ? _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
                             : _mm512_setr_epi32(0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
  store(y, _mm512_permutex2var_ps(first, low, second));
  store(y + 16, _mm512_permutex2var_ps(first, _mm512_add_epi32(low, _mm512_set1_epi32(8)), second));
}

// A tile's rows of tokens are as many as there are.
static int rows_of(const Group& g) { return int(std::min<int64_t>(g.count, WIDTH)); }

// Features of panels first to last of h.
static void up(const Arguments& a, const Group& g, int64_t first, int64_t last) {
  const Unit unit(rows_of(g));
  alignas(64) static thread_local Sums y[2][MOST];
  constexpr int EACH = GATED ? 2 : 1, PANELS = 2 / EACH;  // products that a feature needs; panels at a time
  const int64_t in = tile_bytes(a.up), out = tile_bytes(a.down);
  for (int64_t panel = first; panel < last; panel += PANELS) {
    const int64_t end = std::min<int64_t>(panel + PANELS, last), then = std::min(end, a.up.panels() - 1);
    const int64_t beside = GATED ? then : std::min(then + 1, a.up.panels() - 1);
    const Matrix& other = GATED ? a.gate : a.up;
    const Strip w[2] = {{a.up, g.expert, panel}, {other, g.expert, GATED ? panel : end - 1}};
    const Strip next[2] = {{a.up, g.expert, then}, {other, g.expert, beside}};
    for (int64_t begin = 0; begin < g.count; begin += MOST * WIDTH) {
      const int64_t tokens = std::min<int64_t>(MOST * WIDTH, g.count - begin);
      multiply(w, next, a.up.cols, g.x + begin / WIDTH * in, in, tokens, y);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t p = panel; p < end; ++p) {
          alignas(64) float up[PANEL], gate[PANEL], h[PANEL];
          in_order(y[GATED ? 0 : p - panel][t / WIDTH], int(t % WIDTH), up);
          if (GATED) in_order(y[1][t / WIDTH], int(t % WIDTH), gate);
          activate_panel(a, g.expert, p, 1, gate, up, h);
          if (H_BY_ROWS) {
            store_row(a, g, begin + t, p, h);
            continue;
          }
          char* row = g.h + (begin + t) / WIDTH * out + t % WIDTH * 64;
          bf16* at = reinterpret_cast<bf16*>(row + p * PANEL / COLUMNS * TILE) + p * PANEL % COLUMNS;
          for (int i = 0; i < PANEL; i += STRIP)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + i), __m256i(_mm512_cvtneps_pbh(load(h + i))));
          for (int64_t c = ceil_div(end * PANEL, COLUMNS); end == a.up.panels() && c < a.down.cols / COLUMNS; ++c)
            std::memset(row + c * TILE, 0, 64);
        }
    }
  }
}

// Adds what the expert gives for rows of panels first to last of out, [T, H].
static void down(const Arguments& a, const Group& g, int64_t first, int64_t last, float* out) {
  const Unit unit(rows_of(g));
  alignas(64) static thread_local Sums y[2][MOST];
  const int64_t stride = tile_bytes(a.down);
  for (int64_t begin = 0; begin < g.count; begin += MOST * WIDTH)
    for (int64_t panel = first; panel < last; panel += 2) {
      const int64_t end = std::min<int64_t>(panel + 2, last), tokens = std::min<int64_t>(MOST * WIDTH, g.count - begin);
      const bool ends = end == last;
      const int64_t expert = ends ? g.next_expert : g.expert, then = ends ? first : end;
      const Strip w[2] = {{a.down, g.expert, panel}, {a.down, g.expert, end - 1}};
      const Strip next[2] = {{a.down, expert, then}, {a.down, expert, std::min(then + 1, last - 1)}};
      multiply(w, next, a.down.cols, g.h + begin / WIDTH * stride, stride, tokens, y);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t p = panel; p < end; ++p) {
          alignas(64) float rows[PANEL];
          in_order(y[p - panel][t / WIDTH], int(t % WIDTH), rows);
          add_bias(a.down, g.expert, p, 1, rows);
          accumulate(a, g.slots[begin + t], p, rows, out);
        }
    }
}
}  // namespace amx
