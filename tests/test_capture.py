"""Capture settings: loops over experts reach the backend whole; everything else is traced as it is without us."""

import contextlib
import functools
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo import config
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

import samoyeds_compile.backend
from samoyeds_compile import Report, base, capture
from samoyeds_compile.graph.values import graph_modules
from samoyeds_compile.report.model import GraphReport
from tests.loops import CAPTURED, NOT_CAPTURED, BincountList, Binned, Masked, OneHotWhere, SplitCat

SETTINGS = ("capture_dynamic_output_shape_ops", "capture_scalar_outputs")
LENGTHS = (10, 14, 9)
UNACCOUNTED = capture.unaccounted


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """Whatever a test does, Dynamo's settings are afterwards what they were."""
    yield
    assert settings() == (False, False)


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if rewrites accounted for everything that was captured."""
    monkeypatch.setattr(capture, "unaccounted", lambda gm: [])


def settings() -> tuple[bool, bool]:
    return config.capture_dynamic_output_shape_ops, config.capture_scalar_outputs


def samoyeds(function: Any, compiler: str = "eager", **options: Any) -> tuple[Any, Report]:
    """Compiled with our backend, without rewrites, and the report."""
    report, fullgraph = Report(), options.pop("fullgraph", False)
    options = {"base": compiler, "report": report, "rewrite": False, **options}
    return torch.compile(function, backend="samoyeds", options=options, fullgraph=fullgraph), report


def plain(function: Any, compiler: str = "eager", **kwargs: Any) -> tuple[Any, list[int]]:
    """Compiled with the base compiler alone, and the sizes of the graphs that it was given."""
    sizes: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        sizes.append(sum(len(m.graph.nodes) for m in graph_modules(gm)))
        return lookup_backend(compiler)(gm, example_inputs)

    return torch.compile(function, backend=backend, **kwargs), sizes


def sizes_of(report: Report) -> list[int]:
    assert [g.problem for g in report.graphs if g.problem] == []
    return [g.nodes_before for g in report.graphs if not g.discarded]


def rows(length: int = LENGTHS[0], seed: int = 0) -> Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(seed))


def run(function: Any, model: nn.Module, x: Tensor, train: bool) -> list[Tensor]:
    """Output, and in training the gradients of input and parameters."""
    model.train(train).zero_grad()
    x = x.clone().requires_grad_(train)
    with contextlib.nullcontext() if train else torch.no_grad():
        y = function(x)
    if not train:
        return [y]
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def check(function: Any, model: nn.Module, x: Tensor, train: bool = False) -> None:
    torch.testing.assert_close(run(function, model, x, train), run(model, model, x, train))


def breaks_during(function: Any) -> Counter[str]:
    before = Counter(counters["graph_break"])
    function()
    return Counter(counters["graph_break"]) - before


# ------------------------------------------------------------------------------ loops that are captured


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("style", CAPTURED, ids=lambda style: style.__name__)
@pytest.mark.usefixtures("accepting")
def test_loop_is_one_graph(style: type[nn.Module], train: bool) -> None:
    """The whole loop in one graph, for every length and routing: one static graph, then dynamic ones."""
    model = style()
    function, report = samoyeds(model)
    for length in LENGTHS:
        check(function, model, rows(length), train)
    assert all(size > 8 * model.experts_count for size in sizes_of(report))
    assert 1 <= len(report.graphs) <= 3
    compiled = len(report.graphs)
    for seed in range(1, 6):
        check(function, model, rows(LENGTHS[1], seed), train)
    assert len(report.graphs) == compiled


@pytest.mark.inductor
@pytest.mark.parametrize(("style", "train"), [(OneHotWhere, True), (SplitCat, False)])
@pytest.mark.usefixtures("accepting")
def test_loop_on_inductor(style: type[nn.Module], train: bool) -> None:
    model = style()
    function, report = samoyeds(model, "inductor")
    check(function, model, rows(), train)
    assert len(sizes_of(report)) == 1 and settings() == (False, False)


# ---------------------------------------------------------------------- everything else: as without us


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("style", [*CAPTURED, *NOT_CAPTURED], ids=lambda style: style.__name__)
def test_as_without_us(style: type[nn.Module], train: bool) -> None:
    """A loop in which nothing was rewritten: same graphs, same graph breaks, same results."""
    model = style()
    function, report = samoyeds(model)
    ours = breaks_during(lambda: [check(function, model, rows(n), train) for n in LENGTHS])
    torch._dynamo.reset()
    function, sizes = plain(model)
    theirs = breaks_during(lambda: [check(function, model, rows(n), train) for n in LENGTHS])
    assert sizes_of(report) == sizes
    assert ours == theirs


def test_breaks_of_an_attempt_are_not_counted() -> None:
    """Traced first with ``n`` in the graph, which ends at the break; then without."""

    def function(x: Tensor) -> Tensor:
        n = x.sum().item()
        y = x * n
        torch._dynamo.graph_break()
        return y + 1

    compiled, report = samoyeds(function)
    ours = breaks_during(lambda: compiled(rows()))
    torch._dynamo.reset()
    compiled, sizes = plain(function)
    assert breaks_during(lambda: compiled(rows())) == ours and sizes == sizes_of(report)
    assert ours.total() == 2


@pytest.mark.inductor
def test_as_without_us_on_inductor() -> None:
    model = Binned()
    function, report = samoyeds(model, "inductor")
    check(function, model, rows(), train=True)
    torch._dynamo.reset()
    function, sizes = plain(model, "inductor")
    check(function, model, rows(), train=True)
    assert sizes_of(report) == sizes


def test_the_settings_alone_crash() -> None:
    """What the tests above protect from: with the settings on, Dynamo raises where it breaks the graph by default."""
    function, _ = plain(BincountList())
    with dynamo_settings(True, True), pytest.raises(Exception, match="data-dependent"):
        function(rows())


@pytest.mark.usefixtures("accepting")
def test_graph_that_the_base_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base compiler that fails on unknown sizes fails the attempt, not the model."""
    refused = []

    def compile_with_base(gm: fx.GraphModule, example_inputs: Any, options: Any) -> Any:
        if UNACCOUNTED(gm):
            refused.append(len(gm.graph.nodes))
            raise NotImplementedError("a size of u0")
        return gm

    monkeypatch.setattr(base, "compile_with_base", compile_with_base)
    model, seen = Binned(), []
    function, _ = samoyeds(model, report=seen.append)
    check(function, model, rows(), train=True)
    assert len(refused) == sum("a size of u0" in graph.discarded for graph in seen) > 0


