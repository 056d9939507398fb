"""Both layouts of rows that go into the first projection, in Triton's interpreter: a plan is what runs.

CPU tensors stand in for a CUDA device. Run by test_interpreter.py.
"""

import pytest
import torch
from torch import Tensor

from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.triton.kernel import Projection, gather
from samoyeds_codegen.triton.prove import prove, proven
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import Pattern
from samoyeds_compile import Report, SparsityConfig
from samoyeds_compile.layout import propagate
from samoyeds_compile.lower import gpu, stages
from samoyeds_compile.lower.gpu import gpu_kernels
from samoyeds_compile.lower.kernels import gpu_choice
from samoyeds_compile.ops import gpu_call, reference
from samoyeds_compile.ops.route import route
from samoyeds_compile.sparsity import PackedTensor
from tests.blocks import Block
from tests.codegen.triton.cases import spec_of
from tests.ops.operands import double, operands
from tests.ops.test_sparse_experts import packed_operands

CPU = torch.device("cpu")
FAST = Device("fast memory", (8, 0), 4, 1e9, 1e16)
"""A copy costs no more than its launch there, and a processor has many programs at prefill."""


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each separate gather has."""
    seen: list[int] = []

    def counted(x: Tensor, order_S: Tensor, *rest: object) -> Tensor:
        seen.append(len(order_S))
        return gather(x, order_S, *rest)

    monkeypatch.setattr(gpu_call, "gather", counted)
    return seen


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_gather(tokens: int) -> None:
    """Rows of slots that belong to nobody are left out, columns may be of any number, rows of any stride."""
    ids = torch.randint(-1, 4, (tokens, 2))
    plan, x = route(ids, 3), torch.randn(tokens, 1300)[:, :600]
    found = gather(x, plan.order_S, 2, plan.offsets_E)
    owned = int(plan.offsets_E[-1])
    assert found.shape == (2 * tokens, 600) and torch.equal(found[:owned], x[plan.order_S[:owned] // 2])


@pytest.mark.parametrize("pattern", [None, Pattern(1, 2, 32), Pattern(2, 4, 32)], ids=str)
def test_kernels_of_gathered_rows_prove_themselves(pattern: Pattern | None) -> None:
    """As those do that gather; one that took rows by an order all the same would be refused."""
    spec, form = spec_of("float32", pattern), Form(gathered=True)
    assert prove(spec, form, CPU) == ""

    class Shifted(Projection):
        def __call__(self, x: Tensor, order_S: Tensor | None, *rest: object) -> None:
            assert order_S is None
            super().__call__(x, torch.arange(len(x)).flip(0), *rest)

    assert "up float32" in prove(spec, form, CPU, Shifted)


@pytest.mark.parametrize("layout", ["concatenated", "separate", "none"])
@pytest.mark.parametrize("config", [None, SparsityConfig(1, 2, 32)], ids=str)
def test_same_bits(layout: str, config: SparsityConfig | None, gathers: list[int]) -> None:
    """The two choices multiply the same rows in the same order; the plan says which for how many slots."""
    dense = operands(1, 6, 2, 3, 40, 36, layout, "out_in", True)
    dense[1][2] = -1  # a token of nobody
    args = dense if config is None else packed_operands(dense, config)[1]
    results = []
    with torch.no_grad():
        for plan in (0, 16, ~16 & 0xFFFF):  # 12 slots count as 16
            results.append(torch.ops.samoyeds.experts_gpu(*args, torch.float32, None, "triton", plan))
    assert gathers == [12]
    assert all(torch.equal(results[0], result) for result in results[1:])
    if config is None:
        torch.testing.assert_close(results[0].double(), reference.moe_experts(*double(dense)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_opcheck() -> None:
    args = operands(6, 4, 2, 3, 32, 32, "separate", "out_in", True)
    kernel = spec_of("float32", None, "silu(gate) * up").name
    torch.library.opcheck(
        torch.ops.samoyeds.gpu_experts.default,
        (*args[:9], kernel, 32, "separate", "out_in", torch.float32, "triton", 8),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


# -------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on the CPU are planned and lowered as those on a CUDA device are."""

    def choose(ids, gate, up, down, *options, bias=False, triton=None, measure=False, layouts=None):
        packed, planned = isinstance(up[0], PackedTensor), layouts.gathers if layouts else 0
        found = gpu_kernels(ids, gate, up, down, *options, bias=bias, measure=measure, gathers=planned)
        return gpu_choice(packed, found)

    monkeypatch.setattr(stages, "choose_kernel", choose)
    monkeypatch.setattr(propagate, "on_gpu", lambda weight: True)
    monkeypatch.setattr(propagate, "device_of", lambda device: FAST)
    torch.compiler.reset()
    proven.cache_clear()
    yield
    proven.cache_clear()


def compiled(model: torch.nn.Module, report: Report, **options: object) -> torch.nn.Module:
    chosen = {"report": report, "triton": True, "base": "eager", **options}
    return torch.compile(model, backend="samoyeds", dynamic=True, options=chosen)


@pytest.mark.parametrize("choice", ["cheapest", "token_major", "dearest"])
def test_calls_follow_the_plan(choice: str, as_if_cuda: None, gathers: list[int]) -> None:
    """One graph for all numbers of tokens, in which the plan decides for each call."""
    model, report = Block(hidden=16, width=256, experts=4).eval(), Report()
    with torch.no_grad():
        model_c = compiled(model, report, layouts=choice)
        for tokens in (3, 200, 7):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(model_c(x), model(x), rtol=1e-4, atol=1e-4)
    (layout,) = [layout for graph in report.graphs for layout in graph.layouts]
    assert len(report.graphs) == 1 and "triton" in layout.summary
    expected = {"cheapest": [400], "token_major": [6, 400, 14], "dearest": [6, 14]}[choice]
    assert gathers == expected and (layout.gathered == "all") == (choice == "token_major")


def test_refused_without_proof(as_if_cuda: None, monkeypatch: pytest.MonkeyPatch, gathers: list[int]) -> None:
    """Where kernels of gathered rows fail on a device, rows are gathered while they are loaded; the report says so."""

    def refuses(spec: object, form: Form, device: object) -> str:
        return "planted" if form.gathered else prove(spec, form, device)

    monkeypatch.setattr(gpu, "proven", refuses)
    model, report, x = Block(hidden=16, width=32, experts=4).eval(), Report(), torch.randn(6, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, report, layouts="token_major")(x), model(x))
    assert gathers == [] and "the other way was refused: planted" in " ".join(str(report).split())
