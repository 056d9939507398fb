// Memory with a shadow: for every byte, who wrote it last and who has read it since.

struct Cell {
  static constexpr int READERS = 4;  // more than that and one is forgotten, which one depends on the seed
  enum Flag : uint8_t { INITIALISED = 1, IN_FLIGHT = 2, ASYNC = 4, ATOMIC = 8, MBARRIER = 16, READ_BEFORE = 32 };
  uint32_t write_epoch;
  uint16_t write_slot;
  uint8_t flags, readers;
  uint32_t cluster;  // that made the accesses noted here; for global memory
  uint16_t read_slot[READERS];
  uint32_t read_epoch[READERS];
};

struct Space {
  std::string name;
  char* base;
  size_t bytes;
  int cta;                 // that owns it; -1: global memory
  uint32_t first_address;  // what the kernel calls its first byte, in the 32-bit window
  Cell* cells;
  bool holds(const void* p) const { return p >= base && p < base + bytes; }
  bool shared() const { return cta >= 0; }
};

inline Space make_space(std::string name, char* base, size_t bytes, int cta, uint32_t first_address) {
  Cell* cells = static_cast<Cell*>(std::calloc(bytes + 1, sizeof(Cell)));
  return {std::move(name), base, bytes, cta, first_address, cells};
}

// Who makes an access, and what happened before it.
struct Agent {
  uint16_t slot;
  uint32_t epoch;
  const Clock& clock;
  bool async;  // through the async proxy
};
