// Element i of the sums as two dense rows of the four in a block; all lanes of a warp call it together. The condensed
// rows of a block lie in lanes 4 apart. They may hold dense rows 0 to 2 and 1 to 3, so each gives the other what is not
// its own: the even lane ends with dense rows 0 and 1, the odd one with 2 and 3.
DEVICE Dense dense_rows(const float (&sums)[SETS][TOKENS / 2], int i, int lane) {
  const float second = sums[1][i], third = sums[2][i], first = sums[0][i] - second - third;
  const bool odd = lane / 4 % 2;
  const float other = __shfl_xor_sync(0xffffffffu, odd ? first : third, 4);
  return odd ? Dense{{second + other, third}} : Dense{{first, second + other}};
}
