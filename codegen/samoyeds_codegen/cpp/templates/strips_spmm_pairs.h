// Rows of a transposed tile that are pairs of columns, as bfloat16. Two out of four are one of six pairs, which are
// made for a record at a time, so that both kept values meet one row at once.

namespace spmm {

using Cell = uint32_t;
using Factor = uint32_t;
constexpr int MOST_NT = 4;
constexpr int STRIPS = 4;            // at a time
constexpr int STORED = 2, EACH = 6;  // rows for four columns
constexpr int FACTORS = CHUNK / 4;   // of a row of a record
constexpr int ROOM = FACTORS * EACH;  // rows that are made for a record

// Which of the six a code of two positions, the lower one first, is.
struct Choices {
  int8_t of[16] = {};
  constexpr Choices() {
    for (int i = 0, second = 1; second < 4; ++second)
      for (int first = 0; first < second; ++first) of[first | second << 2] = int8_t(i++);
  }
};
static constexpr Choices CHOICES;

// Which of a record's rows meets factor i, by the positions of a row of weights.
static inline int32_t row_of(uint32_t positions, int i) { return i * EACH + CHOICES.of[positions >> 4 * i & 15]; }

// The values of a record [factors of a row, rows], where they lie.
static inline const Factor* factors_of(const bf16* values, Factor*) { return reinterpret_cast<const Factor*>(values); }

static inline Vec all(Factor x) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(x))); }
static inline Vec times(Vec factor, const Cell* tokens, Vec sum) {
  return _mm512_dpbf16_ps(sum, __m512bh(factor), __m512bh(_mm512_loadu_si512(tokens)));
}

// The six rows of each four columns, of which the tile has 0 with 1 and 2 with 3.
template <int WIDTH>
static inline const Cell* met(const Cell* tile, Cell* room) {
  const __mmask32 odd = 0xaaaaaaaa;
  for (int i = 0; i < FACTORS; ++i, tile += STORED * WIDTH)
    for (int t = 0; t < WIDTH; t += LANES) {
      Cell* out = room + i * EACH * WIDTH + t;
      const __m512i low = _mm512_loadu_si512(tile + t), high = _mm512_loadu_si512(tile + WIDTH + t);
      const __m512i one = _mm512_srli_epi32(low, 16), two = _mm512_slli_epi32(high, 16);
      _mm512_store_si512(out, low);                                                      // 0, 1
      _mm512_store_si512(out + WIDTH, _mm512_mask_blend_epi16(odd, low, two));           // 0, 2
      _mm512_store_si512(out + 2 * WIDTH, _mm512_or_si512(one, two));                    // 1, 2
      _mm512_store_si512(out + 3 * WIDTH, _mm512_mask_blend_epi16(odd, low, high));      // 0, 3
      _mm512_store_si512(out + 4 * WIDTH, _mm512_mask_blend_epi16(odd, one, high));      // 1, 3
      _mm512_store_si512(out + 5 * WIDTH, high);                                         // 2, 3
    }
  return room;
}

// Tokens of some rows, from one on, as [cols / 2, width] pairs.
static void transpose_rows(const Rows& rows, int64_t first, int64_t tokens, int64_t cols, int64_t width, Cell* x) {
  for (int64_t c = 0; c < cols; c += CHUNK) {
    const int64_t left = std::clamp<int64_t>(rows.cols - c, 0, CHUNK);
    const __mmask32 exist = left == CHUNK ? 0xffffffffu : (1u << left) - 1;
    for (int64_t begin = 0; begin < width; begin += LANES) {
      __m512 pairs[LANES];
      for (int64_t t = 0; t < LANES; ++t) {
        const bool there = begin + t < tokens && left > 0;
        const Weight* row = there ? rows.row(first + begin + t) + c : rows.first;
        pairs[t] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there ? exist : 0, row));
      }
      transpose(pairs);
      for (int i = 0; i < CHUNK / 2; ++i) _mm512_storeu_ps(x + (c / 2 + i) * width + begin, pairs[i]);
    }
  }
}

// Two rows of floats as pairs.
static inline __m512i pairs_of(const float* first, const float* second) {
  const __m512i low = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(load(first))));
  const __m512i high = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(load(second))));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// A panel's activations, [PANEL, width].
static inline void store_cells(const float* h, int64_t width, Cell* out) {
  for (int i = 0; i < PANEL; i += 2)
    for (int64_t t = 0; t < width; t += LANES)
      _mm512_storeu_si512(out + i / 2 * width + t, pairs_of(h + i * width + t, h + (i + 1) * width + t));
}
}  // namespace spmm
