// What the compiler calls before plain loads and stores (-fsanitize=thread), and where a pointer, an index or a number
// of the kernel's text is wrong by itself (-fsanitize=alignment and others). The sanitizers' own libraries are not
// linked.

constexpr uint64_t STEPS = 1ull << 24;  // of one thread between two waits; more is taken for an endless loop

inline void touch_stack(Fiber& f, const void* p, size_t bytes) {
  const size_t words = (reinterpret_cast<uintptr_t>(p) % 4 + bytes + 3) / 4;
  ++f.tick;
  for (size_t i = 0; i < words; ++i) {
    uint32_t& touched = f.touched_at(p)[i];
    if (touched == Fiber::OWNED) fail(f, Kind::IN_FLIGHT, 0, "a register of a wgmma that has not been waited for");
    touched = f.tick;
  }
}

inline void step(Fiber& f) {
  if (++f.steps > STEPS)
    fail(f, Kind::DEADLOCK, 0, text("%llu loads and stores and no end", (unsigned long long)STEPS));
  if (machine->shuffled && random_below(64) == 0) give_way();
}

inline const char* access_name(size_t bytes, bool write) {
  static const char* const loads[] = {"load of 1 byte", "load of 2 bytes", "load of 4 bytes", "load of 8 bytes",
                                      "load of 16 bytes"};
  static const char* const stores[] = {"store of 1 byte", "store of 2 bytes", "store of 4 bytes", "store of 8 bytes",
                                       "store of 16 bytes"};
  for (int i = 0; i < 5; ++i)
    if (bytes == size_t(1) << i) return write ? stores[i] : loads[i];
  return write ? "store of a struct" : "load of a struct";
}

inline void plain_access(const void* p, size_t bytes, bool write, const void* code) {
  if (!machine || !machine->current) return;
  Fiber& f = self();
  const Site site{access_name(bytes, write), 0, code};
  f.site = site;
  if (f.on_stack(p)) return touch_stack(f, p, bytes);
  step(f);
  const bool constant = p >= machine->image && p < machine->image_end && !machine->statics.holds(p);
  if (constant && !write) return;
  const Place place = place_of(f, p, bytes);
  if (write)
    write_as_thread(f, place, bytes);
  else
    read_as_thread(f, place, bytes);
}

#define HOOK(bytes)                                                                                          \
  void __tsan_read##bytes(void* p) { plain_access(p, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* p) { plain_access(p, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* p) { plain_access(p, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { plain_access(p, bytes, true, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* p) { plain_access(p, bytes, false, __builtin_return_address(0)); }  \
  void __tsan_volatile_write##bytes(void* p) { plain_access(p, bytes, true, __builtin_return_address(0)); }

extern "C" {
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16) void __tsan_read_range(void* p, size_t bytes) {
  plain_access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) { plain_access(p, bytes, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

void __ubsan_handle_type_mismatch_v1(SourceLocation* where, uintptr_t address) {
  Fiber& f = enter("load or store", where->line);
  if (f.on_stack(reinterpret_cast<void*>(address))) return;
  Space* space = find_space(f, reinterpret_cast<void*>(address));
  const uint64_t named = space ? Place{space, address - uintptr_t(space->base)}.address() : address;
  fail(f, Kind::MISALIGNED, named, "the address is not a multiple of the size of its type");
}

void __ubsan_handle_out_of_bounds(SourceLocation* where, uintptr_t index) {
  fail(enter("array index", where->line), Kind::OUT_OF_BOUNDS, index, text("index %lld", (long long)index));
}

#define ARITHMETIC(handler, what)                                   \
  void __ubsan_handle_##handler(SourceLocation* where) {            \
    fail(enter("arithmetic", where->line), Kind::OPERAND, 0, what); \
  }
ARITHMETIC(shift_out_of_bounds, "a shift by a negative number of bits or by all of them")
ARITHMETIC(divrem_overflow, "a division by zero, or one that overflows")
ARITHMETIC(add_overflow, "a sum that overflows")
ARITHMETIC(sub_overflow, "a difference that overflows")
ARITHMETIC(mul_overflow, "a product that overflows")
ARITHMETIC(negate_overflow, "a negation that overflows")
ARITHMETIC(float_cast_overflow, "a float that does not fit the integer it becomes")

// Before a load of several words by one instruction, past the coherent caches: nobody may write these bytes meanwhile.
const void* emulated_load(const void* p, unsigned bytes, const char* name, int line) {
  Fiber& f = enter(name, line);
  const Place place = place_of(f, p, bytes);
  check_alignment(f, place.address(), bytes);
  read_as_thread(f, place, bytes);
  for (size_t i = 0; i < bytes; ++i)
    if (place.space->cells[place.offset + i].write_epoch)
      fail(f, Kind::OPERAND, place.address() + i, "a non-coherent load of what the same kernel wrote");
  return place.host();
}
}
