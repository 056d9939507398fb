"""Activation expressions: parsing, evaluation, names, refusals."""

import pytest
import torch
import torch.nn.functional as F

from samoyeds_codegen import expr

gate, up, x = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("silu(gate) * up", F.silu(gate) * up),
        ("gelu(gate, 'tanh') * up", F.gelu(gate, approximate="tanh") * up),
        ("square(relu(x))", torch.relu(x).square()),
        ("-x + 2 * x ** 2 / 3 - 1", -x + 2 * x**2 / 3 - 1),
        ("clamp(x, -0.5, None)", x.clamp(min=-0.5)),
        ("to(silu(to(gate, 'float64')), 'float32') * up", F.silu(gate.double()).float() * up),
        ("x", x),
    ],
)
def test_evaluate(text, expected):
    assert torch.equal(expr.evaluate(text, {"gate": gate, "up": up, "x": x}), expected)


def test_repeated_parts_are_computed_once():
    with torch.profiler.profile() as profile:
        expr.evaluate("silu(gate) * silu(gate) + silu(gate)", {"gate": gate})
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::silu") == 1


def test_every_function_is_callable():
    positive = torch.rand(3, 4) + 0.1
    extra = {"clamp": ", -1.0, 1.0", "to": ", 'float64'", "maximum": ", up", "minimum": ", up"}
    for name in expr.FUNCTIONS:
        result = expr.evaluate(f"{name}(gate{extra.get(name, '')})", {"gate": positive, "up": up})
        assert result.shape == positive.shape


def test_names():
    assert expr.names("silu(gate) * up") == {"gate", "up"}
    assert expr.names("square(relu(x))") == {"x"}
    assert expr.display_name("silu(gate) * up") == "swiglu"
    assert expr.display_name("silu(gate) + up") == "silu(gate) + up"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("silu(gate) *", "is not an expression"),
        ("softmax(gate)", "calls softmax"),
        ("gate @ up", "holds a MatMult"),
        ("weight * gate", "reads 'weight'"),
        ("gate.exp()", "calls gate.exp"),
        ("[gate]", "holds a List"),
        ("__import__('os')", "calls __import__"),
    ],
)
def test_refusals_name_the_part_at_fault(text, message):
    with pytest.raises(expr.ExpressionError, match=message):
        expr.parse(text)
