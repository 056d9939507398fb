// Packed weights: n of m sub-rows are kept in vectors of V columns; GROUP blocks of rows share a choice.

constexpr int ROWS = PANEL / M * N;    // condensed rows that hold a panel
constexpr int CHUNK = V < 32 ? V : 32; // columns whose positions are decoded together

// The condensed rows behind PANEL output rows of one expert. Past the last one they repeat it, and nobody reads that.
struct Panel {
  const Weight* values[ROWS];
  const uint16_t* metadata[ROWS];
  const uint8_t* selection[ROWS];

  Panel(const Matrix& w, int64_t expert, int64_t panel) {
    const int64_t last = (w.first + w.rows - 1) / M;
    for (int r = 0; r < ROWS; ++r) {
      const int64_t block = std::min((w.first + panel * PANEL) / M + r / N, last);
      const int64_t row = block * N + r % N;
      values[r] = w.values[expert] + row * (w.cols / 2);
      metadata[r] = w.metadata[expert] + row * (w.cols / 16);
      selection[r] = N == M ? nullptr : w.selection[expert] + (block / GROUP * N + r % N) * (w.cols / V);
    }
  }

  // Which of the PANEL output rows condensed row r adds to at a column; without selection, the row itself. M is a power
  // of two: whatever a damaged file holds, the row is one of the block's.
  int target(int r, int64_t column) const { return N == M ? r : r / N * M + (selection[r][column / V] & (M - 1)); }
};