def test_what_we_do_not_cause_fails_once() -> None:
    """An error that has nothing to do with the settings is raised as it is, and the backend is not asked again."""
    seen = []

    def fail(graph: GraphReport) -> None:
        seen.append(graph.name)
        raise ValueError("full disk")

    function, _ = samoyeds(lambda x: x * 2, report=fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="full disk"):
        function(rows())
    assert len(seen) == 1


# ----------------------------------------------------------------------------------------- the decision


def captured(function: Any, *args: Any) -> fx.GraphModule:
    graphs = []
    with dynamo_settings(True, True):
        torch.compile(function, backend=lambda gm, _: graphs.append(gm) or gm)(*args)
    (gm,) = graphs
    return gm


@contextlib.contextmanager
def dynamo_settings(*values: bool) -> Iterator[None]:
    with config.patch(dict(zip(SETTINGS, values, strict=True))):
        yield


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: (x * 2).sum(0), False),
        (lambda x: x[x[:, 0] > 0].sum(0), True),
        (lambda x: x * x.sum().item(), True),
        (lambda x: x * (x.amax() > 0).item(), True),
        (lambda x: x.split((x[:2, 0] * 0 + 5).int().tolist())[0].sum(0), True),
        (lambda x: torch.utils.checkpoint.checkpoint(lambda y: y[y > 0].sum() * y, x, use_reentrant=False), True),
    ],
    ids=["static", "mask", "float", "bool", "tolist", "nested"],
)
def test_unaccounted(function: Any, expected: bool) -> None:
    gm = captured(function, rows().requires_grad_())
    assert bool(capture.unaccounted(gm)) == expected


def test_known_by_the_inputs() -> None:
    """A size that the caller declared unknown is not of our making."""
    x = rows()
    torch._dynamo.decorators.mark_unbacked(x, 0)
    assert capture.unaccounted(captured(lambda x: x * 2, x)) == []


