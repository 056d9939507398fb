"""`samoyeds::dense_experts` against the float64 twin of the canonical op.

Every instruction set of this machine is run, lower ones too; kernels for single ones are compiled with less
optimisation, which takes a third of the time.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samoyeds_codegen.cpp.isa import AMX, PORTABLE, Isa, usable_isas
from samoyeds_codegen.cpp.kernel import ExpertsKernel, experts_kernel
from samoyeds_codegen.cpp.spec import DenseExpertsSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.experts_dense import dense_spec
from tests.ops.operands import ACTIVATIONS, double, operands
from tests.ops.test_sparse_experts import FLAGS, ISAS, TOKENS, TOLERANCE, error, guarded, skip_unless_for

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
SHAPES = ((64, 32), (40, 36), (100, 20), (8, 4), (7, 3), (300, 130))
"""(H, I); most are no multiple of a vector, a panel, a tile or a piece of columns, and one is longer than a piece."""
ORDERS = pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
"""Weights of one output are contiguous, or those of one input; a kernel for each."""


@functools.cache
def kernel_of(isa: Isa | None, spec: DenseExpertsSpec) -> ExpertsKernel:
    return ExpertsKernel(spec, isa, FLAGS)


def kernel_for(isa: Isa, dtype: torch.dtype, weight_layout: str) -> ExpertsKernel:
    skip_unless_for(isa, dtype)
    name = str(dtype).removeprefix("torch.")
    return kernel_of(isa, DenseExpertsSpec(name, ACTIVATIONS["concatenated"], True, weight_layout == "in_out"))


def run(kernel: ExpertsKernel, args: list, out_dtype: torch.dtype | None = None) -> Tensor:
    *tensors, _activation, layout, weight_layout, _weighting = args
    kernel.use()
    return torch.ops.samoyeds.dense_experts(
        *tensors, kernel.spec.name, layout, weight_layout, out_dtype or args[0].dtype
    )


def expected_of(args: list) -> Tensor:
    return reference.moe_experts(*double(args))


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_tokens_and_ragged_shapes(isa: Isa, dtype: torch.dtype, weight_layout: str) -> None:
    """Few experts, so that many tokens meet one, and the kernel for many tokens runs as well."""
    kernel = kernel_for(isa, dtype, weight_layout)
    for tokens, (h, i) in itertools.product(TOKENS, SHAPES):
        args = operands(tokens, tokens, 2, 3, h, i, "concatenated", weight_layout, tokens % 2 == 0, dtype)
        assert close_enough(run(kernel, args), args), (tokens, h, i)


def close_enough(found: Tensor, args: list) -> bool:
    """Up to rounding, or where few numbers make it large, no worse than eager."""
    dtype, expected = args[0].dtype, expected_of(args)
    eager = torch.ops.samoyeds.moe_experts(*args, dtype, None)
    return error(found, expected) <= max(TOLERANCE[dtype], error(eager, expected) if dtype == torch.bfloat16 else 0)


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_no_worse_than_eager_and_threads_change_nothing(isa: Isa, dtype: torch.dtype, weight_layout: str) -> None:
    """Also with one hot expert; sums have one order whatever the number of threads, and long ones are exact enough."""
    kernel = kernel_for(isa, dtype, weight_layout)
    args = operands(1, 90, 2, 12, 1500, 96, "concatenated", weight_layout, False, dtype)
    args[1][10:, 0] = 5
    expected = expected_of(args)
    eager = torch.ops.samoyeds.moe_experts(*args, dtype, None)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(kernel, args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert error(results[0], expected) <= max(1e-6 if dtype == torch.float32 else 0, 1.05 * error(eager, expected))


@ORDERS
@pytest.mark.parametrize("isa", ISAS)
def test_every_number_of_tokens(isa: Isa, weight_layout: str) -> None:
    """Each has its own division into vectors and tiles."""
    kernel = kernel_for(isa, torch.float32, weight_layout)
    args = operands(2, 110, 1, 2, 20, 18, "concatenated", weight_layout, True, sentinels=False)
    args[1].zero_()
    expected = expected_of(args)
    for tokens in range(1, 111):
        some = [a[:tokens] for a in args[:3]] + args[3:]
        assert error(run(kernel, some), expected[:tokens]) <= 1e-6, tokens


@pytest.fixture
def fast_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's kernels, for the best instruction set, with less optimisation."""

    def kernel(spec: DenseExpertsSpec) -> ExpertsKernel:
        made = kernel_of(None, spec)
        made.use()
        return made

    monkeypatch.setattr("samoyeds_compile.ops.dense_experts.experts_kernel", kernel)


