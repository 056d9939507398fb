"""Training through `samoyeds::experts_gpu` in Triton's interpreter: CPU tensors stand in for a CUDA device."""

import itertools

import pytest
import torch
import torch.utils.flop_counter

from samoyeds_codegen.triton.spec import Pattern
from samoyeds_compile.errors import OperandError
from samoyeds_compile.ops import gpu_gradients
from samoyeds_compile.sparsity import SparsityConfig
from tests.codegen.triton.cases import spec_of
from tests.codegen.triton.training import IDS, OPS, block, case, check, check_frozen, check_packed
from tests.ops.operands import ACTIVATIONS, leaves_of, operands, results
from tests.ops.test_sparse_experts import packed_operands

OPERANDS = {"x": 0, "router": 2, "gate": 3, "up": 4, "down": 5, "gate_bias": 6, "up_bias": 7, "down_bias": 8}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("layout", "weight_layout"), list(itertools.product(ACTIVATIONS, ["out_in", "in_out"])))
def test_gradients(layout, weight_layout, bias):
    check(case(layout, weight_layout, bias))


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize(
    ("layout", "separate"), [("concatenated", "up,down"), ("interleaved", "down"), ("separate", "gate,up,down")]
)
def test_matrices_that_lie_apart(layout, separate, weight_layout):
    """Each gets its part of the gradient; with one of them frozen the others get theirs."""
    args = operands(1, 5, 2, 5, 24, 20, layout, weight_layout, True, separate=separate)
    check(args)
    leaves, whole = leaves_of(args), leaves_of(args)
    leaves[5][1] = leaves[5][1].detach()
    for each in (leaves, whole):
        block(each).sum().backward()
    assert leaves[5][1].grad is None
    assert all(torch.equal(leaves[5][e].grad, whole[5][e].grad) for e in (0, 2, 3, 4))


@pytest.mark.parametrize(
    "config", [SparsityConfig(1, 1, 16), SparsityConfig(1, 2, 32, group=3), SparsityConfig(2, 4, 16)]
)
@pytest.mark.parametrize(("layout", "weight_layout"), [*zip(ACTIVATIONS, ["out_in", "in_out"] * 2, strict=True)])
def test_packed_weights(layout, weight_layout, config):
    """They are frozen; rows, routing weights and biases have the gradients that the pruned weights give."""
    check_packed(operands(1, 6, 2, 3, 40, 36, layout, weight_layout, True), config)


