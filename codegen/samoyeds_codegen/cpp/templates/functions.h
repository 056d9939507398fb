// The functions an activation may call. Without branches where it matters, so that loops over them become vectors.

static inline float exp(float x) {
  // 2^n * e^r with |r| <= ln2 / 2; the polynomial is Cephes' expf. Clamped where the result leaves the normal range.
  const float clamped = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
  const float n = clamped * 1.44269504088896341f + 12582912.0f - 12582912.0f;  // rounded to a whole number
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t whole = n == n ? int32_t(n) : 0;  // 2^128 needs two factors
  const float low = bits_as<float>((whole / 2 + 127) << 23), high = bits_as<float>((whole - whole / 2 + 127) << 23);
  const float y = (p * r * r + r + 1.0f) * low * high;
  return x > 88.7228f ? INFINITY : x < -87.3f ? 0.0f : y;
}
static inline float abs(float x) { return std::fabs(x); }
static inline float maximum(float x, float y) { return x != x ? x : y != y ? y : x > y ? x : y; }
static inline float minimum(float x, float y) { return x != x ? x : y != y ? y : x < y ? x : y; }
static inline float at_least(float x, float low) { return x < low ? low : x; }
static inline float at_most(float x, float high) { return x > high ? high : x; }
static inline float erf(float x) { return std::erf(x); }
static inline float log1p(float x) { return std::log1p(x); }
static inline float sqrt(float x) { return std::sqrt(x); }
static inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
static inline float square(float x) { return x * x; }
static inline float tanh(float x) { return std::tanh(x); }
static inline float power(float x, float y) { return std::pow(x, y); }
static inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
static inline float silu(float x) { return x / (1.0f + exp(-x)); }
static inline float relu(float x) { return at_least(x, 0.0f); }
static inline float relu6(float x) { return at_most(at_least(x, 0.0f), 6.0f); }
static inline float hardsigmoid(float x) { return relu6(x + 3.0f) / 6.0f; }
static inline float hardswish(float x) { return x * hardsigmoid(x); }
static inline float leaky_relu(float x, float slope = 0.01f) { return x > 0.0f ? x : x * slope; }
static inline float softsign(float x) { return x / (1.0f + abs(x)); }
static inline float softplus(float x, float beta = 1.0f, float threshold = 20.0f) {
  return x * beta > threshold ? x : std::log1p(exp(x * beta)) / beta;
}
static inline float mish(float x) { return x * std::tanh(softplus(x)); }
static inline float elu(float x, float alpha = 1.0f) { return x > 0.0f ? x : alpha * std::expm1(x); }
static inline float selu(float x) {
  return 1.0507009873554805f * (x > 0.0f ? x : 1.6732632423543772f * std::expm1(x));
}
static inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.7071067811865476f)); }
static inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
static inline float to_bfloat16(float x) { return to_float(to_bf16(x)); }
