"""What goes wrong: options, operands, a step of the pipeline, a rewrite. Errors say what to do; models go on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

import samoyeds_compile.backend
import samoyeds_compile.rewrite
from samoyeds_compile import OperandError, OptionError, Options, Report, SamoyedsError
from samoyeds_compile.match.region import MoERegion
from tests.models import families

CLASSES = {entry.id: entry for entry in families.decorated_experts_classes()}


def moe() -> nn.Module:
    """Router and experts of a tiny Mixtral."""
    return families.build(CLASSES["mixtral"]).model.layers[0].mlp


def hidden_states() -> Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


def run(function: Any) -> Tensor:
    with torch.no_grad():
        return function(hidden_states())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def compiled(function: Any, **options: Any) -> tuple[Any, Report]:
    report = Report()
    options = {"base": "aot_eager", "report": report} | options
    return torch.compile(function, backend="samoyeds", options=options), report


def message_of(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# --------------------------------------------------------------------------------------------- options


def test_unknown_option() -> None:
    message = message_of(OptionError, lambda: Options.from_call(options={"frobnicate": 1}))
    assert "'frobnicate'" in message
    for name in ("base", "mode", "rewrite", "validate", "disable", "dump", "report"):
        assert name in message


@pytest.mark.parametrize(
    ("misspelt", "meant"), [("validat", "validate"), ("rewrites", "rewrite"), ("max_autotun", "max_autotune")]
)
def test_misspelt_option(misspelt: str, meant: str) -> None:
    message = message_of(OptionError, lambda: Options.from_call(options={misspelt: True}))
    assert repr(misspelt) in message and f"Did you mean {meant!r}" in message


def test_misspelt_option_through_compile() -> None:
    """Dynamo wraps what a backend raises; the message must survive it."""
    forward = torch.compile(moe(), backend="samoyeds", options={"validat": True})
    message = message_of(torch._dynamo.exc.BackendCompilerFailed, lambda: run(forward))
    assert "OptionError" in message and "'validate'" in message


def test_unknown_mode() -> None:
    message = message_of(OptionError, lambda: Options.from_call(mode="fastest"))
    assert "'fastest'" in message and "reduce-overhead" in message and "max-autotune" in message


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("base", "tvm", "inductor, aot_eager, eager"),
        ("base", None, "inductor, aot_eager, eager"),
        ("mode", 3, "reduce-overhead"),
        ("rewrite", 2, "True or False"),
        ("rewrite", "maybe", "True or False"),
        ("validate", None, "True or False"),
        ("disable", 5, "family names"),
        ("disable", [1], "family names"),
        ("disable", "loops", "grouped, gathered"),
        ("dump", 5, "folder"),
        ("dump", "", "folder"),
        ("report", "report.json", "Report"),
        ("inductor", 5, "options"),
    ],
)
def test_wrong_values(name: str, value: Any, valid: str) -> None:
    """The message names the option, the value and what is valid."""
    message = message_of(OptionError, lambda: Options.from_call(options={name: value}))
    assert name in message and valid in message
    assert str(value) in message


@pytest.mark.parametrize("options", [{3: True}, {None: 1}], ids=["number", "None"])
def test_option_names_that_are_no_text(options: dict[Any, Any]) -> None:
    assert str(next(iter(options))) in message_of(OptionError, lambda: Options.from_call(options=options))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("BASE", "foo"), ("MODE", "foo"), ("REWRITE", "foo"), ("VALIDATE", "2"), ("DISABLE", "foo")],
)
def test_bad_environment(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says that it was the environment, or the user would look in vain at the call."""
    monkeypatch.setenv(f"SAMOYEDS_{variable}", value)
    message = message_of(OptionError, Options.from_call)
    assert repr(value) in message
    assert f"SAMOYEDS_{variable}" in message


