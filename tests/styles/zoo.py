"""The zoo: MoE blocks as people write them, one entry a style, with what the finished backend is to make of each.

``STYLES[name].build(hidden, width, experts, top_k, **axes)`` makes a module; `Style.axes` names the variations that a
style has. The classes are in `grouped` (P1), `gathered` (P2), `loops` (P3), `dense` (P4), `capacity` and `onehot` (P5).
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.styles import capacity, dense, gathered, grouped, loops, onehot
from tests.styles.parts import ACTIVATIONS, GATED, ROUTERS, Block

FLAT, SEQUENCES = "TH", "BSH"


@dataclass(frozen=True)
class Style:
    """One way of writing a block.

    Attributes:
        name: key in `STYLES`.
        pattern: ``P1`` to ``P5``.
        build: (hidden, width, experts, top_k, **axes) -> module.
        inputs: ranks of input it takes: ``TH``, ``BSH`` or both.
        outcome: ``sparse`` (becomes ``samoyeds::moe_experts``), ``batched`` (its [E, C, H] middle becomes
            ``samoyeds::experts_batched``) or ``kept``.
        reason: part of the expected reason of a ``kept`` block; None leaves it open.
        capture: Dynamo makes one graph of it only with `capturing` or ``fullgraph=True``.
        top_k: the only k it takes, if there is only one.
        axes: variations, each with its values; the first is the default.
        options: options of the backend that it needs: the name of an opaque grouped product.
        outside: matrix products that do not belong to the routed experts: router, shared expert, dispatch.
        exact: axes under which a float32 instance is float32 throughout; empty if that is so anyway.
    """

    name: str
    pattern: str
    build: Callable[..., Block]
    inputs: tuple[str, ...] = (FLAT, SEQUENCES)
    outcome: str = "sparse"
    reason: str | None = None
    capture: bool = False
    top_k: int | None = None
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    outside: int = 1
    exact: Mapping[str, Any] = field(default_factory=dict)

    def small(self, **axes: Any) -> Block:
        """A small instance; sizes are multiples of 8, as ``torch._grouped_mm`` wants rows aligned."""
        return self.build(16, 24, 4, self.top_k or 2, **axes)

    def input(self, rank: str | None = None, tokens: int = 14, dtype: torch.dtype = torch.float32) -> Tensor:
        """Tokens for `small`; ``BSH`` splits them into two sequences."""
        shape = (tokens, 16) if (rank or self.inputs[0]) == FLAT else (2, tokens // 2, 16)
        return torch.randn(shape, dtype=dtype)

    def capturing(self) -> contextlib.AbstractContextManager[None]:
        """Settings under which Dynamo makes one graph of it."""
        return capture_settings() if self.capture else contextlib.nullcontext()


def capture_settings() -> contextlib.AbstractContextManager[None]:
    """Dynamo traces shapes and numbers that depend on data, instead of breaking the graph."""
    return torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)


def _p(pattern: str, name: str, build: Callable[..., Block], **rest: Any) -> Style:
    return Style(name, pattern, build, **rest)


_gated = {"activation": tuple(GATED)}
_bias = {"bias": (False, True)}
_loop_axes = {"activation": ACTIVATIONS, **_bias, "router": ROUTERS, "packed": (False, True)}
_stack_axes = {**_gated, "router": ROUTERS}
_loop: dict[str, Any] = {"capture": True, "axes": _loop_axes}
_unrouted = {axis: values for axis, values in _loop_axes.items() if axis != "router"}
_sequences: dict[str, Any] = {"inputs": (SEQUENCES,)}
_flat: dict[str, Any] = {"inputs": (FLAT,)}
_titan: dict[str, Any] = {"inputs": (SEQUENCES,), "exact": {"cast": False}}
_gmm = {"grouped_mm": {"zoo::gmm": "input weight sizes transposed"}}
_bind = functools.partial

_TABLE = (
    # P1: grouped products
    _p("P1", "titan_score_before", grouped.Titan, **_titan, axes=_stack_axes | {"shared": (False, True)}),
    _p("P1", "titan_score_after", _bind(grouped.Titan, score_before=False), **_titan,
       axes=_stack_axes | {"shared": (False, True)}),
    _p("P1", "titan_shared_base", _bind(grouped.Titan, shared=True), outside=4, **_titan, axes=_stack_axes),
    _p("P1", "titan_shared_base_score_after", _bind(grouped.Titan, shared=True, score_before=False), outside=4,
       **_titan),
    _p("P1", "titan_public_grouped_mm", _bind(grouped.Titan, run="public"), **_titan, axes=_stack_axes),
    _p("P1", "titan_for_loop", _bind(grouped.Titan, run="loop"), **_sequences, axes=_stack_axes, capture=True),
    _p("P1", "titan_for_loop_score_after", _bind(grouped.Titan, run="loop", score_before=False), **_sequences,
       axes=_stack_axes, capture=True),
    _p("P1", "megablocks_bincount", grouped.MegaBlocks, axes=_stack_axes, capture=True, options=_gmm),
    _p("P1", "megablocks_histc", _bind(grouped.MegaBlocks, sizes="histc"), axes=_stack_axes, options=_gmm),
    # P2: gathered weights
    _p("P2", "gptfast_gather", gathered.GptFast, axes=_stack_axes),
    _p("P2", "gptoss_reference", gathered.GptOssReference, **_flat,
       axes={"activation": ("clamped", "silu"), "residual": (True, False)}),
    _p("P2", "baddbmm_bias", gathered.Baddbmm, axes=_stack_axes),
    _p("P2", "bmm_flat", gathered.FlatBmm, axes=_stack_axes),
    _p("P2", "matrix_vector", gathered.MatrixVector, axes=_stack_axes | _bias),
    _p("P2", "row_matrix", gathered.RowMatrix, axes=_stack_axes),
    # P3: unrolled loops
    _p("P3", "hf4_mixtral", loops.MixtralLoop, **_sequences, capture=True, axes=_unrouted),
    _p("P3", "hf4_qwen2_shared", loops.QwenLoop, outside=5, **_sequences, **_loop),
    _p("P3", "mistral_inference", loops.MistralLoop, **_flat, capture=True, axes=_unrouted),
    _p("P3", "litgpt_masks", loops.LitGptLoop, **_sequences, capture=True, axes=_unrouted),
    _p("P3", "deepseek_train", loops.DeepSeekTrainLoop, outside=4, capture=True,
       axes=_loop_axes | {"shared": (True, False)}),
    _p("P3", "bool_mask", loops.BoolMaskLoop, **_flat, **_loop),
    _p("P3", "bool_mask_per_slot", loops.BoolMaskSlotLoop, **_flat, **_loop),
    _p("P3", "nonzero_index_select", loops.NonzeroLoop, **_loop),
    _p("P3", "nonzero_accumulate", loops.AccumulateLoop, **_flat, **_loop),
    _p("P3", "sort_split_cat", loops.SplitLoop, **_flat, **_loop),
    _p("P3", "stacked_loop", loops.StackedLoop, capture=True,
       axes={"activation": ACTIVATIONS, **_bias, "router": ROUTERS}),
    _p("P3", "jetmoe_split", loops.JetMoeSplit, **_sequences, capture=True, axes=_stack_axes | _bias),
    # P4: every expert on every token
    _p("P4", "dense_einsum", dense.DenseEinsum, axes=_stack_axes | _bias | {"transposed": (True, False)}),
    _p("P4", "softmax_scattered", dense.SoftmaxScattered, axes=_gated | _bias),
    _p("P4", "one_hot_sum", dense.OneHotSum, axes=_stack_axes | _bias),
    _p("P4", "masked_fill", dense.MaskedProbabilities, axes=_gated | {"router": ("renorm", "softmax")}),
    _p("P4", "multiplied_mask", dense.MultipliedMask, axes=_gated),
    _p("P4", "repeat_bmm", dense.RepeatBmm, **_sequences,
       axes={"activation": ("clamped", "silu"), "bias": (True, False)}),
    _p("P4", "loop_weighted", dense.LoopWeighted, axes=_loop_axes),
    _p("P4", "loop_columns", dense.LoopColumns, **_flat, axes=_loop_axes),
    _p("P4", "stack_gather", dense.StackGather, **_flat, axes=_loop_axes),
    _p("P4", "stack_einsum", dense.StackEinsum, **_flat, axes=_loop_axes),
    _p("P4", "llama4", dense.Llama4, outside=4, axes=_gated | {"shared": (True, False)}),
    _p("P4", "threshold", dense.Threshold, outcome="kept"),
    _p("P4", "soft_mixture", dense.SoftMixture, outcome="kept"),
    # P5: places
    _p("P5", "gshard_top2", capacity.GShardTop2, outside=3, top_k=2,
       axes={"activation": ("relu", *GATED)}),
    _p("P5", "deepspeed_chunks", capacity.DeepSpeedChunks, outside=3, top_k=2, axes=_gated),
    _p("P5", "switch_top1", capacity.SwitchTop1, **_sequences, top_k=1,
       axes={"activation": ("relu", *GATED)}),
    _p("P5", "deepspeed_topk", onehot.DeepSpeedTopK, outside=4, top_k=3,
       axes={"activation": ("relu", *GATED)}),
    _p("P5", "deepspeed_topk_by_gate", onehot.DeepSpeedTopKByGate, outside=4, top_k=2,
       axes={"activation": ("relu", *GATED)}),
    _p("P5", "deepspeed_top1", onehot.DeepSpeedTop1, outside=3, top_k=1, axes={"activation": ("relu", *GATED)}),
    _p("P5", "deepspeed_top1_selected", onehot.DeepSpeedTop1Selected, outside=4, top_k=1,
       axes={"activation": ("relu", *GATED)}),
    _p("P5", "lucidrains_top2", onehot.LucidrainsTop2, **_sequences, top_k=2, outside=3,
       axes={"activation": ("relu", *GATED), "threshold": (0.0, 0.3)}),
    _p("P5", "gshard_matmul", onehot.GShardMatmul, top_k=2, axes={"activation": ("relu", *GATED)}),
    _p("P5", "fairseq_top2", onehot.FairseqTop2, top_k=2, axes={"activation": ("relu", *GATED)}),
    _p("P5", "flat_priority", onehot.FlatPriority, axes={"activation": ("relu", *GATED), "router": ROUTERS}),
    _p("P5", "padded_buffer", capacity.PaddedBuffer, outcome="batched",
       axes={"activation": ("relu", *GATED), "router": ROUTERS}),
    _p("P5", "expert_choice", capacity.ExpertChoice, outcome="batched", axes={"activation": ("relu", *GATED)}),
    _p("P5", "soft_moe", capacity.SoftMoE, outside=3, **_sequences, outcome="batched",
       axes={"activation": ("plain_gelu", "silu")}),
)  # fmt: skip

STYLES: dict[str, Style] = {style.name: style for style in _TABLE}
assert len(STYLES) == len(_TABLE)
