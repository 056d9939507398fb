// Element i of the sums as two dense rows.
DEVICE Dense dense_rows(const float (&sums)[SETS][TOKENS / 2], int i, int lane) {
  return {{sums[0][i] - sums[1][i], sums[1][i]}};
}
