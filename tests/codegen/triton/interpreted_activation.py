"""Activations as Triton: every function of expressions against torch. Run by test_interpreter.py."""

import pytest
import torch

from samoyeds_codegen import expr
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.triton.activation import to_triton
from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.emit import activation_functions
from tests.codegen.test_cpp_activation import CALLS, SPECIAL

OPERATORS = ["-x + 2 * x - x / 3", "x ** 2", "abs(x) ** 3.0", "(x + 1) * (sigmoid(x * 1.702) - 0.5)"]
EXPRESSIONS = [*OPERATORS, *(call for name in expr.FUNCTIONS for call in CALLS.get(name, [f"{name}(x)"]))]
POINTS = torch.cat([torch.linspace(-30, 30, 2_001), torch.linspace(-1e-2, 1e-2, 101), SPECIAL])
COUNT = len(POINTS)


@pytest.fixture(scope="module")
def module():
    texts = [to_triton(text) for text in EXPRESSIONS]
    loops = "\n\n\n".join(
        f"@triton.jit\ndef f{i}(IN, OUT, n):\n    at = tl.arange(0, 4096)\n"
        f"    x = tl.load(IN + at, mask=at < n)\n    tl.store(OUT + at, {text}, mask=at < n)"
        for i, text in enumerate(texts)
    )
    functions = "\n\n\n".join(activation_functions(f"({', '.join(texts)})"))
    head = "import triton\nimport triton.language as tl"
    return load_text("activations", f"{head}\n\n\n{functions}\n\n\n{loops}\n")


def computed(module, text, points):
    out = torch.full_like(points, float("nan"))
    getattr(module, f"f{EXPRESSIONS.index(text)}")[(1,)](points, out, len(points))
    return out


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_against_torch(module, text):
    out = computed(module, text, POINTS)
    expected = expr.evaluate(text, {"x": POINTS if "to(" in text else POINTS.double()}).float()
    # The interpreter cuts to bfloat16 instead of rounding.
    rtol = 2**-7 if "bfloat16" in text else 3e-6
    finite = POINTS.isfinite()
    torch.testing.assert_close(out[finite], expected[finite], rtol=rtol, atol=2e-7)
    assert torch.equal(out.isnan()[-1:], expected.isnan()[-1:])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("text", ["silu(x)", "sigmoid(x)", "exp(x)", "relu(x)", "gelu(x, 'tanh')", "softplus(x)"])
def test_infinities(module, text):
    given = SPECIAL[-3:-1].clone()
    torch.testing.assert_close(computed(module, text, given), expr.evaluate(text, {"x": given}), equal_nan=True)


def test_rounding_is_seen(module):
    """A step of the model that rounds is no step that can be left out."""
    text = "to(x * 0.1, 'bfloat16')"
    out = computed(module, text, POINTS)[: COUNT - 3]
    assert torch.equal(out, out.bfloat16().float()) and not torch.equal(out, POINTS[: COUNT - 3] * 0.1)


def test_every_function_is_covered():
    assert all(any(f"{name}(" in text for text in EXPRESSIONS) for name in expr.FUNCTIONS)


@pytest.mark.parametrize("text", ["to(x, 'float64')", "x * True", "x * 1e999", "x ** 1.5", "x ** x", "x ** 9"])
def test_refused(text):
    with pytest.raises(UnsupportedSpecError):
        to_triton(text)