def flipped(weights: list[Tensor]) -> list[Tensor]:
    """The same matrices with the other dimension contiguous."""
    return [w.transpose(-2, -1).contiguous().transpose(-2, -1) for w in weights]


def composite(args: list, dtype: torch.dtype, out_dtype: torch.dtype | None = None, by_columns: bool = False) -> Tensor:
    """Through the op; asserts that it is not computed in another way."""
    spec = dense_spec(*args[3:6], *args[9:], dtype)
    assert isinstance(spec, DenseExpertsSpec) and spec.by_columns == by_columns
    return torch.ops.samoyeds.experts_dense(*args, dtype, out_dtype)


@pytest.mark.usefixtures("fast_builds")
@pytest.mark.parametrize("layout", ACTIVATIONS)
def test_layouts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up in any place, with and without bias, either way round, as stacks and as matrices."""
    monkeypatch.setattr("samoyeds_compile.ops.dense_experts.moe_experts", None)
    both = (False, True)
    for weight_layout, turned, bias, separate in itertools.product(
        ("out_in", "in_out"), both, both, ("", "gate,up,down")
    ):
        for tokens, (h, i) in itertools.product((9, 90), ((40, 24), (33, 300))):
            args = operands(3, tokens, 3, 5, h, i, layout, weight_layout, bias, separate=separate)
            if turned:
                args[3:6] = map(flipped, args[3:6])
            by_columns = (weight_layout == "in_out") != turned
            assert error(composite(args, torch.float32, by_columns=by_columns), expected_of(args)) <= 1e-6


@ORDERS
@pytest.mark.parametrize("layout", ["interleaved", "none"])
@pytest.mark.parametrize("isa", ISAS)
def test_layouts_in_every_variant(isa: Isa, layout: str, weight_layout: str) -> None:
    """Every other output is read, or there is no gate."""
    skip_unless_for(isa, torch.bfloat16)
    spec = DenseExpertsSpec("bfloat16", ACTIVATIONS[layout], layout != "none", weight_layout == "in_out")
    kernel = kernel_of(isa, spec)
    for tokens, (h, i) in itertools.product((1, 5, 60), ((40, 36), (33, 300))):
        args = operands(3, tokens, 2, 3, h, i, layout, weight_layout, True, torch.bfloat16)
        assert error(run(kernel, args), expected_of(args)) <= TOLERANCE[torch.bfloat16], (tokens, h, i)


@ORDERS
@pytest.mark.usefixtures("fast_builds")
def test_slices_of_larger_tensors(weight_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, columns and experts may lie apart."""
    monkeypatch.setattr("samoyeds_compile.ops.dense_experts.moe_experts", None)
    by_columns = weight_layout == "in_out"
    args = operands(4, 50, 2, 3, 40, 24, "concatenated", weight_layout, False)
    outputs = 2 if by_columns else 1  # the dimension of outputs
    args[4] = [torch.cat([args[4][0]] * 2, dim=outputs).narrow(outputs, 48, 48)]
    args[5] = [torch.cat([args[5][0]] * 2, dim=2)[:, :, args[5][0].shape[2] :]]
    assert error(composite(args, torch.float32, by_columns=by_columns), expected_of(args)) <= 1e-6


