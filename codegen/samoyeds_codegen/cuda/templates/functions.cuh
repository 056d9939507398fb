// The functions an activation may call, in float.
DEVICE float exp(float x) { return ::expf(x); }
DEVICE float erf(float x) { return ::erff(x); }
DEVICE float tanh(float x) { return ::tanhf(x); }
DEVICE float log1p(float x) { return ::log1pf(x); }
DEVICE float sqrt(float x) { return ::sqrtf(x); }
DEVICE float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
DEVICE float power(float x, float y) { return ::powf(x, y); }
DEVICE float abs(float x) { return ::fabsf(x); }
DEVICE float square(float x) { return x * x; }
// NaN stays, as in torch.
DEVICE float maximum(float x, float y) { return x != x ? x : y != y ? y : x > y ? x : y; }
DEVICE float minimum(float x, float y) { return x != x ? x : y != y ? y : x < y ? x : y; }
DEVICE float at_least(float x, float low) { return x < low ? low : x; }
DEVICE float at_most(float x, float high) { return x > high ? high : x; }
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
DEVICE float silu(float x) { return x / (1.0f + exp(-x)); }
DEVICE float relu(float x) { return at_least(x, 0.0f); }
DEVICE float relu6(float x) { return at_most(at_least(x, 0.0f), 6.0f); }
DEVICE float hardsigmoid(float x) { return relu6(x + 3.0f) / 6.0f; }
DEVICE float hardswish(float x) { return x * hardsigmoid(x); }
DEVICE float leaky_relu(float x, float slope = 0.01f) { return x > 0.0f ? x : x * slope; }
DEVICE float softsign(float x) { return x / (1.0f + abs(x)); }
DEVICE float softplus(float x, float beta = 1.0f, float threshold = 20.0f) {
  return x * beta > threshold ? x : log1p(exp(x * beta)) / beta;
}
DEVICE float mish(float x) { return x * tanh(softplus(x)); }
DEVICE float elu(float x, float alpha = 1.0f) { return x > 0.0f ? x : alpha * ::expm1f(x); }
DEVICE float selu(float x) {
  return 1.0507009873554805f * (x > 0.0f ? x : 1.6732632423543772f * ::expm1f(x));
}
DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erf(x * 0.7071067811865476f)); }
DEVICE float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
DEVICE float to_bfloat16(float x) { return to_float(from_float<bfloat16>(x)); }
