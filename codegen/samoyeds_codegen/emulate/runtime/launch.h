// The way in, from launch.py.

struct Buffer {
  const char* name;
  char* base;
  uint64_t bytes;
  int32_t initialised;
};

struct Request {
  void (*entry)(const void*);
  const char* const* image;  // begin and end of the kernel's library; begin and end of its __shared__ variables
  const void* parameters;
  const Buffer* buffers;  // by address
  int32_t buffer_count;
  uint32_t grid[3], block[3], cluster, shared_bytes;
  uint64_t seed;
};

inline void add_buffers(const Request& request) {
  for (int i = 0; i < request.buffer_count; ++i) {
    const Buffer& b = request.buffers[i];
    machine->global.push_back(make_space(b.name, b.base, b.bytes, -1, 0));
    for (size_t k = 0; k < b.bytes; ++k) machine->global.back().cells[k].flags = b.initialised ? Cell::INITIALISED : 0;
  }
}

inline void add_ctas() {
  machine->ctas.resize(machine->cluster);
  for (int i = 0; i < machine->cluster; ++i) {
    Cta& cta = machine->ctas[i];
    cta.memory.resize(machine->shared_bytes + 1024);
    char* base = cta.memory.data() + (1024 - reinterpret_cast<uintptr_t>(cta.memory.data()) % 1024) % 1024;
    cta.dynamic = make_space("dynamic shared memory", base, machine->shared_bytes, i, FIRST_SHARED_ADDRESS);
  }
}

inline void add_fibers() {
  machine->fibers.resize(size_t(machine->threads) * machine->cluster);
  for (Fiber& f : machine->fibers) {
    void* stack =
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE)) std::abort();  // the last page is a guard
    f.stack = static_cast<char*>(stack);
    f.touched = static_cast<uint32_t*>(std::calloc(STACK_BYTES / 4, 4));
  }
}

inline void release() {
  for (Fiber& f : machine->fibers) munmap(f.stack, STACK_BYTES), std::free(f.touched);
  for (Cta& cta : machine->ctas) std::free(cta.dynamic.cells);
  for (Space& s : machine->global) std::free(s.cells);
  std::free(machine->statics.cells);
  for (Group& g : machine->warpgroups)
    for (Matmul* m : g.products) delete m;
}

// Runs a kernel; what went wrong, if anything, is in `failure`.
extern "C" void emulated_launch(const Request* request, Failure* failure) {
  Machine here{};
  machine = &here;
  std::copy_n(request->grid, 3, here.grid);
  std::copy_n(request->block, 3, here.block);
  here.threads = int(here.block[0] * here.block[1] * here.block[2]);
  here.cluster = int(request->cluster);
  here.shared_bytes = request->shared_bytes;
  here.random = request->seed;
  here.shuffled = request->seed != 0;
  here.entry = request->entry;
  here.parameters = request->parameters;
  here.image = request->image[0];
  here.image_end = request->image[1];
  here.failure = failure;
  add_buffers(*request);
  char *statics = const_cast<char*>(request->image[2]), *end = const_cast<char*>(request->image[3]);
  if (statics) here.statics = make_space("__shared__ variables", statics, end - statics, 0, 0x100000);
  add_ctas();
  add_fibers();
  run_grid();
  release();
  machine = nullptr;
}
