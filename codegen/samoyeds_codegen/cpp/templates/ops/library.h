// What is registered with torch, and what Python calls.

STABLE_TORCH_LIBRARY_IMPL(samoyeds, CPU, m) {
  m.impl("sparse_experts", TORCH_BOX(&sparse_experts::run));
  m.impl("choose_experts", TORCH_BOX(&choose_experts::run));
}
}  // namespace

extern "C" {
int64_t samoyeds_arguments_size() { return int64_t(sizeof(Arguments)); }

int64_t samoyeds_threads(int64_t work) { return threads_for(work); }

void samoyeds_add_kernel(const char* name, void* run, int64_t n, int64_t m, int64_t vector, int64_t group) {
  kernels().add(name, {reinterpret_cast<int64_t (*)(const Arguments*)>(run), n, m, vector, group});
}
}
