// Sizes of tiles, as the matrix unit wants them.

namespace amx {
constexpr int WIDTH = 16;    // tokens of a tile
constexpr int COLUMNS = 32;  // of a chunk
constexpr int TILE = 1024;   // bytes of a chunk, of weights and of tokens
constexpr int MOST = 32;     // tiles whose sums are kept at a time
}  // namespace amx