def test_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is read, the call wins over it, and an empty variable is none."""
    for name, value in (("BASE", "eager"), ("VALIDATE", "off"), ("DISABLE", "gathered"), ("DUMP", str(tmp_path))):
        monkeypatch.setenv(f"SAMOYEDS_{name}", value)
    monkeypatch.setenv("SAMOYEDS_MODE", "")
    options = Options.from_call(options={"base": "aot_eager"})
    assert (options.base, options.validate, options.disable, options.dump, options.mode) == (
        "aot_eager", False, ("gathered",), tmp_path, "default")  # fmt: skip


def test_bad_environment_is_no_matter_where_the_call_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMOYEDS_BASE", "foo")
    assert Options.from_call(options={"base": "eager"}).base == "eager"


def inductor_config(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> dict[str, Any]:
    """The patches that reach Inductor for these arguments of ``torch.compile``."""
    calls: list[dict[str, Any]] = []

    def spy(gm: Any, example_inputs: Any, config_patches: dict[str, Any], **rest: Any) -> Any:
        calls.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", spy)
    block = moe()
    close(run(torch.compile(block, backend="samoyeds", **kwargs)), run(block))
    assert len(calls) == 1
    return calls[0]


@pytest.mark.parametrize(
    ("options", "patches"),
    [
        ({"max_autotune": True}, {"max_autotune": True}),
        ({"triton.cudagraphs": True, "validate": False}, {"triton.cudagraphs": True}),
        ({"inductor": {"max_autotune": True}}, {"max_autotune": True}),
        ({"max-autotune": True}, {"max_autotune": True}),
        ({"validate": True}, {}),
    ],
    ids=str,
)
def test_options_of_inductor(options: dict[str, Any], patches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert inductor_config(monkeypatch, options=options) == patches


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inductor_config(monkeypatch, mode=mode) == torch._inductor.list_mode_options(mode)


def test_mode_and_options_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` takes one of them only, so the mode is an option too; a single option wins over it."""
    patches = inductor_config(monkeypatch, options={"mode": "max-autotune", "triton.cudagraphs": False})
    assert patches == {**torch._inductor.list_mode_options("max-autotune"), "triton.cudagraphs": False}


