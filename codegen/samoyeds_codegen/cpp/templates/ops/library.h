// What is registered with torch, and what Python calls.

STABLE_TORCH_LIBRARY_IMPL(samoyeds, CPU, m) {
  m.impl("sparse_experts", TORCH_BOX(&sparse_experts::run));
  m.impl("dense_experts", TORCH_BOX(&dense_experts::run));
  m.impl("choose_experts", TORCH_BOX(&choose_experts::run));
}
}  // namespace

extern "C" {
// By which a kernel is told to be of this version.
int64_t samoyeds_packed_arguments_size() { return int64_t(sizeof(packed::Arguments)); }
int64_t samoyeds_dense_arguments_size() { return int64_t(sizeof(dense::Arguments)); }

int64_t samoyeds_threads(int64_t work) { return threads_for(work); }

void samoyeds_add_kernel(const char* name, void* run, int64_t n, int64_t m, int64_t vector, int64_t group,
                         int64_t order, int64_t few, int64_t most) {
  kernels().add(name, {reinterpret_cast<int64_t (*)(const void*)>(run), n, m, vector, group, order, few, most});
}
}
