"""`samoyeds::sparse_experts` against the float64 twin of the canonical op on the pruned weights.

Every instruction set of this machine is run, lower ones too; kernels for single ones are compiled with less
optimisation, which takes a third of the time.
"""

import ctypes
import functools
import itertools
import mmap
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samoyeds_codegen.cpp.isa import AMX, AVX2, PORTABLE, Isa, usable_isas
from samoyeds_codegen.cpp.kernel import ExpertsKernel, experts_kernel
from samoyeds_codegen.cpp.spec import ExpertsSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.experts_packed import _storage, kernel_spec
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, best_mask
from samoyeds_compile.sparsity.layout import StorageLayout
from tests.ops.operands import ACTIVATIONS, double, operands

CONFIGS = {
    "float32 1:2:32": SparsityConfig(1, 2, 32),
    "bfloat16 1:2:32": SparsityConfig(1, 2, 32),
    "float32 1:2:16": SparsityConfig(1, 2, 16, group=3),
    "bfloat16 1:1:16": SparsityConfig(1, 1, 16),
    "float32 2:4:64": SparsityConfig(2, 4, 64, group=2),
    "bfloat16 2:4:16": SparsityConfig(2, 4, 16),
    "bfloat16 1:2:128/16": SparsityConfig(1, 2, 128, group=16),
}
"""For canonical weights."""
STRIPS = {
    "float32 1:2:32": SparsityConfig(1, 2, 32),
    "bfloat16 1:2:32": SparsityConfig(1, 2, 32),
    "float32 2:4:16": SparsityConfig(2, 4, 16),
    "bfloat16 2:4:64": SparsityConfig(2, 4, 64),
    "bfloat16 1:1:32": SparsityConfig(1, 1, 32),
    "bfloat16 1:2:16": SparsityConfig(1, 2, 16),
    "bfloat16 1:2:128/16": SparsityConfig(1, 2, 128, group=16),
    "float32 2:4:64/8": SparsityConfig(2, 4, 64, group=8),
}
"""For weights in strips."""
ISAS = [pytest.param(isa, id=isa.name) for isa in usable_isas("bfloat16")]
TOKENS = (0, 1, 2, 3, 7, 8, 9, 20, 70, 300)
SHAPES = ((64, 32), (40, 36), (100, 20), (8, 4))
"""(H, I); most are no multiple of a vector, a panel or a tile."""
WHOLE = ((64, 32), (160, 96), (32, 224))
"""(H, I) that strips fit."""
FLAGS = tuple(os.environ.get("SAMOYEDS_TEST_FLAGS", "-O1").split())
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Relative to the norm; eager bfloat16 is at 4e-3 to 6e-3."""


def packed_operands(args: list, config: SparsityConfig) -> tuple[list, list]:
    """Operands of `moe_experts` with pruned weights, and with the same weights packed."""
    layout, in_out = args[10], args[11] == "in_out"

    def prune(weight: Tensor, interleaved: bool) -> tuple[Tensor, PackedTensor]:
        stored = StorageLayout(in_out, interleaved)
        matrix = stored.to_rows(weight)
        dense = stored.to_stored(matrix * best_mask(matrix.abs(), config)).contiguous()
        return dense, PackedTensor.from_dense(dense, config, transposed=in_out, interleaved=interleaved)

    dense, packed = list(args), list(args)
    for i in (3, 4, 5):
        pairs = [prune(weight, layout == "interleaved" and i == 4) for weight in args[i]]
        dense[i], packed[i] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return dense, packed


def expected_of(dense: list) -> Tensor:
    return reference.moe_experts(*double(dense))


def run(kernel: ExpertsKernel, packed: list, out_dtype: torch.dtype | None = None) -> Tensor:
    x, ids, weights, gate, up, down, *biases, _activation, layout, _weight_layout, _weighting = packed
    rows = up[0].form.rows
    width = rows // 2 if layout in ("concatenated", "interleaved") else rows
    kernel.use()
    return torch.ops.samoyeds.sparse_experts(
        x, ids, weights, *(_storage(w, kernel.spec.strips) for w in (gate, up, down)), *biases, kernel.spec.name, width,
        layout, out_dtype or x.dtype,
    )  # fmt: skip


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and bool(actual.isfinite().all())
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)) if expected.numel() else 0.0


def skip_unless_for(isa: Isa, dtype: torch.dtype) -> None:
    if str(dtype).removeprefix("torch.") not in isa.dtypes:
        pytest.skip(f"{isa.name} is not for {dtype}")


@functools.cache
def kernel_of(
    isa: Isa | None, dtype: str, config: SparsityConfig, activation: str, gated: bool, strips: bool = False
) -> ExpertsKernel:
    spec = ExpertsSpec(dtype, config.n, config.m, config.vector, config.group, activation, gated, strips)
    return ExpertsKernel(spec, isa, FLAGS)


def variants(configs: dict[str, SparsityConfig]) -> list[tuple[Isa, str]]:
    """Every configuration for the best instruction set, and some for the others."""
    best = {dtype: usable_isas(dtype)[:2] for dtype in ("float32", "bfloat16")}
    names = list(configs)
    every = [(isa, name) for name in names for isa in best[name.split()[0]][: 1 + (name in names[:3])]]
    return every + [(isa, name) for isa in (AVX2, PORTABLE) for name in names[:3] if (isa, name) not in every]


def named(value: Isa | str) -> str:
    return value if isinstance(value, str) else value.name


@pytest.mark.parametrize(("isa", "name"), variants(CONFIGS), ids=named)
def test_tokens_and_ragged_shapes(isa: Isa, name: str) -> None:
    """Few experts, so that many tokens meet one, and the kernel for many tokens runs as well."""
    dtype, config = getattr(torch, name.split()[0]), CONFIGS[name]
    kernel = kernel_of(isa, name.split()[0], config, ACTIVATIONS["concatenated"], True)
    for tokens, (h, i) in itertools.product(TOKENS, SHAPES):
        args = operands(tokens, tokens, 2, 3, h, i, "concatenated", "out_in", tokens % 2 == 0, dtype)
        dense, packed = packed_operands(args, config)
        assert error(run(kernel, packed), expected_of(dense)) <= TOLERANCE[dtype], (tokens, h, i)


@pytest.mark.parametrize(("isa", "name"), variants(STRIPS), ids=named)
def test_strips(isa: Isa, name: str) -> None:
    """Stacks with gate and up in one, and matrices of their own, with and without bias."""
    dtype, config = getattr(torch, name.split()[0]), STRIPS[name]
    kernel = kernel_of(isa, name.split()[0], config, ACTIVATIONS["concatenated"], True, True)
    for tokens, (h, i) in itertools.product((*TOKENS, 600), WHOLE):
        layout, separate = (("concatenated", ""), ("separate", "gate,up,down"), ("interleaved", ""))[tokens % 3]
        args = operands(tokens, tokens, 2, 3, h, i, layout, "out_in", tokens % 2 == 0, dtype, separate=separate)
        args[9] = kernel.spec.activation
        dense, packed = packed_operands(args, config)
        assert all(w.form.strips for weights in packed[3:6] for w in weights)
        assert error(run(kernel, packed), expected_of(dense)) <= TOLERANCE[dtype], (tokens, h, i)


@pytest.mark.parametrize("strips", [False, True], ids=["rows", "strips"])
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_no_worse_than_eager_and_threads_change_nothing(isa: Isa, dtype: torch.dtype, group: int, strips: bool) -> None:
    """Also with one hot expert; sums have one order whatever the number of threads.

    With more threads, pieces of work are single panels, too small for what skips dropped rows of a group.
    """
    skip_unless_for(isa, dtype)
    config, name = SparsityConfig(1, 2, 32, group=group), str(dtype).removeprefix("torch.")
    kernel = kernel_of(isa, name, config, ACTIVATIONS["concatenated"], True, strips)
    args = operands(1, 90, 2, 12, 128, 96, "concatenated", "out_in", False, dtype)
    args[1][10:, 0] = 5
    dense, packed = packed_operands(args, config)
    expected = expected_of(dense)
    eager = torch.ops.samoyeds.moe_experts(*dense, dtype, None)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(kernel, packed))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert error(results[0], expected) <= max(1e-6 if dtype == torch.float32 else 0, 1.05 * error(eager, expected))


def composite(packed: list, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> Tensor:
    """Through the op; asserts that it is not computed in another way."""
    assert isinstance(kernel_spec(*packed[3:6], *packed[9:], dtype), ExpertsSpec)
    return torch.ops.samoyeds.experts_packed(*packed, dtype, out_dtype)


@pytest.fixture
def fast_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's kernels, for the best instruction set, with less optimisation."""

    def kernel(spec: ExpertsSpec) -> ExpertsKernel:
        config = SparsityConfig(spec.n, spec.m, spec.vector, group=spec.group)
        made = kernel_of(None, spec.dtype, config, spec.activation, spec.gated, spec.strips)
        made.use()
        return made

    monkeypatch.setattr("samoyeds_compile.ops.sparse_experts.experts_kernel", kernel)


