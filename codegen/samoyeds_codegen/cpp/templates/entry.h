// What Python calls. No exception leaves: the caller has no way to catch it.
}  // namespace samoyeds

extern "C" {
int64_t samoyeds_arguments_size() { return int64_t(sizeof(samoyeds::Arguments)); }

// 0, or 1 if memory ran out.
int64_t samoyeds_experts(const samoyeds::Arguments* arguments) {
  try {
    samoyeds::Block(*arguments).run();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
