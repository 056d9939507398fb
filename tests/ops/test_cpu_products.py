"""Generated products of all experts against float64: every variant of this machine, odd sizes, any routing."""

import dataclasses
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from samoyeds_codegen.cpp.isa import ISAS, runs_here
from samoyeds_codegen.cpp.product import ProductKernel, Runs, product_kernels
from samoyeds_codegen.cpp.spec import ProductSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_compile.ops import cpu_products
from samoyeds_compile.ops.token_rows import TokenRows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLAGS = tuple(os.environ.get("SAMOYEDS_TEST_FLAGS", "").split())
VARIANTS = [(isa, dtype) for isa in ISAS for dtype in isa.dtypes]
SIZES = ((6, 2, 33, 32, 16), (4, 2, 37, 70, 45), (3, 1, 640, 64, 130), (5, 3, 2, 17, 9), (2, 2, 700, 33, 48))
"""Experts, experts a token, tokens, inputs, outputs."""


@dataclasses.dataclass
class Case:
    """Rows of tokens and of slots, and what the products must be, in float64."""

    x_TI: Tensor
    grad_SO: Tensor
    weight_EOI: Tensor
    token_S: Tensor
    ends_E: Tensor
    expert_S: Tensor

    @property
    def rows_SI(self) -> Tensor:
        return self.x_TI[self.token_S]

    def linear(self) -> Tensor:
        return torch.einsum("si,soi->so", self.rows_SI.double(), self.weight_EOI.double()[self.expert_S])

    def outer(self) -> Tensor:
        hot_SE = torch.nn.functional.one_hot(self.expert_S, len(self.ends_E)).double()
        return torch.einsum("se,so,si->eoi", hot_SE, self.grad_SO.double(), self.rows_SI.double())


def make(dtype: torch.dtype, experts: int, top_k: int, tokens: int, inputs: int, outputs: int, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(max(experts - 1, 1), (tokens * top_k,), generator=generator)  # the last expert has no slot
    expert_S, order_S = torch.sort(ids, stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(experts), right=True, out_int32=True)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, grad, weight = random(tokens, inputs), random(tokens * top_k, outputs), random(experts, outputs, inputs)
    return Case(x, grad, weight, order_S // top_k, ends_E, expert_S)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    torch.testing.assert_close(
        found.double() / scale, expected / scale, rtol=0, atol=6e-3 if dtype == torch.bfloat16 else 3e-6
    )


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0].name}-{v[1]}", scope="module")
def variant(request):
    isa, dtype = request.param
    if not runs_here(isa):
        pytest.skip(f"this machine has no {isa.name}")
    kernels = {
        (p, c): ProductKernel(ProductSpec(dtype, p, c), isa, FLAGS)
        for p, c in (("linear", False), ("linear", True), ("outer", True))
    }
    return kernels, DTYPES[dtype]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("separate", [False, True], ids=["stack", "matrices"])