def test_rewritten_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a rewrite: the masked loop becomes one op, and with it goes all that has no known size."""

    def positive(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for column in range(x.shape[1]):
            picked = torch.where(x[:, column] > 0)[0]
            out[picked, column] = x[picked, column] * 2
        return out

    def rewrite(gm: fx.GraphModule, example_inputs: Any, options: Any) -> GraphReport:
        report = GraphReport("", len(gm.graph.nodes))
        (*sizes, x), output = (n for n in gm.graph.nodes if n.op == "placeholder"), gm.graph.output_node()
        with gm.graph.inserting_before(output):
            new = gm.graph.call_function(lambda x: x.relu() * 2, (x,))
        new.meta["example_value"] = x.meta["example_value"]
        output.args = ((new,),)
        for node in reversed(list(gm.graph.nodes)):
            if node not in (*sizes, x, new, output):
                gm.graph.erase_node(node)
        gm.recompile()
        report.nodes_after = len(gm.graph.nodes)
        return report

    monkeypatch.setattr(samoyeds_compile.backend, "optimize", rewrite)
    function, report = samoyeds(positive, "aot_eager")
    for length in LENGTHS:
        torch.testing.assert_close(function(rows(length)), positive(rows(length)))
    assert [g.nodes_after for g in report.graphs] == [3, 4]  # the second has the size as an input
    assert all(g.nodes_before > 40 for g in report.graphs)


@pytest.mark.parametrize("again", [False, True])
def test_discarded_graph_explains_its_blocks(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was found in a graph not in use is reported with the reason, unless a later graph has it too."""

    def find(gm: fx.GraphModule, *args: Any) -> GraphReport:
        blocks = [samoyeds_compile.BlockReport("", "file:1: code", "loop", rewritten=True, became=("op",))]
        return GraphReport("0/0", blocks=blocks if again or UNACCOUNTED(gm) else [])

    monkeypatch.setattr(samoyeds_compile.backend, "optimize", find)
    function, report = samoyeds(lambda x: (x + 1) * x.sum().item())
    function(rows())
    if again:
        assert [g.discarded for g in report.graphs] == [""] * len(report.graphs)
        return
    block = report.blocks[0]
    assert report.graphs[0].discarded == block.reason and "known only when it runs" in str(block.reason)
    assert not block.rewritten and block.became == () and len(report.blocks) == 1


# ------------------------------------------------------------------------------- whose settings, and when


@torch.library.custom_op("samoyeds_test::probe", mutates_args=())
def probe(x: Tensor) -> Tensor:
    return x.clone()


WHILE_TRACING: list[tuple[bool, bool]] = []
IN_A_THREAD: list[tuple[bool, bool]] = []


@probe.register_fake
def _(x: Tensor) -> Tensor:
    WHILE_TRACING.append(settings())
    thread = threading.Thread(target=lambda: IN_A_THREAD.append(settings()))
    thread.start()
    thread.join()
    return torch.empty_like(x)


@pytest.fixture
def probed() -> Iterator[list[tuple[bool, bool]]]:
    WHILE_TRACING.clear()
    IN_A_THREAD.clear()
    yield WHILE_TRACING


def test_settings_hold_only_while_we_trace(probed: list[tuple[bool, bool]]) -> None:
    elsewhere = []

    @torch.compiler.disable
    def python_code(x: Tensor) -> Tensor:
        elsewhere.append(settings())
        return x

    def function(x: Tensor) -> Tensor:
        return python_code(probe(x)) + 1

    compiled, _ = samoyeds(function, report=lambda graph: elsewhere.append(settings()))
    elsewhere.append(settings())
    compiled(rows())
    elsewhere.append(settings())
    assert (True, True) in probed
    assert len(elsewhere) == 5 and set(elsewhere) == {(False, False)}
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
        assert set(IN_A_THREAD) == {(False, False)}


def test_settings_do_not_survive_an_error(probed: list[tuple[bool, bool]]) -> None:
    def function(x: Tensor) -> Tensor:
        return probe(x) @ x

    compiled, _ = samoyeds(function)
    with pytest.raises(RuntimeError, match=r"multiplied|size"):
        compiled(rows())
    assert (True, True) in probed and settings() == (False, False)


def test_other_backends_are_left_alone(probed: list[tuple[bool, bool]]) -> None:
    """Before, after, and in the middle of a compilation of ours."""
    model, other = OneHotWhere(), Masked()
    function, sizes = plain(lambda x: other(probe(x)))
    nested = []

    def compile_another(graph: GraphReport) -> None:
        if not nested:
            nested.append(graph.name)
            function(rows())

    ours, _ = samoyeds(lambda x: model(x) + 1, report=compile_another)
    check(ours, model_plus_one(model), rows())
    assert nested and set(probed) == {(False, False)}
    count = len(sizes)
    torch._dynamo.reset()
    function(rows())
    assert len(sizes) == 2 * count and set(probed) == {(False, False)}


