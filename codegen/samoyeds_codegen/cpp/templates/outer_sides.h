// Rows of which each slot has one: its own, or that of its token.
struct Side {
  const Weight* first;
  int64_t stride, cols, of_tokens;
};