@ORDERS
@pytest.mark.usefixtures("fast_builds")
def test_weights_in_another_order_than_the_kernel_reads(weight_layout: str) -> None:
    """They are computed without it, also if only one of the projections is."""
    args = operands(4, 9, 2, 3, 40, 24, "concatenated", weight_layout, True)
    name = DenseExpertsSpec("float32", args[9], True, by_columns=weight_layout == "out_in").name
    expected = expected_of(args)
    for turn in ((), (4,)):
        call = [*args[:6], None, *args[7:9], name, *args[10:12], torch.float32]
        for position in turn:
            call[position] = flipped(call[position])
        assert error(torch.ops.samoyeds.dense_experts(*call), expected) <= 1e-6
    args[4] = flipped(args[4])
    assert "neither" in str(dense_spec(*args[3:6], *args[9:], torch.float32))


@pytest.mark.usefixtures("fast_builds")
def test_routings_dtypes_and_strides() -> None:
    args = operands(4, 30, 2, 4, 48, 32, "concatenated", "out_in", True)
    one, nobody, twice = torch.full((30, 2), 3), torch.full((30, 2), -1), torch.arange(30)[:, None].expand(30, 2) % 4
    for ids in (
        one,
        nobody,
        torch.full((30, 2), 4),
        twice,
        twice.int(),
        twice.to(torch.uint8),
        args[1].t().clone().t(),
    ):
        args[1] = ids
        assert error(composite(args, torch.float32), expected_of(args)) <= 1e-6
    strided = (
        torch.randn(30, 96)[:, ::2],
        torch.randn(48, 30).t(),
        torch.randn(60, 48)[::2],
        torch.randn(1, 48).expand(30, 48),
    )
    for x in strided:
        args[0] = x
        assert error(composite(args, torch.float32), expected_of(args)) <= 1e-6
    weights_TK = args[2]
    for weights, out in ((torch.bfloat16, None), (torch.float64, None), (torch.float32, torch.bfloat16)):
        args[2] = weights_TK.to(weights)
        result = composite(args, torch.float32, out)
        assert result.dtype == (out or torch.promote_types(weights, torch.float32))
        assert error(result, expected_of(args)) <= (3e-3 if out else 1e-6)


@pytest.mark.usefixtures("fast_builds")
def test_gradients_take_the_other_way() -> None:
    args = operands(5, 6, 2, 4, 32, 32, "concatenated", "out_in", False)
    args[4] = [args[4][0].requires_grad_()]
    torch.ops.samoyeds.experts_dense(*args, torch.float32, None).square().sum().backward()
    got, args[4][0].grad = args[4][0].grad, None
    torch.ops.samoyeds.moe_experts(*args, torch.float32, None).square().sum().backward()
    torch.testing.assert_close(got, args[4][0].grad)


@pytest.mark.parametrize("layout", ACTIVATIONS)
def test_without_a_compiler(layout: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    experts_kernel.cache_clear()
    args = operands(6, 9, 2, 4, 32, 16, layout, "out_in", True)
    args[9] = f"0.5 * ({args[9]})"  # of which no kernel is loaded
    assert error(composite(args, torch.float32), expected_of(args)) <= 1e-6
    assert "no-such-compiler" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ({"weighting": "input"}, "multiply what goes in"),
        ({"dtype": torch.bfloat16}, "not torch.bfloat16"),
        ({"activation": "to(gate, 'float16') * up"}, "float16"),
        ({"weights": torch.float64, "dtype": torch.float64}, "float64 is not one of"),
        ({"weights": torch.float16, "dtype": torch.float16}, "float16 is not one of"),
    ],
)
def test_no_kernel(spoil: dict, reason: str) -> None:
    weights = spoil.get("weights", torch.float32)
    args = operands(7, 4, 2, 3, 32, 16, "concatenated", "out_in", False, weights)
    found = dense_spec(
        *args[3:6], spoil.get("activation", args[9]), *args[10:12], spoil.get("weighting", "output"),
        spoil.get("dtype", torch.float32),
    )  # fmt: skip
    assert isinstance(found, str) and reason in found


