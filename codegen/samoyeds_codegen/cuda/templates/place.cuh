// Which tile of tokens and which group of rows a piece of work is. Pieces that run at a time are some neighbouring
// tiles, mostly of one expert, by the same rows, and then by the next rows: so weights come from memory once, while the
// tokens of these tiles stay in the cache.
constexpr int NEIGHBOURS = 8;

struct Place {
  int tile, row_group;
};

DEVICE Place place_of(int piece, int tiles, int row_groups) {
  const int share = NEIGHBOURS * row_groups, first = piece / share * NEIGHBOURS, rest = piece % share;
  const int width = tiles - first < NEIGHBOURS ? tiles - first : NEIGHBOURS;
  return {first + rest % width, rest / width};
}
