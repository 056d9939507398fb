// How the runtime calls a kernel whose one parameter is a struct, and where its library lies in memory.

template <class P>
__attribute__((no_sanitize("thread"))) void emulated_call(void (*kernel)(P), const void* parameters) {
  kernel(*static_cast<const P*>(parameters));
}
template <class P>
constexpr unsigned long emulated_size(void (*)(P)) {
  return sizeof(P);
}

extern "C" {
extern char __ehdr_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));
extern char __start_samoyeds_shared __attribute__((weak, visibility("hidden")));
extern char __stop_samoyeds_shared __attribute__((weak, visibility("hidden")));
const char* emulated_image[4] = {&__ehdr_start, &_end, &__start_samoyeds_shared, &__stop_samoyeds_shared};
void emulated_entry(const void* parameters) { emulated_call(&EMULATED_KERNEL, parameters); }
unsigned long emulated_parameter_bytes() { return emulated_size(&EMULATED_KERNEL); }
}
