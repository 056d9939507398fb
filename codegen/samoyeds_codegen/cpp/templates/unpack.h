// Dense matrices out of packed ones. Values are moved, not computed with, so `Value` is any type of their size.

// What a call is given; every field takes eight bytes.
struct UnpackCall {
  const Value* values;
  const uint16_t* metadata;  // null: all values of kept sub-rows are there
  const uint8_t* selection;  // null: all sub-rows are kept
  Value* out;                // [matrices, rows, cols]
  int64_t matrices, condensed, width;  // condensed rows and columns of storage, which may be padded
  int64_t rows, cols, threads;
};

constexpr int64_t UNIT = STRIPS ? 16 : 8 * N;  // condensed rows at a time; their sub-rows are all in as many blocks

// One matrix of storage.
struct Stored {
  const Value* values;
  const uint16_t* metadata;
  const uint8_t* selection;
  int64_t width;

  Stored(const UnpackCall& c, int64_t matrix) : width(c.width) {
    values = c.values + matrix * c.condensed * (INNER ? width / 2 : width);
    metadata = INNER ? c.metadata + matrix * c.condensed * (width / 16) : nullptr;
    selection = N < M ? c.selection + matrix * (c.condensed / GROUP) * (width / V) : nullptr;
  }

  // Which of its block's M rows a condensed row is in a vector. Whatever a damaged file holds, it is one of them.
  int64_t target(int64_t row, int64_t vector) const {
    const int64_t block = row / N, vectors = width / V;
    if (N == M) return row % N;
    const int64_t own = (STRIPS && GROUP == 1) ? (row / 16 * vectors + vector) * 16 + row % 16
                                               : (block / GROUP * N + row % N) * vectors + vector;
    return std::min<int64_t>(selection[own], M - 1);
  }
  // The positions of the two values of four columns, two bits each, and value i of them.
  uint32_t positions(int64_t row, int64_t four) const {
    const int64_t word = STRIPS ? (row / 16 * (width / 32) + four / 8) * 32 + row % 16 * 2 + four / 4 % 2
                                : row * (width / 16) + four / 4;
    return metadata[word] >> (four % 4 * 4) & 15;
  }
  Value value(int64_t row, int64_t four, int64_t i) const {
    if (!STRIPS) return values[row * (width / 2) + 2 * four + i];
    const Value* pairs = values + (row / 16 * (width / 4) + four) * 32;
    return sizeof(Value) == 2 ? pairs[row % 16 * 2 + i] : pairs[i * 16 + row % 16];
  }
};

// A vector of a condensed row, zero where nothing is stored.
static inline void write(const Stored& w, int64_t row, int64_t vector, Value* out) {
  if (!INNER) return void(std::copy_n(w.values + row * w.width + vector * V, V, out));
  for (int64_t k = 0; k < V; k += 4) {
    const int64_t four = (vector * V + k) / 4;
    const uint32_t at = w.positions(row, four);
    out[k + (at & 3)] = w.value(row, four, 0), out[k + (at >> 2)] = w.value(row, four, 1);
  }
}

// Condensed rows first to last of a matrix: a vector of a block of rows at a time, so that each line of the result is
// written once.
static void unpack(const UnpackCall& c, int64_t matrix, int64_t first, int64_t last) {
  const Stored w(c, matrix);
  Value* out = c.out + matrix * c.rows * c.cols;
  for (int64_t vector = 0; vector * V < c.cols; ++vector)
    for (int64_t block = first / N; block < last / N; ++block) {
      Value lines[M][V] = {};
      for (int64_t row = block * N; row < (block + 1) * N; ++row) write(w, row, vector, lines[w.target(row, vector)]);
      const int64_t rows = std::min(M, c.rows - block * M), cols = std::min(V, c.cols - vector * V);
      Value* place = out + block * M * c.cols + vector * V;
      for (int64_t i = 0; i < rows; ++i, place += c.cols) {
        if (cols == V) std::copy_n(lines[i], V, place);  // known at compile time
        else std::copy_n(lines[i], cols, place);
      }
    }
}

class Unpack {
 public:
  explicit Unpack(const UnpackCall& c) : c_(c) {}
  void run() {
    const int64_t units = (c_.condensed + UNIT - 1) / UNIT;
#pragma omp parallel for schedule(static) num_threads(int(c_.threads))
    for (int64_t i = 0; i < c_.matrices * units; ++i) {
      const int64_t first = i % units * UNIT;
      unpack(c_, i / units, first, std::min(first + UNIT, c_.condensed));
    }
  }

 private:
  const UnpackCall& c_;
};
