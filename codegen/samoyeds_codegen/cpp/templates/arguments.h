// What one call of a kernel is given.

struct Arguments {
  const Weight* x;  // [T, H], rows x_stride apart
  const void* ids;  // [T, K], int64 or int32
  const void* weights;  // [T, K], float or bf16
  void* out;  // [T, H], float or bf16
  int64_t x_stride, tokens, top_k, experts, hidden;
  int64_t ids_are_int64, weights_are_bf16, out_is_bf16, threads;
  int64_t few;  // bit n: whether rows of an expert with n tokens stay as they come, token by token; 62 is 62 or more
  Matrix gate, up, down;

  int64_t id(int64_t slot) const {
    return ids_are_int64 ? static_cast<const int64_t*>(ids)[slot] : static_cast<const int32_t*>(ids)[slot];
  }
  bool is_few(int64_t count) const { return few >> std::min<int64_t>(count, 62) & 1; }
  float weight(int64_t slot) const {
    return weights_are_bf16 ? to_float(static_cast<const bf16*>(weights)[slot])
                            : static_cast<const float*>(weights)[slot];
  }
};