@pytest.mark.inductor
def test_option_of_inductor_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor sees it in its configuration while it compiles."""
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch._inductor.config.epilogue_fusion)
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", spy)
    block = moe()
    close(run(torch.compile(block, backend="samoyeds", options={"epilogue_fusion": False})), run(block))
    assert False in seen and torch._inductor.config.epilogue_fusion


# ------------------------------------------------------------------------------------------- no blocks


@pytest.mark.inductor
def test_model_without_moe() -> None:
    model, report = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)), Report()
    forward = torch.compile(model, backend="samoyeds", options={"report": report})
    x = torch.randn(3, 8)
    close(forward(x), model(x))
    assert len(report.graphs) == 1 and report.blocks == []
    assert report.graphs[0].nodes_before == report.graphs[0].nodes_after
    assert "no MoE block" in str(report)


def test_disabled_family() -> None:
    forward, report = compiled(moe(), disable=["grouped"])
    close(run(forward), run(moe()))
    assert report.graphs and report.rewritten == []


def test_rewriting_switched_off() -> None:
    forward, report = compiled(moe(), rewrite=False)
    close(run(forward), run(moe()))
    assert report.rewritten == []
    assert ["rewrite=False" in (b.reason or "") for b in report.blocks] == [True]


# -------------------------------------------------------------------------------------------- operands


def operands(**changes: Any) -> tuple[Any, ...]:
    """Arguments of ``moe_experts``: T=3, K=2, E=4, H=8, I=6."""
    values = {
        "x": torch.randn(3, 8),
        "expert_ids": torch.tensor([[0, 1], [2, 3], [1, 0]]),
        "expert_weights": torch.rand(3, 2),
        "gate": [],
        "up": [torch.randn(4, 12, 8)],
        "down": [torch.randn(4, 8, 6)],
        "gate_bias": None,
        "up_bias": None,
        "down_bias": None,
        "activation": "silu(gate) * up",
        "gate_up_layout": "concatenated",
        "weight_layout": "out_in",
        "weighting": "output",
        "compute_dtype": torch.float32,
        "out_dtype": None,
    }
    return tuple((values | changes).values())


def moe_experts(**changes: Any) -> Tensor:
    return torch.ops.samoyeds.moe_experts(*operands(**changes))


OF_ROUTING = "operands|expert_ids|expert_weights"
OF_BIAS = "operands|bias|up_bias|down_bias"
WRONG_OPERANDS = {
    "tokens in three dimensions": ({"x": torch.randn(1, 3, 8)}, "x"),
    "tokens of another width": ({"x": torch.randn(3, 9)}, "x"),
    "ids made flat": ({"expert_ids": torch.zeros(6, dtype=torch.int64)}, "expert_ids"),
    "ids of more tokens": ({"expert_ids": torch.zeros(4, 2, dtype=torch.int64)}, "expert_ids"),
    "ids that are no integers": ({"expert_ids": torch.zeros(3, 2)}, "expert_ids"),
    "ids that are truth values": ({"expert_ids": torch.zeros(3, 2, dtype=torch.bool)}, "expert_ids"),
    "weights of another k": ({"expert_weights": torch.rand(3, 1)}, "expert_weights"),
    "weights made flat": ({"expert_weights": torch.rand(6)}, "expert_weights"),
    "one expert's weight": ({"up": [torch.randn(12, 8)]}, "up|down"),
    "one expert's second weight": ({"down": [torch.randn(8, 6)]}, "down|weight"),
    "second weight of other experts": ({"down": [torch.randn(5, 8, 6)]}, "down|weight|offsets"),
    "second weight of another width": ({"down": [torch.randn(4, 8, 7)]}, "down|weight|x"),
    "weights stored the other way": ({"weight_layout": "in_out"}, "x|up|weight"),
    "weights stored in no way": ({"weight_layout": "sideways"}, "weight_layout"),
    "gate and up in no way": ({"gate_up_layout": "woven"}, "gate_up_layout|activation"),
    "gate missing": ({"gate_up_layout": "separate"}, "gate"),
    "gate left over": ({"gate": [torch.randn(4, 6, 8)]}, "gate"),
    "an activation of plain experts": ({"activation": "relu(x)"}, "activation"),
    "tokens on another device": ({"x": torch.randn(3, 8, device="meta")}, "operands|x"),
    "weights on another device": ({"up": [torch.randn(4, 12, 8, device="meta")]}, "operands|up"),
    "second weights on another device": ({"down": [torch.randn(4, 8, 6, device="meta")]}, "operands|down"),
    "ids on another device": ({"expert_ids": torch.ones(3, 2, dtype=torch.int64, device="meta")}, OF_ROUTING),
    "routing weights on another device": ({"expert_weights": torch.rand(3, 2, device="meta")}, OF_ROUTING),
    "bias on another device": ({"up_bias": torch.randn(4, 12, device="meta")}, OF_BIAS),
    "bias of another width": ({"up_bias": torch.randn(4, 11)}, OF_BIAS),
    "bias of other experts": ({"up_bias": torch.randn(3, 12)}, OF_BIAS),
    "one expert's bias": ({"up_bias": torch.randn(12)}, OF_BIAS),
    "second bias of another width": ({"down_bias": torch.randn(4, 9)}, OF_BIAS),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_OPERANDS)
def test_wrong_operands(what: str) -> None:
    """A typed error that names the op, the operand and, after a semicolon, what to do."""
    changes, operand = WRONG_OPERANDS[what]
    message = message_of(OperandError, lambda: moe_experts(**changes))
    match = re.fullmatch(r"samoyeds::(\w+): (?P<operand>\w+) (?P<reason>[^;]+); (?P<remedy>.+)", message, re.S)
    assert match, message
    assert re.fullmatch(operand, match["operand"]), message


def test_activation_that_is_no_expression() -> None:
    message = message_of(ValueError, lambda: moe_experts(activation="__import__('os').getcwd()"))
    assert "activation" in message


@pytest.mark.parametrize("error", [OptionError, OperandError])
def test_errors_are_ours_and_value_errors(error: type[Exception]) -> None:
    assert issubclass(error, SamoyedsError) and issubclass(error, ValueError)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ids_out_of_range(dtype: torch.dtype) -> None:
    """Such a slot is nobody's: as if its routing weight were zero."""
    ids = torch.tensor([[0, 4], [100, 3], [7, 9]], dtype=dtype)
    x, up, down, weights = torch.randn(3, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6), torch.rand(3, 2)
    common = {"x": x, "up": [up], "down": [down]}
    actual = moe_experts(expert_ids=ids, expert_weights=weights, **common)
    inside = ids < 4
    expected = moe_experts(expert_ids=ids * inside, expert_weights=weights * inside, **common)
    close(actual, expected)
    assert actual[:2].abs().amin() > 0 and actual[2].abs().amax() == 0


