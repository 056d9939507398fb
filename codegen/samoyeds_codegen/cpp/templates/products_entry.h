// What Python calls. No exception leaves: the caller has no way to catch it.
}  // namespace samoyeds

// 0, or 1 if memory ran out.
template <class Product, class Call>
static int64_t run(const Call* call) {
  try {
    Product(*call).run();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

extern "C" {
int64_t samoyeds_call_size() { return int64_t(sizeof(samoyeds::Call)); }
int64_t samoyeds_product(const samoyeds::Call* call) { return run<samoyeds::Product>(call); }
}