def test_linear_ragged(variant, sizes, separate):
    kernels, dtype = variant
    case = make(dtype, *sizes)
    runs = Runs(case.ends_E, case.token_S)
    for in_out in (False, True):
        weight = case.weight_EOI.transpose(1, 2).contiguous() if in_out else case.weight_EOI
        weights = [w.clone() for w in weight] if separate else [weight]
        for x, plan in ((case.x_TI, runs), (case.rows_SI.contiguous(), Runs(case.ends_E))):
            out = torch.full((len(case.token_S), sizes[4]), float("nan"), dtype=dtype)
            kernels["linear", in_out].linear(x, plan, weights, in_out, out)
            close(out, case.linear(), dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outer_ragged(variant, sizes):
    kernels, dtype = variant
    case, kernel = make(dtype, *sizes), kernels["outer", True]
    runs = Runs(case.ends_E, case.token_S)
    expected = case.outer()
    for left, right, of_tokens, want in (
        (case.grad_SO, case.x_TI, (False, True), expected),
        (case.x_TI, case.grad_SO, (True, False), expected.transpose(1, 2)),
        (case.grad_SO, case.rows_SI.contiguous(), (False, False), expected),
    ):
        out = torch.full(want.shape, float("nan"), dtype=dtype)
        kernel.outer(left, right, of_tokens, runs, out)
        close(out, want, dtype)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    experts=st.integers(1, 6), top_k=st.integers(1, 3), tokens=st.integers(0, 60), inputs=st.integers(1, 70),
    outputs=st.integers(1, 70), dtype=st.sampled_from(list(DTYPES.values())), in_out=st.booleans(),
    strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes_and_strides(experts, top_k, tokens, inputs, outputs, dtype, in_out, strided, seed):
    if not product_kernels(str(dtype).removeprefix("torch.")):
        pytest.skip("no kernels on this machine")
    case = make(dtype, experts, top_k, tokens, inputs, outputs, seed)
    weight = case.weight_EOI.transpose(1, 2).contiguous() if in_out else case.weight_EOI
    x = torch.cat([case.x_TI, case.x_TI], 1)[:, :inputs] if strided else case.x_TI
    grad = case.grad_SO.t().contiguous().t() if strided else case.grad_SO
    rows = TokenRows(x, case.token_S)
    found = cpu_products.linear(rows, [weight], case.ends_E, in_out)
    assert found is not None
    close(found, case.linear(), dtype)
    close(cpu_products.outer(grad, rows, case.ends_E), case.outer(), dtype)
    close(cpu_products.outer(rows, grad, case.ends_E), case.outer().transpose(1, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_rows_of_nobody_are_zero(dtype):
    case = make(dtype, 3, 2, 20, 16, 24)
    if (found := cpu_products.linear(case.rows_SI, [case.weight_EOI], case.ends_E - 7, False)) is None:
        pytest.skip("no kernels on this machine")
    assert not found[case.ends_E[-1] - 7 :].any() and found[: case.ends_E[-1] - 7].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_threads_change_nothing(dtype):
    """Each sum has one order, whoever computes it."""
    case = make(dtype, 4, 2, 900, 160, 96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows = TokenRows(case.x_TI, case.token_S)
            products = (
                cpu_products.linear(rows, [case.weight_EOI], case.ends_E, False),
                cpu_products.outer(case.grad_SO, rows, case.ends_E),
            )
            results.append(products)
    finally:
        torch.set_num_threads(before)
    if results[0][0] is None:
        pytest.skip("no kernels on this machine")
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_no_kernel_computes():
    case = make(torch.float32, 2, 1, 8, 16, 16)
    rows = case.rows_SI
    assert cpu_products.linear(rows.double(), [case.weight_EOI.double()], case.ends_E, False) is None
    assert cpu_products.linear(rows, [case.weight_EOI.half()], case.ends_E, False) is None
    every_other = torch.randn(2, 16, 32)[..., ::2]
    assert cpu_products.linear(rows, [every_other], case.ends_E, False) is None
    unlike = [case.weight_EOI[0], case.weight_EOI[1].t()]
    assert cpu_products.linear(rows, unlike, case.ends_E, False) is None
    assert product_kernels("float16") == []
    with pytest.raises(UnsupportedSpecError, match="by columns"):
        ProductSpec("float32", "outer", False)
    with pytest.raises(UnsupportedSpecError, match="product"):
        ProductSpec("float32", "inner", True)


def test_without_a_kernel_products_are_torchs(monkeypatch):
    """What the ops give does not depend on whether there is a kernel."""
    case = make(torch.float32, 4, 2, 50, 24, 40)
    operands = (case.x_TI, case.token_S, case.token_S[:, None], [case.weight_EOI], case.ends_E, False)
    generated = torch.ops.samoyeds.token_linear(*operands)
    monkeypatch.setattr(cpu_products, "_kernel", lambda *_: None)
    torch.testing.assert_close(torch.ops.samoyeds.token_linear(*operands), generated, rtol=1e-5, atol=1e-5)
