// Which slots of which expert a thread block computes.
struct alignas(16) Tile {
  int32_t expert, first_slot, count, unused;
};
