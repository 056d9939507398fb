"""`samoyeds::moe_experts` against its float64 twin: forward, every gradient, all layouts, odd shapes and routings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_compile.errors import OperandError
from samoyeds_compile.ops import reference

ACTIVATIONS = {
    "concatenated": "silu(gate) * up",
    "interleaved": "(clamp(up, -7.0, 7.0) + 1) * (clamp(gate, None, 7.0) * sigmoid(clamp(gate, None, 7.0) * 1.702))",
    "separate": "gelu(gate, 'tanh') * up",
    "none": "square(relu(x))",
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def operands(seed, t, k, e, h, i, layout, weight_layout, bias, dtype=torch.float32, sentinels=True):
    """Random operands in the order of the op, then its keyword-like tail."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5).to(dtype)

    def stack(rows, columns):
        return randn(e, columns, rows) if weight_layout == "in_out" else randn(e, rows, columns)

    packed = 2 * i if layout in ("concatenated", "interleaved") else i
    separate = layout == "separate"
    ids = torch.randint(-1 if sentinels else 0, e + 1 if sentinels else e, (t, k), generator=g)
    return [
        randn(t, h), ids, randn(t, k), stack(i, h) if separate else None, stack(packed, h), stack(h, i),
        randn(e, i) if bias and separate else None, randn(e, packed) if bias else None, randn(e, h) if bias else None,
        ACTIVATIONS[layout], layout, weight_layout,
    ]  # fmt: skip


def call(args, dtype):
    return torch.ops.samoyeds.moe_experts(*args, dtype, None)


def results(function, args):
    """Output, and the gradients of all floating operands."""
    leaves = [a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    out = function(leaves)
    floating = [a for a in leaves if torch.is_tensor(a) and a.is_floating_point()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), floating, allow_unused=True)
    return [out, *(torch.zeros_like(a) if grad is None else grad for a, grad in zip(floating, grads, strict=True))]


def double(args):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]


def assert_like_reference(args, dtype):
    expected = results(lambda a: reference.moe_experts(*a), double(args))
    for function in (call, gathered):
        assert_close(results(lambda a, f=function: f(a, dtype), args), expected, dtype)


def gathered(args, dtype):
    return torch.ops.samoyeds.experts_gathered(*args, dtype, None)


def assert_close(actual, expected, dtype):
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        scale = max(float(theirs.detach().abs().max()), 1e-3) if theirs.numel() else 1.0
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(dtype, layout, weight_layout, bias):
    assert_like_reference(operands(1, 9, 3, 5, 24, 16, layout, weight_layout, bias, dtype), dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), t=st.integers(0, 40), k=st.integers(1, 4), e=st.integers(1, 9), h=st.integers(1, 40),
    i=st.integers(1, 40), layout=st.sampled_from(list(ACTIVATIONS)),
    weight_layout=st.sampled_from(["out_in", "in_out"]), bias=st.booleans(), sentinels=st.booleans(),
)  # fmt: skip
def test_any_shape(seed, t, k, e, h, i, layout, weight_layout, bias, sentinels):
    args = operands(seed, t, k, e, h, i, layout, weight_layout, bias, sentinels=sentinels)
    assert_like_reference(args, torch.float32)


@pytest.mark.parametrize("tokens", [1, 6, 300])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_cpu_path(dtype, aligned, tokens):
    """One grouped call, one call an expert, single rows: chosen by routing and alignment, all the same result."""
    h, i = (32, 16) if aligned else (33, 17)
    args = operands(2, tokens, 2, 12, h, i, "concatenated", "out_in", True, dtype, sentinels=False)
    assert_like_reference(args, dtype)


def test_all_tokens_on_one_expert_and_named_twice():
    args = operands(3, 8, 2, 4, 16, 8, "concatenated", "out_in", False, torch.float32)
    args[1] = torch.full((8, 2), 3)
    assert_like_reference(args, torch.float32)


def test_nobodys_rows_do_not_leak_nan():
    """Rows of sentinel slots are undefined on some devices; a NaN in a routing weight or a token must stay there."""
    args = operands(4, 4, 2, 4, 16, 8, "concatenated", "out_in", True, torch.float32, sentinels=False)
    args[1][2] = 4
    args[0][2] = float("nan")
    out, *grads = results(lambda a: call(a, torch.float32), args)
    assert torch.equal(out[2], torch.zeros(16))
    assert not any(g.isnan().any() for g in (*grads[2:], out))


@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(layout, requires_grad):
    args = operands(5, 6, 2, 4, 16, 8, layout, "out_in", True)
    args = [a.requires_grad_(requires_grad) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    torch.library.opcheck(torch.ops.samoyeds.moe_experts.default, (*args, torch.float32, None))
    torch.library.opcheck(torch.ops.samoyeds.experts_gathered.default, (*args, torch.float32, None))


def test_second_derivative():
    args = operands(6, 4, 2, 3, 6, 4, "concatenated", "out_in", True, torch.float64, sentinels=False)
    leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    floating = [a for a in leaves if torch.is_tensor(a) and a.is_floating_point()]

    def function(*tensors):
        filled = iter(tensors)
        return call([next(filled) if any(a is f for f in floating) else a for a in leaves], torch.float64)

    torch.autograd.gradcheck(function, floating)
    torch.autograd.gradgradcheck(function, floating)


def test_output_dtype_and_compute_dtype():
    """bf16 experts with fp32 routing weights: products in bf16, the sum in fp32, the result as asked."""
    args = operands(7, 5, 2, 4, 16, 8, "concatenated", "out_in", False, torch.bfloat16, sentinels=False)
    args[2] = args[2].float()
    op = torch.ops.samoyeds.moe_experts
    assert op(*args, torch.bfloat16, None).dtype == torch.float32
    assert op(*args, torch.bfloat16, torch.bfloat16).dtype == torch.bfloat16
    mixed = [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    assert torch.equal(op(*mixed, torch.bfloat16, None), op(*args, torch.bfloat16, None))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, 4), "x has rank 3"),
        (1, torch.zeros(5, 2, dtype=torch.int64), "expert_ids has shape"),
        (1, torch.zeros(6, 2), "expert_ids is torch"),
        (2, torch.zeros(6, 3), "expert_weights has shape"),
        (4, torch.zeros(16, 16), "up has rank 2"),
        (4, torch.zeros(4, 16, 15), "x has shape"),
        (5, torch.zeros(3, 16, 8), "offsets has shape"),
        (9, "silu(x)", "activation reads"),
        (10, "diagonal", "gate_up_layout is 'diagonal'"),
        (11, "in_in", "weight_layout is 'in_in'"),
    ],
)
def test_bad_operands_name_themselves(position, value, message):
    args = operands(8, 6, 2, 4, 16, 8, "concatenated", "out_in", False)
    args[position] = value
    with pytest.raises(OperandError, match=message):
        call(args, torch.float32)


def test_mixed_devices():
    args = operands(9, 6, 2, 4, 16, 8, "concatenated", "out_in", False)
    args[4] = args[4].to("meta")
    with pytest.raises((OperandError, RuntimeError), match=r"device|meta"):
        call(args, torch.float32)
