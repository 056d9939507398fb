// Compiled kernels by the name of their specification. Python adds each once it is loaded; nothing removes one.

struct Kernel {
  int64_t (*run)(const void* arguments) = nullptr;  // 0, or 1 if memory ran out
  int64_t n = 0, m = 0, vector = 0, group = 0;  // of packed weights
  int64_t order = 0;  // of dense weights: by columns; of packed ones: in strips
  int64_t few = 0;    // by number of tokens, a bit each: whether rows stay as they come
  int64_t most = -1;  // tokens an expert, on average, with more of which Python computes the block; -1: no such number

  int64_t parts() const { return n < m ? 3 : 2; }
};

class Kernels {
 public:
  void add(const std::string& name, const Kernel& kernel) {
    const std::lock_guard<std::mutex> guard(mutex_);
    found_[name] = kernel;
  }
  Kernel find(const std::string& name) const {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto at = found_.find(name);
    return at == found_.end() ? Kernel{} : at->second;
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::string, Kernel> found_;
};

static Kernels& kernels() {
  static Kernels all;
  return all;
}
