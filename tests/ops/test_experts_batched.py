"""`samoyeds::experts_batched` against its float64 twin: forward, every gradient, all layouts, odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_compile.errors import OperandError
from samoyeds_compile.ops import reference
from tests.ops.operands import ACTIVATIONS, assert_close, double, floating, leaves_of, projections, randn, results


def operands(seed, e, c, h, i, *tail, **kwargs):
    g = torch.Generator().manual_seed(seed)
    dtype = kwargs.get("dtype", torch.float32)
    return [randn(g, dtype, e, c, h), *projections(g, e, h, i, *tail, **kwargs)]


def call(args, dtype, out_dtype=None):
    return torch.ops.samoyeds.experts_batched(*args, dtype, out_dtype)


def assert_like_reference(args, dtype):
    expected = results(lambda a: reference.experts_batched(*a), double(args))
    assert_close(results(lambda a: call(a, dtype), args), expected, dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("separate", ["", "gate,up,down", "down"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(dtype, layout, weight_layout, separate, bias):
    args = operands(1, 5, 6, 24, 16, layout, weight_layout, bias, dtype=dtype, separate=separate)
    assert_like_reference(args, dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), e=st.integers(1, 6), c=st.integers(0, 8), h=st.integers(1, 24), i=st.integers(1, 24),
    layout=st.sampled_from(list(ACTIVATIONS)), weight_layout=st.sampled_from(["out_in", "in_out"]), bias=st.booleans(),
    separate=st.sampled_from(["", "gate,up,down", "up"]),
)  # fmt: skip
def test_any_shape(seed, e, c, h, i, layout, weight_layout, bias, separate):
    args = operands(seed, e, c, h, i, layout, weight_layout, bias, separate=separate)
    assert_like_reference(args, torch.float32)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("separate", ["", "gate,up,down"], ids=["stack", "matrices"])
@pytest.mark.parametrize("layout", ["concatenated", "separate"])
def test_opcheck(layout, separate, requires_grad):
    args = leaves_of(operands(2, 4, 3, 16, 8, layout, "out_in", True, separate=separate), requires_grad)
    torch.library.opcheck(torch.ops.samoyeds.experts_batched.default, (*args, torch.float32, None))


@pytest.mark.parametrize("separate", ["", "gate,up,down"], ids=["stack", "matrices"])
def test_second_derivative(separate):
    leaves = leaves_of(operands(3, 3, 2, 6, 4, "separate", "out_in", True, dtype=torch.float64, separate=separate))
    inputs = floating(leaves)

    def function(*tensors):
        new = {id(old): tensor for old, tensor in zip(inputs, tensors, strict=True)}
        return call(torch.utils._pytree.tree_map(lambda a: new.get(id(a), a), leaves), torch.float64)

    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("separate", ["", "gate,up,down"], ids=["stack", "matrices"])
def test_symbolic_capacity(separate):
    """One graph for every number of rows."""
    args = operands(4, 4, 3, 16, 8, "separate", "out_in", True, separate=separate)
    graphs = []

    def count(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(lambda x, a: call([x, *a], torch.float32), fullgraph=True, dynamic=True, backend=count)
    for capacity in (3, 7, 20):
        x = torch.randn(4, capacity, 16)
        expected = results(lambda a: reference.experts_batched(*a), double([x, *args[1:]]))
        assert_close(results(lambda a: compiled(a[0], a[1:]), [x, *args[1:]]), expected, torch.float32)
    assert len(graphs) == 1


def test_dtypes():
    """fp32 parameters with products in bf16; a bias in fp32 is added in fp32."""
    mixed = operands(5, 4, 3, 16, 8, "concatenated", "out_in", False)
    in_bf16 = [mixed[0].bfloat16(), [], *([w.bfloat16() for w in weights] for weights in mixed[2:4]), *mixed[4:]]
    expected = call(in_bf16, torch.bfloat16)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(call(mixed, torch.bfloat16), expected)
    assert call(mixed, torch.bfloat16, torch.float32).dtype == torch.float32
    bias = torch.randn(4, 16)
    with_bias = call([*mixed[:6], bias, *mixed[7:]], torch.bfloat16)
    assert torch.equal(with_bias, (expected + bias.unsqueeze(1)).bfloat16())


def test_products_ignore_autocast():
    args = operands(6, 4, 3, 16, 8, "none", "out_in", True)
    expected = call(args, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(args, torch.float32), expected)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 16), "x has shape .3, 16.; pass"),
        (0, torch.zeros(5, 3, 16), "x has shape"),
        (0, torch.zeros(4, 3, 15), "up takes rows of width 16 and gets 15"),
        (1, [torch.zeros(4, 8, 16)], "gate does not fit the layout"),
        (2, [], "up is empty"),
        (2, [torch.zeros(4, 16, 16, device="meta")], "operands lie on"),
        (3, [torch.zeros(5, 16, 8)], "down has 5 experts and up 4"),
        (3, [torch.zeros(4, 8, 16)], "down takes rows of width 16 and gets 8"),
        (5, torch.zeros(4, 15), "bias has shape"),
        (7, "relu(x)", "activation reads"),
        (8, "diagonal", "gate_up_layout is 'diagonal'"),
        (9, "in_in", "weight_layout is 'in_in'"),
    ],
)
def test_bad_operands_name_themselves(position, value, message):
    args = operands(7, 4, 3, 16, 8, "concatenated", "out_in", False)
    args[position] = value
    with pytest.raises(OperandError, match=f"experts_batched: {message}"):
        call(args, torch.float32)
