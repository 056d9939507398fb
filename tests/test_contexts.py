"""The surroundings in which models are compiled: autocast, checkpointing, caches, regions, grad modes, odd sizes."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from transformers import CompileConfig, DynamicCache

from samoyeds_compile import Report
from tests.models import families

CLASSES = {entry.id: entry for entry in families.decorated_experts_classes()}
IMPLEMENTATIONS = ["grouped_mm", "batched_mm"]
MODELS = [("mixtral", "grouped_mm"), ("gpt_oss", "batched_mm")]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative to the largest entry."""


def build(name: str = "mixtral", implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = families.build(CLASSES[name], dtype=dtype)
    model.set_experts_implementation(implementation)
    return model


def tokens(model: nn.Module, batch: int = 2, length: int = 16) -> Tensor:
    return families.inputs(CLASSES["mixtral"], model, batch, length)["input_ids"]


def arguments() -> tuple[dict[str, Any], Report]:
    """What to pass to ``compile``, and the report it will fill."""
    report = Report()
    return {"backend": "samoyeds", "options": {"base": "aot_eager", "report": report}}, report


def compiled(function: Any) -> tuple[Any, Report]:
    how, report = arguments()
    return torch.compile(function, **how), report


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal shape and dtype, and equal up to the rounding of `dtype` (that of the results by default)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    scale = float(expected.detach().abs().max())
    tolerance = TOLERANCE[dtype or expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        close(actual[name], gradient, dtype)


def assert_rewritten(report: Report, blocks: int) -> None:
    assert [b.reason for b in report.blocks if not b.rewritten] == []
    assert len(report.rewritten) == blocks


def check_forward(forward: Any, model: nn.Module, dtype: torch.dtype | None = None) -> None:
    ids = tokens(model)
    with torch.no_grad():
        close(forward(ids).logits, model(ids).logits, dtype)


def check_training(forward: Any, model: nn.Module, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
    """Loss and gradients."""
    ids = tokens(model)
    expected, actual = (function(ids, labels=ids, **kwargs).loss for function in (model, forward))
    close(actual, expected, dtype)
    close_gradients(gradients(model, actual), gradients(model, expected), dtype)


# ------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_autocast(name: str, implementation: str, dtype: torch.dtype, inside: bool, train: bool) -> None:
    """bf16 autocast around the call, or in the compiled function, over fp32 and over bf16 weights."""
    layer = build(name, implementation, dtype).model.layers[0].train(train)
    block = nn.Sequential(layer.post_attention_layernorm, layer.mlp)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return first(block(x))

    forward, report = compiled(cast if inside else lambda x: first(block(x)))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = cast(x)
    with contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
        actual = forward(x)
    close(actual, expected, torch.bfloat16)
    if train:
        probe = torch.arange(actual.numel()).cos().view(actual.shape)
        close_gradients(*(gradients(block, (y.float() * probe).sum()) for y in (actual, expected)), torch.bfloat16)
    assert_rewritten(report, 1)


def first(out: Any) -> Tensor:
    """The hidden states where a block returns its router's scores too."""
    return out[0] if isinstance(out, tuple) else out


def test_autocast_around_a_model() -> None:
    model = build().train()
    forward, report = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_training(forward, model, torch.bfloat16)
    assert_rewritten(report, 2)


# ----------------------------------------------------------------------------- checkpointing, regions


@pytest.mark.parametrize(("name", "implementation"), MODELS)
def test_gradient_checkpointing(name: str, implementation: str) -> None:
    """The blocks sit in graphs of their own, one for each checkpointed layer."""
    model = build(name, implementation).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward, report = compiled(model)
    check_training(forward, model)
    assert_rewritten(report, 2)
    assert len(report.graphs) == 1


def test_checkpoint_by_hand() -> None:
    """``torch.utils.checkpoint`` in the user's own function."""
    block = build().model.layers[0].mlp

    def step(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    forward, report = compiled(step)
    x = torch.randn(2, 5, 64)
    expected, actual = step(x), forward(x)
    close(actual, expected)
    grads = [gradients(block, y.square().sum()) for y in (actual, expected)]
    close_gradients(*grads, torch.float32)
    assert_rewritten(report, 1)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_nested_compile_region(train: bool) -> None:
    """Two calls of a region share one subgraph, which is rewritten once."""
    block = build().model.layers[0].mlp.train(train)

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return block(x)

    forward, report = compiled(lambda x: region(region(x)))
    x = torch.randn(2, 5, 64)
    with torch.set_grad_enabled(train):
        expected, actual = block(block(x)), forward(x)
    close(actual, expected)
    if train:
        grads = [gradients(block, y.square().sum()) for y in (actual, expected)]
        close_gradients(*grads, torch.float32)
    assert len(report.graphs) == 1 and report.rewritten
    assert_rewritten(report, len(report.blocks))


# ---------------------------------------------------------------------------------- ways of compiling


def test_model_compile() -> None:
    model, (how, report) = build(), arguments()
    expected = model(tokens(model)).logits
    model.compile(**how)
    close(model(tokens(model)).logits, expected)
    assert_rewritten(report, 2)


def test_layer_compile() -> None:
    """Layer by layer, in a model that is not compiled; both layers share one graph."""
    model, (how, report) = build(), arguments()
    expected = model(tokens(model)).logits
    for layer in model.model.layers:
        layer.compile(**how)
    close(model(tokens(model)).logits, expected)
    assert_rewritten(report, 1)


def test_layer_compile_in_training() -> None:
    model, (how, report) = build().train(), arguments()
    reference = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.compile(**how)
    ids = tokens(model)
    losses = [m(ids, labels=ids).loss for m in (model, reference)]
    close(*losses)
    close_gradients(gradients(model, losses[0]), gradients(reference, losses[1]), torch.float32)
    assert_rewritten(report, 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grad_modes(implementation: str, mode: Callable[[], Any]) -> None:
    model = build(implementation=implementation)
    forward, report = compiled(model)
    ids = tokens(model)
    with mode():
        expected, actual = model(ids).logits, forward(ids).logits
    close(actual, expected)
    assert actual.requires_grad == expected.requires_grad
    assert_rewritten(report, 2)


def test_no_grad_inside() -> None:
    """The experts run without gradients in a function that has some."""
    block = build().model.layers[0].mlp
    head = nn.Linear(64, 64)

    def step(x: Tensor) -> Tensor:
        y = head(x)
        with torch.no_grad():
            z = block(y)
        return y * z

    forward, report = compiled(step)
    x = torch.randn(2, 5, 64)
    expected, actual = step(x), forward(x)
    close(actual, expected)
    grads = [gradients(head, y.square().sum()) for y in (actual, expected)]
    close_gradients(*grads, torch.float32)
    assert_rewritten(report, 1)


def test_grad_mode_changes_between_calls() -> None:
    """One compiled model serves evaluation and training in turn."""
    model = build()
    forward, report = compiled(model)
    check_forward(forward, model)
    check_training(forward, model.train())
    check_forward(forward, model.eval())
    assert_rewritten(report, len(report.blocks))
    assert len(report.graphs) == 2


def test_switched_implementation() -> None:
    """``set_experts_implementation`` after compilation compiles anew, and each surface is found."""
    model = build()
    forward, report = compiled(model)
    for implementation in ("grouped_mm", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        check_forward(forward, model)
    assert [b.family for b in report.rewritten] == ["grouped", "grouped", "gathered", "gathered"]
    assert_rewritten(report, 4)


def test_eager_implementation_still_runs() -> None:
    """The loop over experts reaches no graph: nothing to rewrite, and nothing that fails."""
    model = build(implementation="eager")
    forward, report = compiled(model)
    check_forward(forward, model)
    assert report.rewritten == []


# ------------------------------------------------------------------------------- caches and generation


@pytest.mark.parametrize(("name", "implementation"), MODELS)
def test_prefill_and_decode(name: str, implementation: str) -> None:
    """A prompt, then token by token with a `DynamicCache`."""
    model = build(name, implementation)
    forward, report = compiled(model)
    ids = tokens(model, 2, 12)
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    with torch.no_grad():
        for step in (slice(0, 8), slice(8, 9), slice(9, 10), slice(10, 11)):
            outputs = [
                f(ids[:, step], past_key_values=c, use_cache=True).logits
                for f, c in zip((model, forward), caches, strict=True)
            ]
            close(outputs[1], outputs[0])
    assert_rewritten(report, len(report.blocks))
    assert len(report.blocks) >= 4


def generate(model: nn.Module, **kwargs: Any) -> list[list[int]]:
    """Four greedy tokens with a static cache, so that ``generate`` may compile the decode step."""
    ids = tokens(model, 2, 8)
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True}
    return model.generate(ids, cache_implementation="static", **fixed, **kwargs).tolist()


def compile_config(**kwargs: Any) -> CompileConfig:
    config = CompileConfig(backend="samoyeds", fullgraph=True, **kwargs)
    config._compile_all_devices = True  # otherwise only accelerators compile
    return config


@pytest.mark.parametrize(("name", "implementation"), MODELS)
def test_generate(name: str, implementation: str) -> None:
    model, report = build(name, implementation), Report()
    expected = generate(model, disable_compile=True)
    # `CompileConfig` copies its options deeply, so a report in there would be filled unseen.
    options = {"base": "aot_eager", "report": lambda graph: report(graph)}
    assert generate(model, compile_config=compile_config(mode=None, options=options)) == expected
    assert report.graphs
    assert_rewritten(report, 2 * len(report.graphs))


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_generate_passes_a_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default ``generate`` passes ``mode="reduce-overhead"``; it reaches Inductor."""
    calls = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("config_patches"))
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", spy)
    model = build()
    expected = generate(model, disable_compile=True)
    assert calls == []
    assert generate(model, compile_config=compile_config(mode=mode)) == expected
    assert calls[0] == ({"triton.cudagraphs": True} if mode == "reduce-overhead" else {})


# ---------------------------------------------------------------------------------------- partial training


def trainable(model: nn.Module, *fragments: str) -> nn.Module:
    """Freeze all but the parameters whose names contain one of the fragments."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f in name for f in fragments))
    return model.train()


@pytest.mark.parametrize("fragment", ["self_attn", "gate.weight", "gate_up_proj", "down_proj"])
def test_partly_frozen(fragment: str) -> None:
    """Only attention, only the router, only one of the experts' weights is trained."""
    model = trainable(build(), fragment)
    forward, report = compiled(model)
    check_training(forward, model)
    assert_rewritten(report, 2)


@pytest.mark.parametrize("fragment", ["proj_bias", "gate_up_proj", "down_proj"])
def test_partly_frozen_with_biases(fragment: str) -> None:
    model = trainable(build("gpt_oss", "batched_mm"), fragment)
    forward, report = compiled(model)
    check_training(forward, model)
    assert_rewritten(report, 2)


class Adapted(nn.Module):
    """A LoRA-like pair of small matrices beside a frozen block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block.requires_grad_(False)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.up(self.down(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapter_around_frozen_experts(implementation: str) -> None:
    model = build(implementation=implementation).requires_grad_(False).train()
    for layer in model.model.layers:
        layer.mlp = Adapted(layer.mlp)
    forward, report = compiled(model)
    check_training(forward, model)
    assert_rewritten(report, 2)


class LoraWeight(nn.Module):
    """Experts whose stacked weight is a frozen one plus a product of two small ones, as PEFT parametrizes it."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        experts, rows, columns = shape
        self.a = nn.Parameter(torch.randn(experts, 4, columns) * 0.1)
        self.b = nn.Parameter(torch.randn(experts, rows, 4) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapter_in_the_experts(implementation: str) -> None:
    """The weight of the products is computed in the graph; gradients reach the small matrices."""
    block = build(implementation=implementation).model.layers[0].mlp.requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(block.experts, name)
        nn.utils.parametrize.register_parametrization(block.experts, name, LoraWeight(weight.shape))
    forward, report = compiled(block)
    x = torch.randn(2, 5, 64)
    expected, actual = block(x), forward(x)
    close(actual, expected)
    grads = [gradients(block, y.square().sum()) for y in (actual, expected)]
    assert len(grads[0]) == 4
    close_gradients(*grads, torch.float32)
    assert_rewritten(report, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_auxiliary_loss(implementation: str) -> None:
    """``output_router_logits=True`` adds a histogram of a second top-k for each layer, and lets the logits escape."""
    model = build(implementation=implementation).train()
    model.config.router_aux_loss_coef = 1.0
    forward, report = compiled(model)
    check_training(forward, model, output_router_logits=True)
    check_training(forward, model, output_router_logits=True)
    assert_rewritten(report, len(report.blocks))
    assert report.rewritten


# --------------------------------------------------------------------------------------- dtypes, odd sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("name", "implementation"), MODELS)
def test_low_precision(name: str, implementation: str, dtype: torch.dtype) -> None:
    model = build(name, implementation, dtype).train()
    forward, report = compiled(model)
    check_training(forward, model, dtype)
    assert_rewritten(report, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision_inference(dtype: torch.dtype) -> None:
    model = build("mixtral", "grouped_mm", dtype)
    forward, report = compiled(model)
    check_forward(forward, model, dtype)
    assert_rewritten(report, 2)


def odd_experts(name: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    """Experts whose sizes nothing divides: 5 experts, hidden size 50, width 33."""
    entry = CLASSES[name]
    model = families.build(entry)
    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size = 50, 33
    config.num_local_experts = config.num_experts = 5
    config._experts_implementation = implementation
    experts = entry.load()(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return experts.to(dtype)


def routed(
    tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, sentinels: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, ids and routing weights; sentinels have weight zero, as expert parallelism leaves them."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype)
    if sentinels:
        elsewhere = torch.rand(tokens, top_k, generator=generator) < 0.5
        elsewhere[0], elsewhere[1] = True, False
        ids, weights = ids.masked_fill(elsewhere, experts), weights.masked_fill(elsewhere, 0)
    return x, ids, weights


def outcome(function: Any, inputs: tuple[Tensor, Tensor, Tensor], experts: nn.Module) -> dict[str, Tensor]:
    """Output, and in train mode the gradients of tokens, routing weights and parameters."""
    x, ids, weights = inputs
    x, weights = (t.clone().requires_grad_(experts.training) for t in (x, weights))
    with torch.set_grad_enabled(experts.training):
        out = function(x, ids, weights)
    if not experts.training:
        return {"out": out}
    probe = torch.arange(out.numel()).cos().view(out.shape)
    grads = gradients(experts, (out * probe).sum())
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}


def close_outcomes(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        close(actual[name], tensor, dtype)


ODD = [("grouped_mm", torch.float32), ("batched_mm", torch.float32), ("batched_mm", torch.bfloat16)]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("implementation", "dtype"), ODD, ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_odd_sizes(name: str, implementation: str, dtype: torch.dtype, train: bool) -> None:
    """Uncompiled ``grouped_mm`` refuses these sizes, so ``batched_mm`` says what is right."""
    experts = odd_experts(name, implementation, dtype).train(train)
    reference = odd_experts(name, "batched_mm", dtype).train(train)
    forward, report = compiled(experts)
    inputs = routed(11, 50, 5, 3, dtype)
    close_outcomes(outcome(forward, inputs, experts), outcome(reference, inputs, reference), dtype)
    assert_rewritten(report, 1)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_sizes_that_torch_refuses(name: str) -> None:
    """``torch._grouped_mm`` wants rows of a multiple of 16 bytes; Dynamo says so before any backend is asked."""
    experts = odd_experts(name, "grouped_mm", torch.bfloat16).eval()
    forward, _ = compiled(experts)
    for function in (experts, forward):
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            function(*routed(11, 50, 5, 3, torch.bfloat16))


# ------------------------------------------------------------------------------------- expert parallelism


def check_expert_parallel(name: str, implementation: str, train: bool, dtype: torch.dtype) -> None:
    """Slots of experts on other ranks carry the id E: they are computed by nobody and contribute nothing."""
    model = build(name, implementation, dtype)
    experts = model.get_submodule(families.moe_blocks(model)[0]).train(train)
    experts._is_expert_parallel = True
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    forward, report = compiled(experts)
    inputs = routed(7, hidden, 8, 2, dtype, sentinels=True)
    expected = outcome(experts, inputs, experts)
    close_outcomes(outcome(forward, inputs, experts), expected, dtype)
    everywhere_else, here = expected["out"][:2].float().abs().amax(1)
    assert everywhere_else == 0 and here > 0
    assert_rewritten(report, 1)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark"])
def test_expert_parallel(name: str, implementation: str, train: bool) -> None:
    """Gated, with biases, without gate, with a norm after the experts."""
    check_expert_parallel(name, implementation, train, torch.float32)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_expert_parallel_in_bfloat16(name: str, train: bool) -> None:
    """``torch._grouped_mm`` itself leaves the rows of sentinels undefined."""
    check_expert_parallel(name, "grouped_mm", train, torch.bfloat16)
