"""Activations as C++: every function of expressions against torch, compiled for each instruction set there is."""

import ctypes

import pytest
import torch

from samoyeds_codegen import expr
from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.activation import to_cpp
from samoyeds_codegen.cpp.emit import TEMPLATES
from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_codegen.errors import UnsupportedSpecError

CALLS = {
    "clamp": ["clamp(x, -1.5, 2.0)", "clamp(x, None, 0.5)", "clamp(x, 0.5)", "clamp(x, 0.5, None)"],
    "elu": ["elu(x)", "elu(x, 0.3)"],
    "gelu": ["gelu(x)", "gelu(x, 'tanh')", "gelu(x, 'none')"],
    "leaky_relu": ["leaky_relu(x)", "leaky_relu(x, 0.2)"],
    "log1p": ["log1p(square(x))"],
    "maximum": ["maximum(x, x * x)"],
    "minimum": ["minimum(x, x * x)"],
    "rsqrt": ["rsqrt(square(x) + 1)"],
    "softplus": ["softplus(x)", "softplus(x, 2.0)", "softplus(x, 0.5, 3.0)"],
    "sqrt": ["sqrt(abs(x))"],
    "to": ["to(x * 0.1, 'bfloat16')", "to(x, 'float32')"],
}
OPERATORS = ["-x + 2 * x - x / 3", "x ** 2", "abs(x) ** 1.5", "(x + 1) * (sigmoid(x * 1.702) - 0.5)"]
EXPRESSIONS = [*OPERATORS, *(call for name in expr.FUNCTIONS for call in CALLS.get(name, [f"{name}(x)"]))]
SPECIAL = torch.tensor([0.0, -0.0, 1e-30, 88.0, -88.0, 120.0, -120.0, float("inf"), -float("inf"), float("nan")])
POINTS = torch.cat([torch.linspace(-30, 30, 20_001), torch.linspace(-1e-2, 1e-2, 101), SPECIAL])


@pytest.fixture(scope="module", params=usable_isas("float32"), ids=lambda isa: isa.name)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    loops = "\n".join(
        f'extern "C" void f{i}(const float* in, float* out, long n) {{\n'
        f"  for (long j = 0; j < n; ++j) {{ const float x = in[j]; out[j] = {to_cpp(text)}; }}\n}}"
        for i, text in enumerate(EXPRESSIONS)
    )
    parts = "".join((TEMPLATES / name).read_text() for name in ("numbers.h", "functions.h"))
    text = f"#include <cmath>\n#include <cstdint>\n#include <cstring>\nnamespace samoyeds {{\n{parts}{loops}\n}}\n"
    return load(Source("activations", text, request.param.flags))


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_against_torch(library: ctypes.CDLL, text: str) -> None:
    out, count = torch.empty_like(POINTS), ctypes.c_long(len(POINTS))
    function = getattr(library, f"f{EXPRESSIONS.index(text)}")
    function(ctypes.c_void_p(POINTS.data_ptr()), ctypes.c_void_p(out.data_ptr()), count)
    expected = expr.evaluate(text, {"x": POINTS if "to(" in text else POINTS.double()}).float()
    finite = POINTS.isfinite()
    torch.testing.assert_close(out[finite], expected[finite], rtol=3e-6, atol=2e-7)
    assert torch.equal(out.isnan()[-1:], expected.isnan()[-1:])


@pytest.mark.parametrize("text", ["silu(x)", "sigmoid(x)", "exp(x)", "relu(x)", "gelu(x, 'tanh')"])
def test_infinities(library: ctypes.CDLL, text: str) -> None:
    """Of the common functions those too; ``silu(-inf)`` is NaN in torch as well."""
    given, out = SPECIAL[-3:-1].clone(), torch.empty(2)
    function = getattr(library, f"f{EXPRESSIONS.index(text)}")
    function(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_long(2))
    torch.testing.assert_close(out, expr.evaluate(text, {"x": given}), equal_nan=True)


def test_every_function_is_covered() -> None:
    assert all(any(f"{name}(" in text for text in EXPRESSIONS) for name in expr.FUNCTIONS)


@pytest.mark.parametrize("text", ["to(x, 'float16')", "x * True", "x * 1e999"])
def test_refused(text: str) -> None:
    with pytest.raises(UnsupportedSpecError):
        to_cpp(text)
