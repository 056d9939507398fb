"""`PackedTensor`: the ops that weights meet, in eager mode and compiled, and what becomes of it in a module."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, best_mask, pack
from samoyeds_compile.sparsity.strips import from_strips, to_strips, to_strips_

CONFIGS = [
    SparsityConfig(1, 1, 32),
    SparsityConfig(1, 2, 32),
    SparsityConfig(2, 4, 16, group=2),
    SparsityConfig(1, 2, 16, "none"),
]
E, ROWS, COLS = 3, 24, 40
OPS = torch.ops.samoyeds


def pruned(shape: tuple[int, ...], config: SparsityConfig, transposed: bool = False) -> Tensor:
    weight = torch.randn(shape)
    matrix = weight.mT if transposed else weight
    kept = matrix * best_mask(matrix.abs(), config)
    return (kept.mT if transposed else kept).contiguous()


def packed(
    shape: tuple[int, ...], config: SparsityConfig = CONFIGS[1], transposed: bool = False
) -> tuple[PackedTensor, Tensor]:
    dense = pruned(shape, config, transposed)
    return PackedTensor.from_dense(dense, config, transposed=transposed), dense


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, COLS), (E, ROWS, COLS), (E, 7, 19)], ids=str)
def test_looks_like_the_dense_one(shape: tuple[int, ...], transposed: bool, config: SparsityConfig) -> None:
    weight, dense = packed(shape, config, transposed)
    assert weight.shape == dense.shape and weight.dtype == dense.dtype
    assert torch.equal(weight.to_dense(), dense)
    assert torch.equal(weight.transpose(-2, -1).to_dense(), dense.transpose(-2, -1))
    assert "PackedTensor" in repr(weight) and str(config) in repr(weight)


def test_inference_mode() -> None:
    """Views of a weight that was made outside, and weights that are made inside."""
    weight, dense = packed((E, ROWS, COLS))
    x = torch.randn(E, 5, COLS)
    with torch.inference_mode():
        torch.testing.assert_close(x @ weight.transpose(1, 2), x @ dense.mT)
        torch.testing.assert_close(F.linear(x[1], weight[1]), F.linear(x[1], dense[1]))
        assert torch.equal(weight.to(torch.bfloat16).to_dense(), dense.to(torch.bfloat16))
        inside = PackedTensor.from_dense(dense, CONFIGS[1])
        torch.testing.assert_close(x @ inside.mT, x @ dense.mT)


def test_interleaved_rows() -> None:
    """Gate and up rows are packed apart, and come back alternating."""
    config = SparsityConfig(1, 2, 16)
    gate, up = pruned((E, 8, 32), config), pruned((E, 8, 32), config)
    dense = torch.stack([gate, up], dim=-2).flatten(1, 2)
    with pytest.raises(SparsityError, match="one too many"):
        PackedTensor.from_dense(dense, config)  # pairs of a gate and an up row do not have the pattern
    for weight, expected in (
        (PackedTensor.from_dense(dense, config, interleaved=True), dense),
        (PackedTensor.from_dense(dense.mT.contiguous(), config, interleaved=True, transposed=True), dense.mT),
    ):
        assert torch.equal(weight.to_dense(), expected)
        x, offsets = torch.randn(5, expected.shape[-1]), torch.tensor([2, 2, 5], dtype=torch.int32)
        torch.testing.assert_close(
            OPS.expert_linear(x, [weight], offsets, False), OPS.expert_linear(x, [expected], offsets, False)
        )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_one_below_the_other(transposed: bool, config: SparsityConfig) -> None:
    """Of 7 rows each, which no block of rows divides; seen as a stack and back, and of a few experts."""
    stack = pruned((E, 7, 40), config, transposed)
    weight = PackedTensor.from_dense(stack.flatten(0, 1), config, transposed=transposed, flat=E)
    assert torch.equal(weight.to_dense(), stack.flatten(0, 1)) and weight.shape == stack.flatten(0, 1).shape
    assert weight.stride() == weight.to_dense().stride()
    for seen in (weight.view(E, 7, 40), weight.view(-1, 7, 40), weight.reshape(E, 7, -1)):
        assert torch.equal(seen.to_dense(), stack) and seen.kept.data_ptr() == weight.kept.data_ptr()
        assert torch.equal(seen[1].to_dense(), stack[1]) and torch.equal(seen[1].T.to_dense(), stack[1].T)
        assert torch.equal(seen[:2].to_dense(), stack[:2])
        assert torch.equal(seen.view(-1, 40).to_dense(), stack.view(-1, 40))
        assert torch.equal(seen.permute(0, 2, 1).to_dense(), stack.permute(0, 2, 1))
    x = torch.randn(40, 5)
    torch.testing.assert_close(weight @ x, stack.flatten(0, 1) @ x)
    empty = PackedTensor.from_dense(torch.zeros(E * 7, 40), config, transposed=transposed, flat=E)
    for source in (weight, weight.to_dense()):
        assert torch.equal(empty.clone().copy_(source).to_dense(), weight.to_dense())


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_products(transposed: bool) -> None:
    weight, dense = packed((ROWS, COLS), transposed=transposed)
    out, width = dense.shape
    x, y, bias = torch.randn(5, width), torch.randn(2, 3, width), torch.randn(out)
    for function in (
        lambda w: F.linear(x, w), lambda w: F.linear(y, w, bias), lambda w: x @ w.t(), lambda w: w @ x.t(),
        lambda w: torch.addmm(bias, x, w.t()), lambda w: F.linear(x[0], w),
    ):  # fmt: skip
        torch.testing.assert_close(function(weight), function(dense))


@pytest.mark.parametrize("transposed", [False, True])
def test_stack_products(transposed: bool) -> None:
    weight, dense = packed((E, ROWS, COLS), transposed=transposed)
    x, ids = torch.randn(E, 4, COLS), torch.tensor([2, 0, 2])
    for function in (
        lambda w: torch.bmm(x, w.transpose(1, 2)), lambda w: torch.baddbmm(torch.ones(1), x, w.mT),
        lambda w: F.linear(x[0], w[1]), lambda w: torch.bmm(w[ids], x.mT), lambda w: x[0] @ w.select(0, 1).t(),
    ):  # fmt: skip
        torch.testing.assert_close(function(weight), function(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_out", [False, True])
def test_grouped_products(in_out: bool, dtype: torch.dtype) -> None:
    """Of rows in runs, an expert without rows among them; and the gradient of the rows."""
    weight, dense = packed((E, 32, 48), transposed=in_out)
    weight, dense = weight.to(dtype), dense.to(dtype)
    width = dense.shape[1] if in_out else dense.shape[2]
    offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
    rows, tolerance = (
        torch.randn(8, width, dtype=dtype),
        {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {},
    )
    stack = (lambda w: w) if in_out else (lambda w: w.transpose(1, 2))
    products = [
        lambda x, w: OPS.expert_linear(x, [w], offsets, in_out),
        lambda x, w: torch._grouped_mm(x, stack(w), offs=offsets),
    ]
    for product in products:
        gradients = []
        for candidate in (weight, dense):
            x = rows.clone().requires_grad_()
            out = product(x, candidate)
            gradients.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), x)))
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_opcheck(config: SparsityConfig) -> None:
    weight, _ = packed((E, ROWS, COLS), config)
    inner = (weight.kept, weight.metadata, weight.selection, *weight.form.numbers)
    torch.library.opcheck(OPS.unpack.default, inner)
    offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
    torch.library.opcheck(OPS.packed_grouped_mm.default, (torch.randn(8, COLS), offsets, False, *inner))


class Layer(nn.Module):
    """A linear with a packed weight."""

    def __init__(self, config: SparsityConfig = CONFIGS[1]) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed((ROWS, COLS), config)[0], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight))


@pytest.mark.parametrize("base", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(base: str) -> None:
    layer = Layer()
    x = torch.randn(4, COLS, requires_grad=True)
    expected = layer(x)
    compiled = torch.compile(layer, backend=base, fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected)
    for mine, theirs in zip(
        torch.autograd.grad(compiled.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


class Loop(nn.Module):
    """Experts one after the other, each after a break of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed((E, ROWS, COLS))[0], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for expert in torch.arange(E):
            torch._dynamo.graph_break()
            out.append(F.linear(x, self.weight[expert]))
        return torch.cat(out)


