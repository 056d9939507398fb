// What went wrong, in the layout that failure.py reads.

enum class Kind : int32_t {
  NONE,
  OUT_OF_BOUNDS,
  MISALIGNED,
  UNINITIALISED,
  RACE,
  IN_FLIGHT,
  FENCE,
  BARRIER,
  DEADLOCK,
  DIVERGENCE,
  METADATA,
  OPERAND
};

struct Failure {
  Kind kind;
  uint32_t block[3], thread[3];
  int32_t line;      // of the kernel's text; 0: ask `code`
  uint64_t address;  // shared: of the 32-bit window; global: bytes from the start of the buffer
  uint64_t code;     // of a plain load or store: bytes from the start of the kernel's library
  char instruction[64];
  char detail[1024];
};