@pytest.mark.usefixtures("fast_builds")
@pytest.mark.parametrize("layout", ACTIVATIONS)
def test_layouts(layout: str) -> None:
    """Gate and up in any place, with and without bias, stored either way, as stacks and as matrices."""
    for weight_layout, bias, separate in itertools.product(("out_in", "in_out"), (False, True), ("", "gate,up,down")):
        args = operands(3, 9, 3, 5, 40, 24, layout, weight_layout, bias, separate=separate)
        dense, packed = packed_operands(args, SparsityConfig(1, 2, 32))
        assert error(composite(packed, torch.float32), expected_of(dense)) <= 1e-6


@pytest.mark.usefixtures("fast_builds")
def test_routings_dtypes_and_strides() -> None:
    args = operands(4, 30, 2, 4, 48, 32, "concatenated", "out_in", True)
    dense, packed = packed_operands(args, SparsityConfig(1, 2, 32))
    one, nobody, twice = torch.full((30, 2), 3), torch.full((30, 2), -1), torch.arange(30)[:, None].expand(30, 2) % 4
    for ids in (one, nobody, twice, twice.int(), twice.to(torch.uint8), args[1].t().contiguous().t()):
        dense[1] = packed[1] = ids
        assert error(composite(packed, torch.float32), expected_of(dense)) <= 1e-6
    strided = (
        torch.randn(30, 96)[:, ::2],
        torch.randn(48, 30).t(),
        torch.randn(60, 48)[::2],
        torch.randn(1, 48).expand(30, 48),
    )
    for x in strided:
        dense[0] = packed[0] = x
        assert error(composite(packed, torch.float32), expected_of(dense)) <= 1e-6
    for weights, out in ((torch.bfloat16, None), (torch.float64, None), (torch.float32, torch.bfloat16)):
        dense[2] = packed[2] = args[2].to(weights)
        result = composite(packed, torch.float32, out)
        assert result.dtype == (out or torch.promote_types(weights, torch.float32))
        assert error(result, expected_of(dense)) <= (3e-3 if out else 1e-6)


