"""What goes wrong: options, operands, a step of the pipeline, a rewrite. Errors say what to do; models go on."""

import dataclasses
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
from samoyeds_compile.match.driver import FAMILIES
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
    for field in dataclasses.fields(Options):
        assert field.name in message


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
        ("disable", "loops", "grouped, gathered, written, dispatched"),
        ("capture", "sometimes", "True or False"),
        ("fuse_routers", 2, "True or False"),
        ("triton", "gpu", "True or False"),
        ("grouped_mm", 5, "mylib::gmm"),
        ("grouped_mm", ["mylib::gmm"], "mylib::gmm"),
        ("grouped_mm", "mylib::gmm", "'offsets'"),
        ("grouped_mm", {"mylib::gmm": 5}, "roles"),
        ("grouped_mm", {"mylib::gmm": "input weight counts"}, "input, weight, weight_t, offsets, sizes, transposed, _"),
        ("grouped_mm", {"mylib::gmm": "input weight"}, "'offsets' or 'sizes'"),
        ("grouped_mm", {"mylib::gmm": "input weight offsets sizes"}, "'offsets' or 'sizes'"),
        ("grouped_mm", {"mylib::gmm": "input weight weight_t sizes"}, "'weight' or 'weight_t'"),
        ("grouped_mm", {"mylib::gmm": "input input weight sizes"}, "'input'"),
        ("grouped_mm", {"mylib::gmm": ""}, "'input'"),
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
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    assert str(shown) in message


@pytest.mark.parametrize("options", [{3: True}, {None: 1}], ids=["number", "None"])
def test_option_names_that_are_no_text(options: dict[Any, Any]) -> None:
    assert str(next(iter(options))) in message_of(OptionError, lambda: Options.from_call(options=options))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("BASE", "foo"), ("MODE", "foo"), ("REWRITE", "foo"), ("VALIDATE", "2"), ("DISABLE", "foo"),
     ("CAPTURE", "foo"), ("FUSE_ROUTERS", "foo"), ("GROUPED_MM", "foo")],
)  # fmt: skip
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


GMM = {"mylib::gmm": ("input", "weight", "sizes", "transposed"), "mylib::gmm2": ("_", "input", "weight_t", "offsets")}


@pytest.mark.parametrize(
    "value",
    [
        GMM,
        {name: list(roles) for name, roles in GMM.items()},
        {name: " ".join(roles) for name, roles in GMM.items()},
        ",".join(f"{name}={' '.join(roles)}" for name, roles in GMM.items()),
    ],
    ids=["tuples", "lists", "texts", "one text"],
)
def test_grouped_products_of_other_libraries(value: Any) -> None:
    assert Options.from_call(options={"grouped_mm": value}).grouped_mm == GMM


