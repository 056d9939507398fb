// The matrix unit: eight tiles of 16 rows of 64 bytes.

namespace amx {

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
