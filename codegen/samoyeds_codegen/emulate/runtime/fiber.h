// A thread of the kernel: a fiber, so that all of them run on one thread of the machine in an order of our choosing.

constexpr size_t STACK_BYTES = 192 << 10;

struct Site {
  const char* instruction;
  int line;
  const void* code;
};

// A cp.async that was issued and has not landed, or (`arrival`) an arrival on an mbarrier that waits for those before
// it.
struct Copy {
  Space* space;
  size_t offset;
  const char* source;
  uint32_t bytes;
  bool valid;
  int group;  // -1: not committed
  uint32_t barrier;
  Clock release;  // of an arrival
  bool arrival;
};

struct Fiber {
  enum State { READY, BLOCKED, DONE };
  ucontext_t context;
  char* stack;
  State state;
  int cta, index;  // the linear index in its block
  uint16_t slot;
  Site site;
  std::string waits_for;
  Clock clock;
  History released, acquired;  // by its last __threadfence; by atomics since
  std::deque<Copy> copies;
  int groups;         // of copies, committed so far
  uint32_t* touched;  // per word of the stack: the tick of its last access; OWNED: by a wgmma that is under way
  uint32_t tick, fence_tick;
  bool wgmma_fenced;
  int registers;   // by setmaxnreg; 0: never said
  uint64_t steps;  // since it last gave way

  static constexpr uint32_t OWNED = 0xffffffffu;
  uint32_t epoch() const { return clock.seen[slot]; }
  // What it does from here on does not happen before what saw its clock so far.
  void advance() { ++clock.seen[slot]; }
  bool on_stack(const void* p) const { return p >= stack && p < stack + STACK_BYTES; }
  uint32_t* touched_at(const void* p) { return &touched[(static_cast<const char*>(p) - stack) / 4]; }
};
