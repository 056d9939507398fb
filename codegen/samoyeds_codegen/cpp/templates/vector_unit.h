// In place of the matrix unit, where vectors multiply pairs of bfloat16: nothing has to be set up.

namespace amx {
struct Unit {};
}  // namespace amx