def model_plus_one(model: nn.Module) -> nn.Module:
    class PlusOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    return PlusOne()


@pytest.mark.parametrize("values", [(True, True), (True, False), (False, True)], ids=str)
def test_explicit_settings_are_respected(values: tuple[bool, bool]) -> None:
    """What the user switched on stays on: those graphs are compiled as they come, rewritten or not."""
    model = OneHotWhere()
    with dynamo_settings(*values):
        function, report = samoyeds(model)
        check(function, model, rows())
        assert settings() == values
        torch._dynamo.reset()
        function, sizes = plain(model)
        check(function, model, rows())
    assert sizes_of(report) == sizes


@pytest.mark.parametrize("style", [OneHotWhere, SplitCat, BincountList])
def test_fullgraph(style: type[nn.Module]) -> None:
    """Dynamo captures such ops by itself then; what it cannot capture is the same error."""
    model = style()
    plainly, sizes = plain(model, fullgraph=True)
    outcome = outcome_of(plainly)
    torch._dynamo.reset()
    function, report = samoyeds(model, fullgraph=True)
    assert outcome_of(function) == outcome
    assert sizes_of(report) == sizes


def outcome_of(function: Any) -> Any:
    try:
        return function(rows()).shape
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("off", ["option", "environment"])
@pytest.mark.usefixtures("accepting")
def test_switched_off(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = OneHotWhere(), {}
    if off == "option":
        options["capture"] = False
    else:
        monkeypatch.setenv("SAMOYEDS_CAPTURE", "0")
    function, report = samoyeds(model, **options)
    check(function, model, rows())
    torch._dynamo.reset()
    function, sizes = plain(model)
    check(function, model, rows())
    assert sizes_of(report) == sizes


# ----------------------------------------------------------------------------------- ways to say samoyeds


def by_decorator(model: nn.Module, options: dict[str, Any]) -> Any:
    @torch.compile(backend="samoyeds", options=options)
    def function(x: Tensor) -> Tensor:
        return model(x)

    return function


def by_module(model: nn.Module, options: dict[str, Any]) -> Any:
    model.compile(backend="samoyeds", options=options)
    return model


def by_function(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend=samoyeds_compile.backend.samoyeds, options=options)


def by_partial(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend=functools.partial(samoyeds_compile.backend.samoyeds, options=options))


def by_dynamo(model: nn.Module, options: dict[str, Any]) -> Any:
    return torch._dynamo.optimize(functools.partial(samoyeds_compile.backend.samoyeds, options=options))(model)


def by_region(model: nn.Module, options: dict[str, Any]) -> Any:
    other = OneHotWhere()
    for region in (model, other):
        region.compile(backend="samoyeds", options=options)
    return lambda x: (model(x), other(x))[0]


@pytest.mark.parametrize("way", [by_decorator, by_module, by_function, by_partial, by_dynamo, by_region])
@pytest.mark.usefixtures("accepting")
def test_ways_to_compile(way: Any) -> None:
    report = Report()
    function = way(OneHotWhere(), {"base": "eager", "rewrite": False, "report": report})
    torch.testing.assert_close(function(rows()), OneHotWhere()(rows()))
    assert len(sizes_of(report)) == 1


@pytest.mark.usefixtures("accepting")
def test_compiled_in_another_thread() -> None:
    model = OneHotWhere()
    function, report = samoyeds(model)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append((function(rows()), settings())))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0][0], model(rows()))
    assert results[0][1] == (False, False) and len(sizes_of(report)) == 1


SCRIPT = """
import torch
import samoyeds_compile.backend
assert "torch._dynamo" not in __import__("sys").modules
from samoyeds_compile import capture

capture.unaccounted = lambda gm: []
sizes = []
options = {"base": "eager", "rewrite": False, "report": lambda g: sizes.append(g.nodes_before)}
torch.compile(lambda x: x[x > 0].sum() * 2, backend="samoyeds", options=options)(torch.randn(8))
assert len(sizes) == 1, sizes
"""


def test_backend_imported_before_dynamo() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