@pytest.mark.usefixtures("fast_builds")
def test_gradients_take_the_other_way() -> None:
    args = operands(5, 6, 2, 4, 32, 32, "concatenated", "out_in", False)
    dense, packed = packed_operands(args, SparsityConfig(1, 2, 32))
    packed[0] = packed[0].clone().requires_grad_()
    dense[0] = dense[0].clone().requires_grad_()
    torch.ops.samoyeds.experts_packed(*packed, torch.float32, None).square().sum().backward()
    torch.ops.samoyeds.moe_experts(*dense, torch.float32, None).square().sum().backward()
    torch.testing.assert_close(packed[0].grad, dense[0].grad)


@pytest.mark.parametrize("layout", ACTIVATIONS)
def test_without_a_compiler(layout: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    experts_kernel.cache_clear()
    args = operands(6, 9, 2, 4, 32, 16, layout, "out_in", True)
    dense, packed = packed_operands(args, SparsityConfig(1, 2, 32, group=2))
    torch.testing.assert_close(composite(packed, torch.float32).double(), expected_of(dense), rtol=1e-5, atol=1e-5)
    assert "no-such-compiler" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ({"config": SparsityConfig(1, 2, 32, "none")}, "no kernel for the pattern"),
        ({"config": SparsityConfig(3, 4, 32)}, "3:4"),
        ({"weighting": "input"}, "multiply what goes in"),
        ({"dtype": torch.bfloat16}, "not torch.bfloat16"),
        ({"activation": "to(gate, 'float16') * up"}, "float16"),
        ({"dense": True}, "not all weights are packed"),
        ({"i": 17}, "within a block"),
    ],
)  # fmt: skip
def test_no_kernel(spoil: dict, reason: str) -> None:
    args = operands(7, 4, 2, 3, 32, spoil.get("i", 16), "concatenated", "out_in", False)
    dense, packed = packed_operands(args, spoil.get("config", SparsityConfig(1, 2, 32)))
    if spoil.get("dense"):
        packed[5] = dense[5]
    found = kernel_spec(
        *packed[3:6], spoil.get("activation", packed[9]), *packed[10:12], spoil.get("weighting", "output"),
        spoil.get("dtype", torch.float32),
    )  # fmt: skip
    assert isinstance(found, str) and reason in found


