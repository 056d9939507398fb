// Compiled kernels by name. Python adds each once it is loaded; nothing removes one.

class Kernels {
 public:
  using Run = int64_t (*)(const void* arguments);  // 0, or 1 if memory ran out

  void add(const std::string& name, Run run) {
    const std::lock_guard<std::mutex> guard(mutex_);
    found_[name] = run;
  }
  Run find(const std::string& name) const {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto at = found_.find(name);
    return at == found_.end() ? nullptr : at->second;
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::string, Run> found_;
};

static Kernels& kernels() {
  static Kernels all;
  return all;
}