@pytest.mark.usefixtures("fast_builds")
@pytest.mark.parametrize(
    ("position", "spoil", "name"),
    [
        (0, lambda x: x.bfloat16(), "x is bfloat16"),
        (0, lambda x: x[:, :8], "up"),
        (1, lambda ids: ids[:-1], "expert_ids"),
        (2, lambda weights: weights[:, :1], "expert_ids"),
        (4, lambda up: [up[0][:, :-1]], "up"),
        (5, lambda down: [down[0][:-1]], "down"),
        (8, lambda bias: bias[:, :-1], "down_bias"),
    ],
)
def test_operands_that_do_not_fit(position: int, spoil, name: str) -> None:
    """A kernel would read beyond them."""
    args = operands(8, 5, 2, 3, 32, 16, "concatenated", "out_in", True)
    call = [*args[:9], DenseExpertsSpec("float32", args[9], True).name, *args[10:12], torch.float32]
    assert torch.ops.samoyeds.dense_experts(*call).shape == (5, 32)
    call[position] = spoil(call[position])
    with pytest.raises(ValueError, match=f"dense_experts: {name}"):
        torch.ops.samoyeds.dense_experts(*call)


@pytest.mark.usefixtures("fast_builds")
@pytest.mark.parametrize("separate", ["", "gate,up,down"])
def test_opcheck(separate: str) -> None:
    args = operands(8, 5, 2, 3, 32, 16, "separate", "out_in", True, separate=separate)
    name = DenseExpertsSpec("float32", args[9], True).name
    call = (*args[:9], name, *args[10:12], torch.float32)
    torch.library.opcheck(torch.ops.samoyeds.dense_experts.default, call)


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_past_the_weights_is_read(isa: Isa, dtype: torch.dtype, weight_layout: str) -> None:
    kernel, keep = kernel_for(isa, dtype, weight_layout), []
    for tokens, (h, i) in itertools.product((1, 9, 60), ((48, 16), (40, 36), (16, 48), (33, 17))):
        args = operands(9, tokens, 1, 2, h, i, "concatenated", weight_layout, True, dtype, sentinels=False)
        args[4], args[5] = [guarded(args[4][0], keep)], [guarded(args[5][0], keep)]
        for position in (0, 7, 8):
            args[position] = guarded(args[position], keep)
        assert error(run(kernel, args), expected_of(args)) <= TOLERANCE[dtype]


@ORDERS
@pytest.mark.parametrize("isa", ISAS)
def test_what_lies_beside_the_weights_does_not_matter(isa: Isa, weight_layout: str) -> None:
    """Rows or columns of a wider tensor that holds NaN elsewhere: no product may reach past one."""
    kernel = kernel_for(isa, torch.bfloat16, weight_layout)
    for tokens in (1, 40):
        args = operands(10, tokens, 1, 2, 40, 20, "concatenated", weight_layout, False, torch.bfloat16, sentinels=False)
        expected = expected_of(args)
        for position in (4, 5):
            (weight,) = args[position]
            wide = torch.full((*weight.shape[:2], 64), float("nan"), dtype=weight.dtype)
            wide[..., : weight.shape[2]] = weight
            args[position] = [wide[..., : weight.shape[2]]]
        assert error(run(kernel, args), expected) <= TOLERANCE[torch.bfloat16]


def test_variants_that_the_machine_lacks_are_refused() -> None:
    """They would end the process."""
    spec = DenseExpertsSpec("bfloat16", "gate * up", True)
    with pytest.raises(UnsupportedSpecError, match="other is not for bfloat16"):
        ExpertsKernel(spec, replace(PORTABLE, name="other", features=frozenset({"avx1024"})))
    with pytest.raises(UnsupportedSpecError, match="float32"):
        ExpertsKernel(replace(spec, dtype="float32"), AMX)


def test_libraries_are_left_alone_where_there_are_no_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samoyeds_codegen.cpp.kernel.usable_isas", lambda dtype: (PORTABLE,))
    experts_kernel.cache_clear()
    with pytest.raises(UnsupportedSpecError, match="AVX2"):
        experts_kernel(DenseExpertsSpec("float32", "gate * up", True))
    assert usable_isas("float32")