@pytest.mark.usefixtures("fast_builds")
@pytest.mark.parametrize(
    ("position", "spoil", "name"),
    [
        (0, lambda x: x.bfloat16(), "x is bfloat16"),
        (0, lambda x: x[:, :8], "down"),
        (1, lambda ids: ids[:-1], "expert_ids"),
        (2, lambda weights: weights[:, :1], "expert_ids"),
        (4, lambda up: [up[0][:, :-1], *up[1:]], "up"),
        (5, lambda down: [down[0], down[1][:, 1:], down[2]], "down"),
        (8, lambda bias: bias[:, :-1], "down_bias"),
    ],
)
def test_operands_that_do_not_fit(position: int, spoil, name: str) -> None:
    """A kernel would read beyond them."""
    args = operands(8, 5, 2, 3, 32, 16, "concatenated", "out_in", True)
    _, packed = packed_operands(args, SparsityConfig(1, 2, 32))
    kernel = ExpertsSpec("float32", 1, 2, 32, 1, packed[9], True).name
    storage = [_storage(weights, False) for weights in packed[3:6]]
    call = [*packed[:3], *storage, *packed[6:9], kernel, 16, packed[10], torch.float32]
    assert torch.ops.samoyeds.sparse_experts(*call).shape == (5, 32)
    call[position] = spoil(call[position])
    with pytest.raises(ValueError, match=f"sparse_experts: {name}"):
        torch.ops.samoyeds.sparse_experts(*call)


@pytest.mark.parametrize("strips", [False, True], ids=["rows", "strips"])
@pytest.mark.parametrize("isa", ISAS)
def test_damaged_selection_stays_inside_its_block(isa: Isa, strips: bool) -> None:
    """Of what it computes nothing can be said but that it is computed."""
    config = SparsityConfig(2, 4, 64 if strips else 16)
    kernel = kernel_of(isa, "bfloat16", config, ACTIVATIONS["concatenated"], True, strips)
    for tokens in (1, 8, 40):
        args = operands(9, tokens, 1, 2, 64, 32, "concatenated", "out_in", True, torch.bfloat16, sentinels=False)
        _, packed = packed_operands(args, config)
        for w in (packed[4][0], packed[5][0]):
            w.selection.fill_(255)
            w.metadata.fill_(-1)
        assert run(kernel, packed).shape == (tokens, 64)


