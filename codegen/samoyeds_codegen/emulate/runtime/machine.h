// The state of one launch, and the two ways out of a fiber: it gives way, or it failed and nothing runs any more.

struct Collective {
  const char* name;
  uint64_t immediates;
  int line;
  std::bitset<128> mask, arrived;
  void* operands[128];
};

struct Matmul;  // wgmma.h

// A warp or a warpgroup: threads that execute some instructions together.
struct Group {
  int first, size;  // fibers
  uint16_t slot;    // of its matrix products
  std::vector<Collective*> pending;
  std::deque<Matmul*> products;
  int committed = 0;
};

struct NamedBarrier {
  int expected = 0;
  std::vector<int> arrived, waiting;  // fibers
  Clock clock;
};

struct Mbarrier {
  uint32_t address, count, pending;
  int64_t bytes;  // expected and not yet complete
  uint32_t phase;
  uint16_t slot, init_slot;
  uint32_t init_epoch;
  bool fenced;
  Clock arriving, completed;
  std::vector<int> waiting;
};

struct BulkCopy {
  Space* space;
  size_t offset;
  const char* source;
  uint32_t bytes, barrier;
};

struct Cta {
  uint32_t block[3];
  std::vector<char> memory;  // dynamic shared memory, with room to align it
  Space dynamic;
  NamedBarrier named[16];
  std::map<uint32_t, Mbarrier> mbarriers;
  std::deque<BulkCopy> copies;
  int live;  // threads that have not exited
};

struct Machine {
  uint32_t grid[3], block[3];
  int threads, cluster;  // threads of a block; blocks of a cluster
  uint32_t shared_bytes, cluster_serial = 0;
  uint64_t random;
  bool shuffled;
  void (*entry)(const void*);
  const void* parameters;
  const char *image, *image_end;
  std::vector<Space> global;  // by address
  Space statics{};            // __shared__ variables
  std::vector<Cta> ctas;
  std::vector<Fiber> fibers;
  std::vector<Group> warps, warpgroups;
  std::map<const void*, History> published;  // what atomics on an address tell
  NamedBarrier cluster_barrier;
  int mbarrier_slots = 0;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  Failure* failure;
};

thread_local Machine* machine;

constexpr int MBARRIERS = 64;  // of a block
constexpr uint32_t FIRST_SHARED_ADDRESS = 1024;

inline Fiber& self() { return *machine->current; }
inline Cta& cta_of(const Fiber& f) { return machine->ctas[f.cta]; }

// A number below `bound`; from a generator of its own, so that a seed means the same schedule everywhere.
inline uint32_t random_below(uint32_t bound) {
  machine->random = machine->random * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t((machine->random >> 33) % bound);
}

inline void give_way() {
  Fiber& f = self();
  f.steps = 0;
  swapcontext(&f.context, &machine->scheduler);
}

inline void wake(int fiber) { machine->fibers[fiber].state = Fiber::READY; }

inline void block(std::string why) {
  self().waits_for = std::move(why);
  self().state = Fiber::BLOCKED;
  give_way();
}

template <class... A>
std::string text(const char* format, A... arguments) {
  char buffer[512];
  std::snprintf(buffer, sizeof buffer, format, arguments...);
  return buffer;
}

inline void note_failure(const Fiber& who, Kind kind, uint64_t address, const std::string& detail) {
  Failure& out = *machine->failure;
  const int x = who.index;
  out.kind = kind;
  std::copy_n(cta_of(who).block, 3, out.block);
  out.thread[0] = x % machine->block[0];
  out.thread[1] = x / machine->block[0] % machine->block[1];
  out.thread[2] = x / (machine->block[0] * machine->block[1]);
  out.line = who.site.line;
  out.address = address;
  out.code = who.site.code ? static_cast<const char*>(who.site.code) - machine->image : 0;
  std::snprintf(out.instruction, sizeof out.instruction, "%s", who.site.instruction);
  std::snprintf(out.detail, sizeof out.detail, "%s", detail.c_str());
}

[[noreturn]] inline void fail(const Fiber& who, Kind kind, uint64_t address, const std::string& detail) {
  note_failure(who, kind, address, detail);
  setcontext(&machine->scheduler);
  std::abort();  // setcontext does not return
}

inline Fiber& enter(const char* instruction, int line) {
  self().site = {instruction, line, nullptr};
  return self();
}
