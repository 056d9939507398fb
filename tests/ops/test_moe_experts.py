"""`samoyeds::moe_experts` against its float64 twin: forward, every gradient, all layouts, odd shapes and routings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from samoyeds_compile.errors import OperandError
from samoyeds_compile.ops import reference
from tests.ops.operands import ACTIVATIONS, assert_close, double, leaves_of, operands, results


def call(args, dtype):
    return torch.ops.samoyeds.moe_experts(*args, dtype, None)


def gathered(args, dtype):
    return torch.ops.samoyeds.experts_gathered(*args, dtype, None)


def assert_like_reference(args, dtype):
    expected = results(lambda a: reference.moe_experts(*a), double(args))
    stacked = all(w.dim() == 3 for weights in args[3:6] for w in weights)
    for function in (call, gathered) if stacked else (call,):
        assert_close(results(lambda a, f=function: f(a, dtype), args), expected, dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(dtype, layout, weight_layout, bias):
    assert_like_reference(operands(1, 9, 3, 5, 24, 16, layout, weight_layout, bias, dtype), dtype)


@pytest.mark.parametrize("weighting", ["output", "input"])
@pytest.mark.parametrize("separate", ["gate,up,down", "gate,up", "down", "gate"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_separate_matrices(dtype, weight_layout, separate, weighting):
    """Every operand may be a stack or matrices, whatever the others are."""
    args = operands(10, 9, 3, 5, 24, 16, "separate", weight_layout, True, dtype, separate=separate, weighting=weighting)
    assert_like_reference(args, dtype)


@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighting_of_the_input(dtype, layout):
    assert_like_reference(operands(11, 9, 3, 5, 24, 16, layout, "out_in", True, dtype, weighting="input"), dtype)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000), t=st.integers(0, 40), k=st.integers(1, 4), e=st.integers(1, 9), h=st.integers(1, 40),
    i=st.integers(1, 40), layout=st.sampled_from(list(ACTIVATIONS)),
    weight_layout=st.sampled_from(["out_in", "in_out"]), bias=st.booleans(), sentinels=st.booleans(),
    separate=st.sampled_from(["", "gate,up,down", "up", "gate,down"]), weighting=st.sampled_from(["output", "input"]),
)  # fmt: skip
def test_any_shape(seed, t, k, e, h, i, layout, weight_layout, bias, sentinels, separate, weighting):
    args = operands(seed, t, k, e, h, i, layout, weight_layout, bias, sentinels=sentinels, separate=separate,
                    weighting=weighting)  # fmt: skip
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


@pytest.mark.parametrize("weighting", ["output", "input"])
@pytest.mark.parametrize(("function", "separate"), [(call, ""), (call, "gate,up,down"), (gathered, "")])
def test_nobodys_rows_do_not_leak_nan(function, weighting, separate):
    """Rows of sentinel slots are undefined on some devices; what a routing weight holds there must stay there.

    One token has only sentinels, and with NaN in it must not reach anything either; `experts_gathered` runs its rows
    through an expert, which with weights on the output needs a token that is finite.
    """
    args = operands(4, 4, 2, 4, 16, 8, "concatenated", "out_in", True, torch.float32, sentinels=False,
                    weighting=weighting, separate=separate)  # fmt: skip
    args[1][2], args[1][1, 1] = 4, -1
    args[2][2] = args[2][1, 1] = float("nan")
    if function is call or weighting == "input":
        args[0][2] = float("nan")
    out, grad_x, grad_weights, *grads = results(lambda a: function(a, torch.float32), args)
    assert torch.equal(out[2], torch.zeros(16)) and torch.equal(grad_x[2], torch.zeros(16))
    assert torch.equal(grad_weights[2], torch.zeros(2)) and grad_weights[1, 1] == 0
    assert not any(g.isnan().any() for g in (out, grad_x, grad_weights, *grads))


@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(layout, requires_grad):
    args = leaves_of(operands(5, 6, 2, 4, 16, 8, layout, "out_in", True), requires_grad)
    torch.library.opcheck(torch.ops.samoyeds.moe_experts.default, (*args, torch.float32, None))
    torch.library.opcheck(torch.ops.samoyeds.experts_gathered.default, (*args, torch.float32, None))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck_separate_matrices_and_input_weighting(requires_grad):
    args = operands(5, 6, 2, 4, 16, 8, "separate", "out_in", True, separate="gate,up", weighting="input")
    args = leaves_of(args, requires_grad)
    torch.library.opcheck(torch.ops.samoyeds.moe_experts.default, (*args, torch.float32, None))


@pytest.mark.parametrize("weighting", ["output", "input"])
@pytest.mark.parametrize("separate", ["", "up,down"], ids=["stack", "matrices"])
def test_second_derivative(separate, weighting):
    args = operands(6, 4, 2, 3, 6, 4, "concatenated", "out_in", True, torch.float64, separate=separate,
                    weighting=weighting)  # fmt: skip
    args[1] = torch.tensor([[0, 3], [1, 0], [2, 2], [0, -1]])  # with sentinels: their derivatives are zero
    leaves = leaves_of(args)
    floating = [a for a in torch.utils._pytree.tree_leaves(leaves) if torch.is_tensor(a) and a.is_floating_point()]

    def function(*tensors):
        new = {id(old): tensor for old, tensor in zip(floating, tensors, strict=True)}
        return call(torch.utils._pytree.tree_map(lambda a: new.get(id(a), a), leaves), torch.float64)

    torch.autograd.gradcheck(function, floating)
    torch.autograd.gradgradcheck(function, floating)


def test_input_weighting_promotes_before_the_cast():
    """bf16 rows and fp32 routing weights: the product is rounded once, from fp32 to the dtype of the products."""
    args = operands(7, 5, 2, 4, 16, 8, "concatenated", "out_in", False, torch.bfloat16, sentinels=False,
                    weighting="input")  # fmt: skip
    args[2] = torch.rand(5, 2) + 0.3
    ids, weights = args[1], args[2]
    rows = (args[0].float().repeat_interleave(2, 0) * weights.reshape(-1, 1)).to(torch.bfloat16)
    alone = [rows, ids.reshape(-1, 1), torch.ones(10, 1), *args[3:12], "output"]
    expected = torch.ops.samoyeds.moe_experts(*alone, torch.bfloat16, torch.bfloat16).view(5, 2, 16).sum(1)
    actual = call(args, torch.bfloat16)
    assert actual.dtype == torch.bfloat16  # no routing weights after the experts
    assert torch.equal(actual, expected)
    assert torch.ops.samoyeds.moe_experts(*args, torch.bfloat16, torch.float32).dtype == torch.float32


def test_one_expert_is_told_apart_by_rank():
    args = operands(12, 5, 1, 1, 16, 8, "concatenated", "out_in", False, sentinels=False)
    matrices = [args[4][0][0]], [args[5][0][0]]
    assert torch.equal(call(args, torch.float32), call([*args[:4], *matrices, *args[6:]], torch.float32))


def test_output_dtype_and_compute_dtype():
    """bf16 experts with fp32 routing weights: products in bf16, the sum in fp32, the result as asked."""
    args = operands(7, 5, 2, 4, 16, 8, "concatenated", "out_in", False, torch.bfloat16, sentinels=False)
    args[2] = args[2].float()
    op = torch.ops.samoyeds.moe_experts
    assert op(*args, torch.bfloat16, None).dtype == torch.float32
    assert op(*args, torch.bfloat16, torch.bfloat16).dtype == torch.bfloat16
    mixed = torch.utils._pytree.tree_map(
        lambda a: a.float() if torch.is_tensor(a) and a.is_floating_point() else a, args
    )
    assert torch.equal(op(*mixed, torch.bfloat16, None), op(*args, torch.bfloat16, None))


@pytest.mark.inductor
@pytest.mark.parametrize("weighting", ["output", "input"])
def test_separate_matrices_under_inductor(weighting):
    args = operands(13, 9, 2, 5, 16, 8, "separate", "out_in", True, separate="gate,up,down", weighting=weighting)
    compiled = torch.compile(lambda a: call(a, torch.float32), fullgraph=True)
    expected = results(lambda a: reference.moe_experts(*a), double(args))
    assert_close(results(compiled, args), expected, torch.float32)


def test_separate_matrices_are_not_copied():
    """Neither direction puts them, or rows, into one tensor."""
    args = operands(13, 9, 2, 5, 16, 8, "separate", "out_in", True, separate="gate,up,down")
    targets = []

    def keep(gm, inputs):
        targets.append({str(node.target) for node in gm.graph.nodes})
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    results(torch.compile(lambda a: call(a, torch.float32), fullgraph=True, backend=backend), args)
    forward, backward = targets
    assert "samoyeds.expert_linear.default" in forward and "samoyeds.expert_outer.default" in backward
    assert not {"aten.stack.default", "aten.cat.default"} & (forward | backward)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, 4), "x has rank 3"),
        (1, torch.zeros(5, 2, dtype=torch.int64), "expert_ids has shape"),
        (1, torch.zeros(6, 2), "expert_ids is torch"),
        (2, torch.zeros(6, 3), "expert_weights has shape"),
        (4, [], "up is empty"),
        (4, [torch.zeros(16, 16)], "down has 4 experts and up 1"),
        (4, [torch.zeros(4, 16, 15)], "x has shape"),
        (4, [torch.zeros(16, 16)] * 3 + [torch.zeros(16, 15)], "up holds .16, 15. torch.float32 on cpu, .16, 16."),
        (4, [torch.zeros(16, 16)] * 3 + [torch.zeros(16, 16).half()], "up holds .* torch.float16 on cpu"),
        (4, [torch.zeros(4, 16, 16)] * 2, "up holds 2 tensors, the first of rank 3"),
        (5, [torch.zeros(3, 16, 8)], "down has 3 experts and up 4"),
        (9, "silu(x)", "activation reads"),
        (10, "diagonal", "gate_up_layout is 'diagonal'"),
        (11, "in_in", "weight_layout is 'in_in'"),
        (12, "both", "weighting is 'both'"),
    ],
)
def test_bad_operands_name_themselves(position, value, message):
    args = operands(8, 6, 2, 4, 16, 8, "concatenated", "out_in", False)
    args[position] = value
    with pytest.raises(OperandError, match=message):
        call(args, torch.float32)


def test_only_stacks_are_gathered():
    args = operands(8, 6, 2, 4, 16, 8, "concatenated", "out_in", False, separate="down")
    with pytest.raises(OperandError, match="experts_gathered: down holds separate matrices; pass"):
        gathered(args, torch.float32)


def test_mixed_devices():
    args = operands(9, 6, 2, 4, 16, 8, "concatenated", "out_in", False)
    args[4] = [args[4][0].to("meta")]
    with pytest.raises((OperandError, RuntimeError), match=r"device|meta"):
        call(args, torch.float32)