@pytest.mark.usefixtures("fast_builds")
def test_opcheck() -> None:
    args = operands(8, 5, 2, 3, 32, 16, "separate", "out_in", True)
    _, packed = packed_operands(args, SparsityConfig(1, 2, 32))
    storage = [_storage(weights, False) for weights in packed[3:6]]
    torch.library.opcheck(
        torch.ops.samoyeds.sparse_experts.default,
        (
            *packed[:3],
            *storage,
            *packed[6:9],
            ExpertsSpec("float32", 1, 2, 32, 1, packed[9], True).name,
            16,
            "separate",
            torch.float32,
        ),
    )


def guarded(tensor: Tensor, keep: list) -> Tensor:
    """A copy whose last byte is the last one before a page that must not be touched."""
    size = tensor.nbytes
    pages = -(-size // mmap.PAGESIZE)
    region = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    keep.append(region)
    base = ctypes.addressof(ctypes.c_char.from_buffer(region))
    offset = pages * mmap.PAGESIZE - size
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    copy.copy_(tensor)
    protected = ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0)
    assert protected == 0
    return copy


GUARDED = [
    *((name, CONFIGS[name], False) for name in ("float32 1:2:16", "bfloat16 1:1:16")),
    *((name, STRIPS[name], True) for name in ("float32 1:2:32", "bfloat16 1:2:32", "bfloat16 2:4:64")),
]


@pytest.mark.parametrize(("name", "config", "strips"), GUARDED, ids=str)
@pytest.mark.parametrize("isa", ISAS[:2])
def test_nothing_past_the_weights_is_read(isa: Isa, name: str, config: SparsityConfig, strips: bool) -> None:
    dtype, keep = getattr(torch, name.split()[0]), []
    skip_unless_for(isa, dtype)
    kernel = kernel_of(isa, name.split()[0], config, ACTIVATIONS["concatenated"], True, strips)
    for tokens, (h, i) in itertools.product((1, 9, 60), WHOLE[:2] if strips else ((48, 16), (40, 36), (16, 48))):
        args = operands(9, tokens, 1, 2, h, i, "concatenated", "out_in", True, dtype, sentinels=False)
        dense, packed = packed_operands(args, config)
        packed[4:6] = [[w.in_order(strips) for w in weights] for weights in packed[4:6]]
        for w in (packed[4][0], packed[5][0]):
            w.kept, w.metadata = guarded(w.kept, keep), guarded(w.metadata, keep)
            w.selection = w.selection if w.selection is None else guarded(w.selection, keep)
        packed[0] = guarded(packed[0], keep)
        packed[7], packed[8] = guarded(packed[7], keep), guarded(packed[8], keep)
        assert error(run(kernel, packed), expected_of(dense)) <= TOLERANCE[dtype]


def test_isas() -> None:
    """Best first, down to one that every machine runs; the matrix unit only for what it multiplies."""
    found = usable_isas("bfloat16")
    assert found[-1] == PORTABLE and (AMX not in found or AVX2 in found)
    assert AMX not in usable_isas("float32")


def test_variants_that_the_machine_lacks_are_refused() -> None:
    """They would end the process."""
    spec = ExpertsSpec("bfloat16", 1, 2, 32, 1, "gate * up", True)
    with pytest.raises(UnsupportedSpecError, match="other is not for bfloat16"):
        ExpertsKernel(spec, replace(PORTABLE, name="other", features=frozenset({"avx1024"})))
    with pytest.raises(UnsupportedSpecError, match="float32"):
        ExpertsKernel(replace(spec, dtype="float32"), AMX)