def test_negative_ids() -> None:
    operand = {"x": torch.randn(3, 8), "expert_weights": torch.rand(3, 2)}
    actual = moe_experts(expert_ids=torch.tensor([[-1, -2], [-1, -1], [-4, -3]]), **operand)
    assert actual.abs().amax() == 0


# ------------------------------------------------------------------------------------ the pipeline fails


def damage(graph: torch.fx.Graph) -> None:
    """Leave a graph that would compute nonsense: every output is the first input."""
    first = next(iter(graph.nodes))
    graph.output_node().args = ((first,),)
    graph.eliminate_dead_code()


def damaged(matches: Any, *args: Any) -> None:
    for region, block in matches:
        block.became, block.rewritten = ("samoyeds::moe_experts",), True
        damage(region.graph.module.graph)
    raise RuntimeError("planted failure")


@pytest.mark.parametrize("base", ["aot_eager", "eager"])
def test_failing_step(base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The damage is undone, the model compiles and is right, and the report does not claim a rewrite."""
    monkeypatch.setattr(samoyeds_compile.backend, "rewrite_blocks", damaged)
    block = moe()
    forward, report = compiled(block, base=base)
    close(run(forward), run(block))
    assert "RuntimeError" in report.graphs[0].problem and "planted failure" in report.graphs[0].problem
    assert report.rewritten == [] and "planted failure" in report.blocks[0].reason
    assert report.graphs[0].nodes_before == report.graphs[0].nodes_after
    assert [r.levelname for r in caplog.records if r.name.startswith("samoyeds_compile")] == ["ERROR"]


def test_failing_step_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients reach the parameters through the restored graph."""
    monkeypatch.setattr(samoyeds_compile.backend, "rewrite_blocks", damaged)
    block = moe().train()
    forward, report = compiled(block)
    gradients = []
    for function in (block, forward):
        block.zero_grad()
        function(hidden_states()).square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert report.graphs[0].problem


def test_malformed_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that breaks the graph without noticing is found out by the check after it."""

    def misorder(matches: Any) -> None:
        for region, _ in matches:
            output = region.graph.module.graph.output_node()
            region.graph.of[region.x.node].node.prepend(output)

    monkeypatch.setattr(samoyeds_compile.backend, "rewrite_blocks", misorder)
    block = moe()
    forward, report = compiled(block)
    close(run(forward), run(block))
    assert "GraphInvariantError" in report.graphs[0].problem and "'rewrite'" in report.graphs[0].problem


@pytest.mark.parametrize("step", ["find_blocks", "keep_sound", "lower_blocks"])
def test_any_step_may_fail(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("planted failure")

    monkeypatch.setattr(samoyeds_compile.backend, step, fail)
    block = moe()
    forward, report = compiled(block)
    close(run(forward), run(block))
    assert "planted failure" in report.graphs[0].problem and report.rewritten == []


def test_failing_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of one family's rule leaves that block alone and says so."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise IndexError("planted failure")

    monkeypatch.setattr("samoyeds_compile.match.grouped.find_activation", fail)
    block = moe()
    forward, report = compiled(block)
    close(run(forward), run(block))
    assert report.graphs[0].problem is None and report.rewritten == []
    assert ["planted failure" in (b.reason or "") for b in report.blocks] == [True]


def test_failing_report() -> None:
    """The user's own callable is not part of the pipeline: its error is shown, not swallowed."""

    def fail(graph: Any) -> None:
        raise ZeroDivisionError("mine")

    forward, _ = compiled(moe(), report=fail)
    assert "mine" in message_of(torch._dynamo.exc.BackendCompilerFailed, lambda: run(forward))


# ----------------------------------------------------------------------------------- the rewrite is wrong


def gelu_for_silu(region: MoERegion, *args: Any) -> Any:
    original, region.activation = region.activation, "gelu(gate) * up"
    try:
        return EMIT(region, *args)
    finally:
        region.activation = original


def ids_for_ids(region: MoERegion, graph: torch.fx.Graph, *args: Any) -> Any:
    """Every slot goes to the next expert."""
    node = EMIT(region, graph, *args)
    with graph.inserting_before(node):
        other = graph.call_function(torch.remainder, (node.args[1] + 1, region.num_experts))
    node.update_arg(1, other)
    return node


def weights_squared(region: MoERegion, graph: torch.fx.Graph, *args: Any) -> Any:
    node = EMIT(region, graph, *args)
    with graph.inserting_before(node):
        node.update_arg(2, graph.call_function(torch.square, (node.args[2],)))
    return node


def without_gradient(region: MoERegion, graph: torch.fx.Graph, *args: Any) -> Any:
    """The right result, but the experts learn nothing."""
    node = EMIT(region, graph, *args)
    with graph.inserting_before(node):
        (down,) = node.args[5]
        node.update_arg(5, [graph.call_method("detach", (down,))])
    return node


def in_other_dtype(region: MoERegion, graph: torch.fx.Graph, *args: Any) -> Any:
    node = EMIT(region, graph, *args)
    node.update_arg(14, torch.float64)
    return node


def nothing_runs(region: MoERegion, graph: torch.fx.Graph, *args: Any) -> Any:
    node = EMIT(region, graph, *args)
    node.update_arg(10, "woven")
    return node


EMIT = samoyeds_compile.rewrite._emit_canonical


@pytest.mark.parametrize("wrong", [gelu_for_silu, ids_for_ids, weights_squared, in_other_dtype, nothing_runs])
def test_wrong_rewrite_is_refused(
    wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation sees it, the original stays, and the log and the report say so."""
    monkeypatch.setattr(samoyeds_compile.rewrite, "_emit_canonical", wrong)
    block = moe()
    forward, report = compiled(block)
    close(run(forward), run(block))
    assert report.rewritten == [] and report.graphs[0].problem is None
    assert ["validation" in (b.reason or "") for b in report.blocks] == [True]
    assert any("validation" in r.getMessage() for r in caplog.records if r.levelname == "WARNING")


@pytest.mark.parametrize("wrong", [gelu_for_silu, weights_squared])
def test_wrong_rewrite_without_validation(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted rewrites are wrong indeed: unvalidated, the wrong result comes out."""
    monkeypatch.setattr(samoyeds_compile.rewrite, "_emit_canonical", wrong)
    block = moe()
    forward, report = compiled(block, validate=False)
    actual, expected = run(forward), run(block)
    assert (actual - expected).abs().max() > 1e-2 * expected.abs().max()
    assert len(report.rewritten) == 1


def test_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samoyeds_compile.rewrite, "_emit_canonical", without_gradient)
    block = moe().train()
    forward, report = compiled(block)
    forward(hidden_states()).sum().backward()
    assert block.experts.down_proj.grad.abs().max() > 0
    assert report.rewritten == [] and "validation" in report.blocks[0].reason


def test_refusal_of_one_block_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two different structures in one graph: the wrong one is left, the right one rewritten."""

    def only_silu_wrong(region: MoERegion, *args: Any) -> Any:
        return gelu_for_silu(region, *args) if region.activation == "silu(gate) * up" else EMIT(region, *args)

    monkeypatch.setattr(samoyeds_compile.rewrite, "_emit_canonical", only_silu_wrong)
    first, second = moe(), moe()
    second.experts.act_fn = nn.Sigmoid()
    model = nn.Sequential(first, second)
    forward, report = compiled(model)
    close(run(forward), run(model))
    assert [b.rewritten for b in report.blocks] == [False, True]
