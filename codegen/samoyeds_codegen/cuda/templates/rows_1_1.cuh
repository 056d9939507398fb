// Element i of the sums as a dense row: a condensed row is one.
DEVICE Dense dense_rows(const float (&sums)[SETS][TOKENS / 2], int i, int lane) {
  return {{sums[0][i]}};
}