@pytest.mark.parametrize("separate", ["gate,up,down", "up"])
def test_packed_matrices_that_lie_apart(separate):
    args = operands(1, 6, 2, 3, 40, 36, "separate", "out_in", True, separate=separate)
    check_packed(args, SparsityConfig(1, 2, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_weights_in_half_precision(dtype):
    check_packed(operands(2, 5, 2, 3, 40, 36, "concatenated", "out_in", True, dtype), SparsityConfig(1, 2, 32))


@pytest.mark.parametrize(
    "ids", [IDS[:0], torch.full((3, 2), -1), torch.randint(5, (70, 3))], ids=["none", "nobody", "many"]
)
def test_packed_weights_and_routing(ids):
    args = operands(1, *ids.shape, 5, 40, 36, "separate", "out_in", False)
    args[1] = ids
    check_packed(args, SparsityConfig(1, 2, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    check(case(dtype=dtype))


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(0, 2, dtype=torch.int64), torch.full((3, 2), -1), torch.randint(5, (70, 3)), torch.zeros(40, 1).int()],
    ids=["no tokens", "nobody's", "several tiles", "one expert"],
)
def test_routing(ids):
    check(case("separate", ids=ids))


def test_subsets_of_what_is_trained():
    """None, one, two, all but one; of the layout with all eight operands."""
    args = case("separate", ids=IDS[:3])
    _, *expected = results(block, args)
    every = OPERANDS.values()
    for trained in itertools.chain(*(itertools.combinations(every, size) for size in (0, 1, 2, 7))):
        check_frozen(args, trained, expected)


COUNTS = {
    # projected again, gradients of rows, gradients of weights
    "router": (("router",), (1, 1, 0)),
    "biases": (("up_bias", "down_bias"), (1, 1, 2)),
    "down": (("down",), (1, 0, 1)),
    "down_bias": (("down_bias",), (0, 0, 1)),
    "attention": (("x",), (1, 2, 0)),
    "experts": (("up", "down"), (1, 1, 2)),
    "all": (("x", "router", "up", "down", "up_bias", "down_bias"), (1, 2, 4)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_frozen_costs_no_product(name, monkeypatch):
    (trained, expected), seen = COUNTS[name], []
    for function in ("project_tokens", "row_gradient", "weight_gradient"):
        launch = getattr(gpu_gradients, function)
        monkeypatch.setattr(
            gpu_gradients, function, lambda *a, launch=launch, name=function: (seen.append(name), launch(*a))
        )
    args = [leaves_of([a], i in {OPERANDS[t] for t in trained})[0] for i, a in enumerate(case())]
    block(args).sum().backward()
    assert tuple(map(seen.count, ("project_tokens", "row_gradient", "weight_gradient"))) == expected


def test_operands_only_are_kept():
    """Neither projected nor activated rows wait for the backward."""
    args, saved = leaves_of(case()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(args)
    given = {t.data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
    assert saved and {t.data_ptr() for t in saved} <= given


def test_same_bits_in_every_run():
    def once():
        leaves = leaves_of(case(dtype=torch.bfloat16))
        out = block(leaves)
        return torch.autograd.grad(out.sum(), [leaves[0], leaves[2], leaves[4][0], leaves[5][0], leaves[7]])

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_gradient_of_any_strides():
    """That of a sum has none, and a transposed one has columns that are not contiguous."""
    (x, *rest), seen = case(), []
    for turn in (lambda t: t, lambda t: t.t().contiguous().t()):
        leaf = x.clone().requires_grad_()
        out = block([leaf, *rest])
        seen += torch.autograd.grad(out, leaf, turn(torch.ones_like(out))) + torch.autograd.grad(
            block([leaf, *rest]).sum(), leaf
        )
    assert all(torch.equal(seen[0], other) for other in seen)


@pytest.mark.parametrize("layout", ["concatenated", "separate"])
def test_opcheck(layout):
    args = leaves_of(case(layout))
    kernel = spec_of("float32", None, ACTIVATIONS[layout]).name
    given = (*args[:9], kernel, 20, layout, "out_in")
    torch.library.opcheck(OPS.gpu_experts.default, (*given, torch.float32, "triton"))
    frozen = (torch.ones(5, 24), *leaves_of(given, requires_grad=False))
    wanted = [layout == "separate" or not name.startswith("gate") for name in OPERANDS]
    torch.library.opcheck(
        OPS.gpu_experts_backward.default, (*frozen, wanted),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_under_a_dispatch_mode():
    """One that counts operations, say."""
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        check(case())


@pytest.mark.parametrize(
    ("index", "bad", "word"),
    [
        (0, torch.ones(5, 23), "grad"),
        (1, torch.ones(5, 23), "grad"),
        (5, [torch.ones(5, 39, 24)], "up"),
        (8, torch.ones(4, 40), "up_bias"),
    ],
)
def test_bad_operands_of_the_backward(index, bad, word):
    kernel = spec_of("float32", None, ACTIVATIONS["concatenated"]).name
    args = [torch.ones(5, 24), *case()[:9], kernel, 20, "concatenated", "out_in", [True] + [False] * 7]
    args[index] = bad
    with pytest.raises(OperandError, match=f"gpu_experts_backward: {word}"):
        OPS.gpu_experts_backward(*args)


def test_packed_weights_have_no_gradient():
    """The op says so; through the canonical op it takes the way that has one."""
    _, args = packed_operands(operands(1, 5, 2, 5, 32, 32, "separate", "out_in", False), SparsityConfig(1, 2, 32))
    stored = [[w.packed.values, w.packed.metadata, w.packed.selection] for (w,) in args[3:6]]
    kernel = spec_of("float32", Pattern(1, 2, 32), ACTIVATIONS["separate"]).name
    given = [torch.ones(5, 32), *args[:3], *stored, *args[6:9], kernel, 32, "separate", "out_in"]
    assert OPS.gpu_experts_backward(*given, [True] + [False] * 7)[0].shape == (5, 32)
    with pytest.raises(OperandError, match="gpu_experts_backward: wanted"):
        OPS.gpu_experts_backward(*given, [False, False, True] + [False] * 5)