def test_loop_that_no_graph_holds() -> None:
    """It runs eagerly, and Dynamo does not trace what packed weights do there, which can fail."""
    layer, x, graphs = Loop(), torch.randn(4, COLS), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(torch.compile(layer, backend=backend)(x), layer(x))
    assert graphs == []


def test_moves_and_copies() -> None:
    layer = Layer()
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).to("cpu"), copy.deepcopy(layer).double().float()):
        assert isinstance(other.weight, PackedTensor) and isinstance(other.weight, nn.Parameter)
        assert torch.equal(other.weight.to_dense(), layer.weight.to_dense())
        assert other.weight.kept.data_ptr() != layer.weight.kept.data_ptr() or other is layer
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == half.weight.kept.dtype == torch.bfloat16
    assert half.weight.metadata.dtype == torch.int16
    with pytest.raises(SparsityError, match=r"cannot be torch\.int32"):
        layer.weight.to(torch.int32)


def test_state_dict_and_pickles() -> None:
    layer, other, third = Layer(), Layer(), Layer()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.to_dense(), layer.weight.to_dense())
    third.load_state_dict({"weight": layer.weight.to_dense()})  # a dense checkpoint that has the pattern
    assert torch.equal(third.weight.to_dense(), layer.weight.to_dense())
    with pytest.raises(SparsityError, match="one too many"):
        third.weight.data.copy_(torch.randn(ROWS, COLS))
    with pytest.raises(SparsityError, match="cannot be copied"):
        Layer(CONFIGS[0]).weight.data.copy_(layer.weight.data)
    for saved in (layer, layer.state_dict()):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        weight = loaded.weight if saved is layer else loaded["weight"]
        assert isinstance(weight, PackedTensor) and torch.equal(weight.to_dense(), layer.weight.to_dense())


