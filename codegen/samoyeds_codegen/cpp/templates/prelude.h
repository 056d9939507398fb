// Types that all files share. The specification above defines Weight, PANEL, GATED and what the weights
// need.

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One tensor of all experts: where expert e's part begins, as a stack or as tensors of their own.
template <class T>
struct PerExpert {
  const T* base;
  int64_t stride;
  const T* const* table;

  const T* operator[](int64_t e) const { return table ? table[e] : base + e * stride; }
};