def test_grouped_products_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell: names, roles, commas."""
    monkeypatch.setenv(
        "SAMOYEDS_GROUPED_MM", "mylib::gmm=input weight sizes transposed,mylib::gmm2=_ input weight_t offsets"
    )
    assert Options.from_call().grouped_mm == GMM
    assert Options.from_call(options={"grouped_mm": {}}).grouped_mm == {}


@torch.library.custom_op("samoyeds_tests::gmm", mutates_args=())
def gmm(x: Tensor, weight: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
    """A grouped product as libraries have them; they give it no gradient here."""
    parts = x.split(sizes.tolist())
    return torch.cat([rows @ (w.mT if trans_b else w) for rows, w in zip(parts, weight, strict=True)])


@gmm.register_fake
def _(x: Tensor, weight: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if trans_b else 2])


def of_another_library(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sorted rows, sizes instead of offsets; the first weight is stored [E, out, in], the second [E, in, out]."""
    order = ids.flatten().argsort(stable=True)
    sizes = torch.bincount(ids.flatten(), minlength=up.shape[0])
    gate, value = gmm(x[order // ids.shape[1]], up, sizes, True).chunk(2, dim=-1)
    y = gmm(nn.functional.silu(gate) * value, down, sizes, False) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, order // ids.shape[1], y)


@pytest.mark.parametrize("named", [True, False])
def test_a_grouped_product_of_another_library(named: bool) -> None:
    """It is one if it is named; an unknown operator is left alone."""
    x, up, down = torch.randn(7, 8), torch.randn(4, 24, 8), torch.randn(4, 12, 8)
    given = x, torch.rand(7, 4).topk(2).indices, torch.rand(7, 2), up, down
    options = {"grouped_mm": {"samoyeds_tests::gmm": "input weight sizes transposed"}} if named else {}
    forward, report = compiled(of_another_library, **options)
    with torch.no_grad():
        close(forward(*given), of_another_library(*given))
    assert [b.rewritten for b in report.blocks if b.rewritten] == [True] * named


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
    """Another one may still recognise the block; without both nothing does."""
    forward, report = compiled(moe(), disable=["grouped"])
    close(run(forward), run(moe()))
    assert [b.rewritten for b in report.blocks] == [True]
    forward, report = compiled(moe(), disable=["grouped", "written"])
    close(run(forward), run(moe()))
    assert report.graphs and report.rewritten == []


def test_every_family_can_be_disabled() -> None:
    names = ("grouped", "gathered", "written", "dispatched", "sorted_rows")
    assert tuple(f.name for f in FAMILIES) == names
    assert Options.from_call(options={"disable": ",".join(names)}).disable == names
    forward, report = compiled(moe(), disable=names)
    close(run(forward), run(moe()))
    assert report.graphs and report.blocks == []


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
    """A defect of one family's rule says so; the block is left alone unless another family recognises it."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise IndexError("planted failure")

    monkeypatch.setattr("samoyeds_compile.match.grouped.find_activation", fail)
    block = moe()
    forward, report = compiled(block)
    close(run(forward), run(block))
    assert report.graphs[0].problem is None and [b.rewritten for b in report.blocks] == [True]
    torch._dynamo.reset()
    forward, report = compiled(block, disable=["written"])
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


def gelu_for_silu(emitter: Any) -> Any:
    original, emitter.region.activation = emitter.region.activation, "gelu(gate) * up"
    try:
        return EMIT(emitter)
    finally:
        emitter.region.activation = original


def ids_for_ids(emitter: Any) -> Any:
    """Every slot goes to the next expert."""
    node = EMIT(emitter)
    with emitter.graph.inserting_before(node):
        other = emitter.call(torch.remainder, emitter.call(torch.add, node.args[1], 1), emitter.region.num_experts)
    node.update_arg(1, other)
    return node


def weights_squared(emitter: Any) -> Any:
    node = EMIT(emitter)
    with emitter.graph.inserting_before(node):
        node.update_arg(2, emitter.call(torch.square, node.args[2]))
    return node


def without_gradient(emitter: Any) -> Any:
    """The right result, but the experts learn nothing."""
    node = EMIT(emitter)
    with emitter.graph.inserting_before(node):
        (down,) = node.args[5]
        node.update_arg(5, [emitter.call(torch.detach, down)])
    return node


def in_other_dtype(emitter: Any) -> Any:
    node = EMIT(emitter)
    node.update_arg(14, torch.float64)
    return node


def nothing_runs(emitter: Any) -> Any:
    node = EMIT(emitter)
    node.update_arg(10, "woven")
    return node


EMIT = samoyeds_compile.rewrite._Emitter.canonical


@pytest.mark.parametrize("wrong", [gelu_for_silu, ids_for_ids, weights_squared, in_other_dtype, nothing_runs])
def test_wrong_rewrite_is_refused(
    wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation sees it, the original stays, and the log and the report say so."""
    monkeypatch.setattr(samoyeds_compile.rewrite._Emitter, "canonical", wrong)
    block = moe()
    forward, report = compiled(block)
    close(run(forward), run(block))
    assert report.rewritten == [] and report.graphs[0].problem is None
    assert ["validation" in (b.reason or "") for b in report.blocks] == [True]
    assert any("validation" in r.getMessage() for r in caplog.records if r.levelname == "WARNING")


@pytest.mark.parametrize("wrong", [gelu_for_silu, weights_squared])
def test_wrong_rewrite_without_validation(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted rewrites are wrong indeed: unvalidated, the wrong result comes out."""
    monkeypatch.setattr(samoyeds_compile.rewrite._Emitter, "canonical", wrong)
    block = moe()
    forward, report = compiled(block, validate=False)
    actual, expected = run(forward), run(block)
    assert (actual - expected).abs().max() > 1e-2 * expected.abs().max()
    assert len(report.rewritten) == 1


def test_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samoyeds_compile.rewrite._Emitter, "canonical", without_gradient)
    block = moe().train()
    forward, report = compiled(block)
    forward(hidden_states()).sum().backward()
    assert block.experts.down_proj.grad.abs().max() > 0
    assert report.rewritten == [] and "validation" in report.blocks[0].reason


def test_refusal_of_one_block_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two different structures in one graph: the wrong one is left, the right one rewritten."""

    def only_silu_wrong(emitter: Any) -> Any:
        return gelu_for_silu(emitter) if emitter.region.activation == "silu(gate) * up" else EMIT(emitter)

    monkeypatch.setattr(samoyeds_compile.rewrite._Emitter, "canonical", only_silu_wrong)
    first, second = moe(), moe()
    second.experts.act_fn = nn.Sigmoid()
    model = nn.Sequential(first, second)
    forward, report = compiled(model)
    close(run(forward), run(model))
    assert [b.rewritten for b in report.blocks] == [False, True]
