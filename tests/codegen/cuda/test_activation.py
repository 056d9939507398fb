"""Activations in CUDA: the functions that kernels call against torch, compiled for the CPU, as they are plain C++."""

import ctypes

import pytest
import torch

from samoyeds_codegen import expr
from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.activation import to_cpp
from samoyeds_codegen.cuda.emit import TEMPLATES
from tests.codegen.test_cpp_activation import EXPRESSIONS, POINTS

HEAD = """#include <cmath>
#include <cstdint>
#include <cstring>
#define DEVICE static inline
struct bfloat16 { uint16_t bits; };
DEVICE float to_float(bfloat16 x) { uint32_t b = uint32_t(x.bits) << 16; float y; memcpy(&y, &b, 4); return y; }
template <class T> DEVICE T from_float(float x) {
  uint32_t b; memcpy(&b, &x, 4);
  return {uint16_t(x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fff)};
}
"""


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loops = "\n".join(
        f'extern "C" void f{i}(const float* in, float* out, long n) {{\n'
        f"  for (long j = 0; j < n; ++j) {{ const float x = in[j]; out[j] = {to_cpp(text)}; }}\n}}"
        for i, text in enumerate(EXPRESSIONS)
    )
    functions = (TEMPLATES / "functions.cuh").read_text()
    return load(Source("cuda-activations", f"{HEAD}namespace samoyeds {{\n{functions}{loops}\n}}\n"))


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_against_torch(library: ctypes.CDLL, text: str) -> None:
    out = torch.empty_like(POINTS)
    function = getattr(library, f"f{EXPRESSIONS.index(text)}")
    function(ctypes.c_void_p(POINTS.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_long(len(POINTS)))
    expected = expr.evaluate(text, {"x": POINTS if "to(" in text else POINTS.double()}).float()
    finite = POINTS.isfinite()
    torch.testing.assert_close(out[finite], expected[finite], rtol=3e-6, atol=2e-7)
    assert torch.equal(out.isnan()[-1:], expected.isnan()[-1:])
