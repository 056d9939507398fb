"""`sparsify_`: make the experts of a model structured sparse, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from torch import nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.checks import require_prunable
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.experts import Filter, find_blocks
from samoyeds_compile.sparsity.job import Job
from samoyeds_compile.sparsity.permute import require_permutable
from samoyeds_compile.sparsity.progress import progress_bar
from samoyeds_compile.sparsity.projections import Block
from samoyeds_compile.sparsity.prune import Method, method_of
from samoyeds_compile.sparsity.reconstruct import holder, require_replayable, require_steps
from samoyeds_compile.sparsity.report import SparsityReport


def sparsify_(
    model: nn.Module,
    config: SparsityConfig,
    *,
    method: str = "router_wanda",
    calibration: Iterable[Any] | None = None,
    filter_fn: Filter = None,
    permute: bool = False,
    refine: bool = False,
    reconstruct: int = 0,
    trainable: bool = False,
    progress: bool = True,
) -> SparsityReport:
    """Prune the weights of experts to a pattern and pack them, in place.

    Which weights: stacks of transformers' experts modules, decorated or not, and ``nn.Linear`` in lists of experts.
    Routers, attention and shared experts stay dense. All checks and the calibration come before the first change, so
    that a wrong argument, model or calibration leaves the model as it was. Then the parameters of one expert, or of one
    stack of experts, after the other are replaced together, and the dense ones released. So room for what these take
    packed is needed on top of the model, and little else: an expert is pruned and packed a few rows at a time.
    Second moments for ``"second_order"`` come on top of that, one expert's scores in float32 for ``permute``, and for
    ``reconstruct`` what `samoyeds_compile.sparsity.reconstruct` keeps.

    Args:
        model: an eager model; compile it afterwards.
        config: the pattern.
        method: how values are chosen:
            ``"magnitude"``: the largest; needs no calibration.
            ``"wanda"``: size times the norm of the input feature.
            ``"router_wanda"``: the same, tokens weighed by how they are routed to the expert.
            ``"second_order"``: SparseGPT; kept values are changed to make up for pruned ones. Layers are calibrated one
            after the other, each on what the sparse layers before it give, so it costs a pass for each.
        calibration: for each call of the model a mapping of keyword arguments, a tuple of arguments or a tensor.
        filter_fn: which weights: ``filter_fn(parameter name, module)``, a collection of names, or None for all.
        permute: put the intermediate features of each expert into an order of which the pattern keeps more; the
            order of what the expert takes and gives stays. Experts of which only a part is chosen keep theirs.
        refine: swap kept and pruned values where that brings outputs nearer at the mean input; not for second order.
        reconstruct: steps of gradient descent, for each layer, that fit kept values to what the dense layer gave for
            the calibration inputs; each step reads one of them. Needs no labels and no pass through the whole model but
            the calibration's own, one for each layer. 200 and more help much; see docs/sparsity.md.
        trainable: keep the dense weights as masters with masks beside them, for `SparseTraining`, instead of packing.
        progress: show a progress bar.

    Returns:
        What was kept, the error that it makes, and bytes, for each parameter. Experts that no calibration token
        reached are listed, and pruned by magnitude.

    Raises:
        SparsityError: an argument is wrong, a weight can't be pruned, or calibration reaches no expert; the model is
            unchanged. Or something failed in the middle; the message says which weights are sparse already.
    """
    if not isinstance(config, SparsityConfig):
        raise SparsityError(f"config: is a {type(config).__name__}; pass a SparsityConfig")
    how = method_of(method, refine, calibration is not None)
    require_steps(reconstruct, calibration is not None)
    blocks = find_blocks(model, filter_fn)
    require_prunable(model, blocks, trainable)
    permuted = {block.name for block in blocks if permute and len(block.chosen) == len(block.projections)}
    for block in blocks:
        if block.name in permuted:
            require_permutable(block)
    inputs = None if calibration is None else list(calibration)
    if reconstruct and inputs:
        require_replayable(model, dict(holder(block, model) for block in blocks), inputs[0])
    layers = [list(of_layer) for _, of_layer in groupby(blocks, key=lambda block: block.layer)]
    with progress_bar(progress) as bar:
        job = Job(model, config, how, refine, inputs, permuted, bar, trainable, reconstruct)
        reports, fitted = job.run(layers)
    return SparsityReport(method, config, tuple(reports), tuple(_notes(blocks, how, permute, permuted)), tuple(fitted))


def _notes(blocks: list[Block], method: Method, permute: bool, permuted: set[str]) -> Iterator[str]:
    listed = sum(block.stack is None for block in blocks)
    if listed and method.routed:
        yield f"{listed} experts are modules of a list, where routing weights are not seen; their tokens weigh the same"
    kept = [block.name for block in blocks if block.name not in permuted]
    if permute and kept:
        yield f"{len(kept)} of which only a part is chosen keep the order of their features, {kept[0]} for one"