def test_memory() -> None:
    for config, share in ((SparsityConfig(1, 2, 32), 0.30), (SparsityConfig(1, 1, 32), 0.57)):
        dense = pruned((E, 64, 128), config).bfloat16()
        assert PackedTensor.from_dense(dense, config).packed_nbytes <= share * dense.nbytes


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: w.sum(),
        lambda w: w[:, 0],
        lambda w: w.transpose(0, 1),
        lambda w: w.view(-1) + 1,
        lambda w: w.view(E, COLS, ROWS),
        lambda w: w[:, :3],
        lambda w: w.permute(1, 0, 2),
        lambda w: w.view(-1, COLS).t(),
        lambda w: w.view(-1, COLS)[0],
        lambda w: w.mul_(2),
    ],
    ids=["add", "sum", "column", "other axes", "vector", "sizes", "rows", "permute", "flat t", "row", "in place"],
)
def test_other_ops_are_refused(use) -> None:
    weight, _ = packed((E, ROWS, COLS))
    with pytest.raises(SparsityError, match=r"PackedTensor: .*(to_dense|densify_)"):
        use(weight)


def test_what_cannot_be_packed() -> None:
    for weight, why in (
        (torch.randn(4), "a floating matrix"), (torch.ones(4, 16).int(), "a floating matrix"),
        (torch.zeros(1, 2, 3, 4), "4 dimensions"), (torch.randn(4, 32), "one too many"),
    ):  # fmt: skip
        with pytest.raises(SparsityError, match=f"layers.0: .*{why}"):
            PackedTensor.from_dense(weight, CONFIGS[1], name="layers.0")
    with pytest.raises(SparsityError, match=r"layers.0: \[4, 16\] is not 3 matrices"):
        PackedTensor.from_dense(torch.zeros(4, 16), CONFIGS[1], flat=3, name="layers.0")
    with pytest.raises(SparsityError, match="cannot alternate"):
        PackedTensor.from_dense(torch.zeros(3, 16), CONFIGS[1], interleaved=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [SparsityConfig(1, 2, 32), SparsityConfig(2, 4, 16), SparsityConfig(1, 1, 64),
                                    SparsityConfig(1, 2, 128, group=16)], ids=str)  # fmt: skip
def test_strips(config: SparsityConfig, dtype: torch.dtype) -> None:
    """The same bits in another order, whose inverse is exact; in place it is the same."""
    torch.manual_seed(0)
    dense = torch.randn(3, 64, 160, dtype=dtype)
    packed = pack(dense * best_mask(dense.abs().float(), config), config)
    strips = to_strips(packed)
    assert not torch.equal(strips.values, packed.values) and strips.values.shape == packed.values.shape
    copy = replace(packed, **{n: t.clone() for n, t in vars(packed).items() if isinstance(t, Tensor)})
    to_strips_(copy)
    for name in ("values", "metadata", "selection"):
        old, new, back = (getattr(p, name) for p in (packed, strips, from_strips(strips)))
        assert (old is None and new is None) or (torch.equal(old, back) and torch.equal(new, getattr(copy, name)))
    lane = strips.values.view(3, -1, strips.values.shape[-1] // 16, 8, 32)
    row = lane[1, 1, 2, 3, 10:12] if dtype == torch.bfloat16 else lane[1, 1, 2, 3, 5::16]
    assert torch.equal(row, packed.values[1, 16 + 5, 2 * 16 + 6 : 2 * 16 + 8])  # strip 1, record 2, four 3, lane 5


def test_order_follows_device_and_dtype() -> None:
    config = SparsityConfig(1, 2, 32)
    dense = torch.randn(2, 64, 64) * best_mask(torch.rand(2, 64, 64), config)
    weight = PackedTensor.from_dense(dense, config)
    assert weight.form.strips and torch.equal(weight.packed.values, pack(dense, config).values)
    assert not weight.to("meta").form.strips and not weight.to(torch.float64).form.strips
    half = weight.to(torch.bfloat16)
    assert half.form.strips and torch.equal(half.to_dense(), dense.bfloat16())
    canonical = weight.in_order(strips=False)
    assert canonical.arranged().form.strips and torch.equal(canonical.to_dense(), dense)
    canonical.copy_(weight)
    weight.copy_(canonical)
    assert torch.equal(weight.to_dense(), dense) and torch.equal(canonical.to_dense(), dense)
    odd = PackedTensor.from_dense(dense[:, :40], config)
    assert not odd.form.strips and torch.equal(odd.to_dense(), dense[:, :40])
