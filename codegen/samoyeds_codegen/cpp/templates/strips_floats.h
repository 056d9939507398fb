// How values meet the columns they were kept from: as floats, one after the other.

// Two values of each row, out of four columns.
struct Kept {
  Pair values;
  Codes first, second;

  // Takes the codes of these columns, and goes on to the next ones.
  Kept(const Weight* packed, int half, Codes& codes) : values(load_pair(packed, half)), first(codes) {
    codes.next();
    second = codes;
    codes.next();
  }
  Vec times(Vec columns, Vec sum) const {
    return fma(values.second, pick(columns, second), fma(values.first, pick(columns, first), sum));
  }
};
