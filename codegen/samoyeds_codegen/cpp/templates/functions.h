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
// erf, tanh and expm1: near zero a polynomial, elsewhere by exp. The coefficients are least-squares fits in float64,
// weighed until the largest error is least; errors stay below 1.5e-7.
static inline float erf(float x) {
  const float t = std::fabs(x), s = x * x;
  float p = 7.88910909e-5f;
  p = p * s - 8.02083815e-4f;
  p = p * s + 5.18953499e-3f;
  p = p * s - 2.68544444e-2f;
  p = p * s + 1.12836002e-1f;
  p = p * s - 3.76126271e-1f;
  p = p * s + 1.28379166e-1f;
  const float u = t > 4.0f ? 4.0f : t;  // beyond it is 1
  float q = 1.41343442e-5f;             // -ln(erfc(u)) / u
  q = q * u - 3.52337195e-4f;
  q = q * u + 3.76468054e-3f;
  q = q * u - 2.40255518e-2f;
  q = q * u + 1.06549153e-1f;
  q = q * u + 6.34958267e-1f;
  q = q * u + 1.12869717f;
  const float large = 1.0f - exp(-u * q);
  return t < 1.0f ? x + x * p : x < 0.0f ? -large : large;
}
static inline float tanh(float x) {
  const float s = x * x;
  float p = 2.06908e-3f;
  p = p * s - 8.1239e-3f;
  p = p * s + 2.169387e-2f;
  p = p * s - 5.394896e-2f;
  p = p * s + 1.3333255e-1f;
  p = p * s - 3.3333333e-1f;
  const float large = 1.0f - 2.0f / (exp(2.0f * std::fabs(x)) + 1.0f);
  return std::fabs(x) < 0.7f ? x + x * s * p : x < 0.0f ? -large : large;
}
static inline float expm1(float x) {
  float p = 2.49570174e-5f;
  p = p * x + 1.99621851e-4f;
  p = p * x + 1.38886080e-3f;
  p = p * x + 8.33318204e-3f;
  p = p * x + 4.16666684e-2f;
  p = p * x + 1.66666671e-1f;
  p = p * x + 0.5f;
  return std::fabs(x) < 0.5f ? x + x * x * p : exp(x) - 1.0f;
}
static inline float abs(float x) { return std::fabs(x); }
static inline float maximum(float x, float y) { return x != x ? x : y != y ? y : x > y ? x : y; }
static inline float minimum(float x, float y) { return x != x ? x : y != y ? y : x < y ? x : y; }
static inline float at_least(float x, float low) { return x < low ? low : x; }
static inline float at_most(float x, float high) { return x > high ? high : x; }
static inline float log1p(float x) { return std::log1p(x); }
static inline float sqrt(float x) { return std::sqrt(x); }
static inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
static inline float square(float x) { return x * x; }
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
static inline float mish(float x) { return x * tanh(softplus(x)); }
static inline float elu(float x, float alpha = 1.0f) { return x > 0.0f ? x : alpha * expm1(x); }
static inline float selu(float x) {
  return 1.0507009873554805f * (x > 0.0f ? x : 1.6732632423543772f * expm1(x));
}
static inline float gelu(float x) { return 0.5f * x * (1.0f + erf(x * 0.7071067811865476f)); }
static inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
static inline float to_bfloat16(float x) { return to_float(to_bf16(x)); }
