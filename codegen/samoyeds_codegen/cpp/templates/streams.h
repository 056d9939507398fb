// How memory is read fastest. Intel's processors give more to several places at a time, and to who asks ahead; AMD's to
// who reads on in one place, and asking ahead only costs them time while there is little to compute.

static bool reads_on_in_one_place() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return false;
#endif
}
static const bool ONE_PLACE = reads_on_in_one_place();
