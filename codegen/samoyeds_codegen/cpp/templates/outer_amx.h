// The matrix unit gives sums to memory only.

namespace amx {
static bool write_panels(const Panel*, int, int64_t, const Group&, Weight*) { return false; }
}  // namespace amx
