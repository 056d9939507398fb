// The matrix unit: eight tiles of 16 rows of 64 bytes.

namespace amx {

constexpr int WIDTH = 16;    // tokens of a tile
constexpr int COLUMNS = 32;  // of a chunk
constexpr int TILE = 1024;   // bytes of a chunk, of weights and of tokens
constexpr int MOST = 32;     // tiles whose sums are kept at a time

struct Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The unit is set up while one of these lives. The first six tiles may have fewer rows.
struct Unit {
  explicit Unit(int rows = 16) {
    Configuration set;
    for (int i = 0; i < 6; ++i) set.rows[i] = uint8_t(rows);
    _tile_loadconfig(&set);
  }
  ~Unit() { _tile_release(); }
};
}  // namespace amx
