"""`sparsify_`: make the experts of a model structured sparse, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.calibration import InputStats, Stats, Wanted, collect
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.experts import Block, Filter, Projection, find_blocks, require_prunable
from samoyeds_compile.sparsity.install import Replacement, install, packed
from samoyeds_compile.sparsity.permute import best_order, reordered_biases, require_permutable, rows
from samoyeds_compile.sparsity.prune import Method, method_of, prune, squared_score
from samoyeds_compile.sparsity.report import ParameterReport, SparsityReport

if TYPE_CHECKING:
    from rich.progress import Progress


def sparsify_(
    model: nn.Module,
    config: SparsityConfig,
    *,
    method: str = "router_wanda",
    calibration: Iterable[Any] | None = None,
    filter_fn: Filter = None,
    permute: bool = False,
    refine: bool = False,
    progress: bool = True,
) -> SparsityReport:
    """Prune the weights of experts to a pattern and pack them, in place.

    Which weights: stacks of transformers' experts modules, and ``nn.Linear`` in lists of experts. Routers, attention
    and shared experts stay dense. All checks and the calibration come before the first change, so that a wrong
    argument, model or calibration leaves the model as it was. Then the parameters of one expert, or of one stack of
    experts, after the other are replaced together, and the dense ones released, so that at most one more of these
    exists at a time.

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
    blocks = find_blocks(model, filter_fn)
    require_prunable(model, blocks)
    permuted = {block.name for block in blocks if permute and len(block.chosen) == len(block.projections)}
    for block in blocks:
        if block.name in permuted:
            require_permutable(block)
    inputs = None if calibration is None else list(calibration)
    layers = [list(of_layer) for _, of_layer in groupby(blocks, key=lambda block: block.layer)]
    with _progress(progress) as bar:
        job = _Job(model, config, how, refine, inputs, permuted, bar)
        return SparsityReport(method, config, tuple(job.run(layers)), tuple(_notes(blocks, how, permute, permuted)))


def _progress(shown: bool) -> Progress:
    from rich.console import Console  # here, as importing the package must stay light
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=not shown)


def _notes(blocks: list[Block], method: Method, permute: bool, permuted: set[str]) -> Iterator[str]:
    listed = sum(not block.stacked for block in blocks)
    if listed and method.routed:
        yield f"{listed} experts are modules of a list, where routing weights are not seen; their tokens weigh the same"
    kept = [block.name for block in blocks if block.name not in permuted]
    if permute and kept:
        yield f"{len(kept)} of which only a part is chosen keep the order of their features, {kept[0]} for one"


@dataclass(frozen=True)
class _Job:
    """One call of `sparsify_` after its arguments are checked."""

    model: nn.Module
    config: SparsityConfig
    method: Method
    refines: bool
    inputs: list[Any] | None
    permuted: set[str]
    bar: Progress

    def run(self, layers: list[list[Block]]) -> list[ParameterReport]:
        everything = [block for layer in layers for block in layer]
        stats = self._calibrate(everything, hessian=False)
        self._require_reached(stats)
        task = self.bar.add_task("sparsify", total=sum(len(block.chosen) for block in everything))
        done: list[ParameterReport] = []
        try:
            for layer in layers:
                of_layer = self._calibrate(layer, hessian=True) if self.method.updates else stats
                for block in layer:
                    done += self._sparsify(block, of_layer)
                    self.bar.advance(task, len(block.chosen))
        except Exception as error:
            if not done:
                raise
            raise SparsityError(
                f"{error}; {len(done)} weights up to {done[-1].name} are sparse already: load the model again"
            ) from error
        return done

    def _calibrate(self, blocks: list[Block], hessian: bool) -> Stats:
        if self.inputs is None:
            return {}
        task = self.bar.add_task(f"calibrate {blocks[0].layer if hessian else ''}", total=len(self.inputs))
        wanted = Wanted(self.method.routed, hessian, sample=hessian or not self.method.updates)
        stats = collect(self.model, blocks, self.inputs, wanted, lambda: self.bar.advance(task))
        self.bar.remove_task(task)
        return stats

    def _require_reached(self, stats: Stats) -> None:
        if self.inputs is not None and not any(bool(found.count.any()) for found in stats.values()):
            raise SparsityError(
                f"calibration: none of its {len(self.inputs)} inputs reaches an expert; pass inputs that do"
            )

    def _sparsify(self, block: Block, stats: Stats) -> list[ParameterReport]:
        """Make a block sparse; its parameters are replaced together, after all of them are made."""
        orders = self._orders(block, stats) if block.name in self.permuted else None
        replacements = [] if orders is None else reordered_biases(block, orders)
        for down in block.of_role("down") if orders is not None and stats else ():
            for expert, order in enumerate(orders or ()):
                stats[down.name].reorder(expert, order)
        reports = []
        for projection in block.projections:
            if projection.name in block.chosen:
                replacement, report = self._made(projection, stats.get(projection.name), orders)
                replacements.append(replacement)
                reports.append(report)
        install(replacements)
        return reports

    def _orders(self, block: Block, stats: Stats) -> list[Tensor]:
        """An order of features for each expert."""
        orders = []
        for expert in range(block.experts):
            squared = [
                [self._squared(p, stats.get(p.name), expert) for p in block.of_role(role)] for role in ("up", "down")
            ]
            orders.append(best_order(squared[0], squared[1][0], self.config))
        return orders

    def _squared(self, projection: Projection, stats: InputStats | None, expert: int) -> Tensor:
        with torch.no_grad():
            weight = projection.matrix(projection.parameter, expert)
            reached = stats if stats is not None and stats.reached(expert) else None
            return squared_score(weight, reached, expert, self.method)

    @torch.no_grad()
    def _made(
        self, projection: Projection, stats: InputStats | None, orders: list[Tensor] | None
    ) -> tuple[Replacement, ParameterReport]:
        """What is to replace a parameter, and the report on it."""
        dense = projection.parameter
        new = torch.empty_like(dense, requires_grad=False)
        energy = error = size = 0.0
        for expert in range(projection.experts):
            weight = _ordered(projection, projection.matrix(dense, expert), orders[expert] if orders else None)
            pruned = prune(weight, stats, expert, self.config, self.method, self.refines)
            projection.put(new, expert, pruned.weight)
            energy += pruned.kept_energy / projection.experts
            if stats is not None:
                found = stats.samples[expert].errors(weight, pruned.weight)
                error, size = error + found[0], size + found[1]
        replacement, after = packed(projection, new, self.config)
        report = ParameterReport(
            projection.name, tuple(dense.shape), energy, (error / size) ** 0.5 if size else None,
            dense.nbytes, after, orders is not None, _unreached(projection, stats),
        )  # fmt: skip
        return replacement, report


def _ordered(projection: Projection, matrix: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return matrix
    return matrix[rows(order, len(matrix))] if projection.role == "up" else matrix[:, order]


def _unreached(projection: Projection, stats: InputStats | None) -> tuple[int, ...]:
    if stats is None:
        return ()
    return tuple(expert for expert in range(projection.experts) if not stats.reached(expert))
