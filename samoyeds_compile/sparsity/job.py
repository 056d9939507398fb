"""The work of one `sparsify_`: calibrate, then prune and pack one block of experts after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.by_rows import Matrix
from samoyeds_compile.sparsity.calibration import collect
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.install import Packing, Replacement, install, packed
from samoyeds_compile.sparsity.masters import Masters, install_masters, masters
from samoyeds_compile.sparsity.order import best_order
from samoyeds_compile.sparsity.permute import reordered_biases
from samoyeds_compile.sparsity.projections import Block, Projection
from samoyeds_compile.sparsity.prune import Method, pruned_rows, squared_scores
from samoyeds_compile.sparsity.reconstruct import holder, reconstruct, record
from samoyeds_compile.sparsity.report import LayerReport, ParameterReport
from samoyeds_compile.sparsity.stats import InputStats, Stats, Wanted

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class Pruned:
    """Of one block: what is to replace its weights, its biases in another order, and what to report."""

    made: list[Packing | Masters]
    biases: list[Replacement]
    reports: list[ParameterReport]


@dataclass(frozen=True)
class Job:
    """One call of `sparsify_` after its arguments are checked.

    Attributes:
        model, config: what to make sparse, and how.
        method: how values are chosen.
        refines: whether masks are refined.
        inputs: calibration.
        permuted: names of blocks whose features are put in another order.
        bar: where to show progress.
        trainable: weights get masks instead of being packed.
        steps: of reconstruction, for each layer; 0 for none.
    """

    model: nn.Module
    config: SparsityConfig
    method: Method
    refines: bool
    inputs: list[Any] | None
    permuted: set[str]
    bar: Progress
    trainable: bool = False
    steps: int = 0

    def run(self, layers: list[list[Block]]) -> tuple[list[ParameterReport], list[LayerReport]]:
        """Do it, to the blocks of each layer; the second list is of reconstructed layers.

        Raises:
            SparsityError: calibration reaches no expert and nothing changed; or something failed in the middle.
        """
        everything = [block for layer in layers for block in layer]
        stats = self._calibrate(everything, hessian=False)
        self._require_reached(stats)
        task = self.bar.add_task("sparsify", total=sum(len(block.chosen) for block in everything))
        done: list[ParameterReport] = []
        fitted: list[LayerReport] = []
        try:
            for layer in layers:
                of_layer = self._calibrate(layer, hessian=True) if self.method.updates else stats
                if self.steps:
                    reports, fit = self._reconstruct(layer, of_layer)
                    done, fitted = done + reports, [*fitted, fit]
                    self.bar.advance(task, len(reports))
                else:
                    for block in layer:
                        done += self._sparsify(block, of_layer)
                        self.bar.advance(task, len(block.chosen))
        except Exception as error:
            if not done:
                raise
            raise SparsityError(
                f"{error}; {len(done)} weights up to {done[-1].name} are sparse already: load the model again"
            ) from error
        return done, fitted

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
        pruned = self._prune(block, stats, self.trainable)
        self._install(pruned.made, pruned.biases)
        return pruned.reports

    def _reconstruct(self, layer: list[Block], stats: Stats) -> tuple[list[ParameterReport], LayerReport]:
        """Make the blocks of a layer sparse with kept values fitted to what the dense ones give."""
        assert self.inputs is not None
        name, module = holder(layer[0], self.model)
        task = self.bar.add_task(f"reconstruct {name}", total=len(self.inputs) + self.steps)
        calls = record(self.model, [module], self.inputs, lambda: self.bar.advance(task))[module]
        pruned = [self._prune(block, stats, as_masters=True) for block in layer]
        found = [each for p in pruned for each in p.made if isinstance(each, Masters)]
        biases = [bias for p in pruned for bias in p.biases]
        fit = reconstruct(name, module, found, biases, calls, self.steps, lambda: self.bar.advance(task))
        self.bar.remove_task(task)
        self._install([m if self.trainable else m.packing(self.config) for m in found], biases)
        return [report for p in pruned for report in p.reports], fit

    def _prune(self, block: Block, stats: Stats, as_masters: bool) -> Pruned:
        """Prune what is chosen of a block; the block stays as it is."""
        orders = self._orders(block, stats) if block.name in self.permuted else None
        biases = [] if orders is None else reordered_biases(block, orders)
        for down in block.of_role("down") if orders is not None and stats else ():
            for expert, order in enumerate(orders or ()):
                stats[down.name].reorder(expert, order)
        made: list[Packing | Masters] = []
        reports = []
        for projection in block.projections:
            if projection.name in block.chosen:
                made.append(masters(projection) if as_masters else packed(projection, self.config))
                reports.append(self._fill(made[-1], projection, stats.pop(projection.name, None), orders))
        return Pruned(made, biases, reports)

    def _install(self, made: Sequence[Packing | Masters], biases: list[Replacement]) -> None:
        install_masters(self.model, [each for each in made if isinstance(each, Masters)], self.config)
        install(biases + [each.replacement() for each in made if isinstance(each, Packing)])

    def _orders(self, block: Block, stats: Stats) -> list[Tensor]:
        """An order of features for each expert."""

        def squared(role: str, expert: int) -> list[Tensor]:
            projections = block.of_role(role)
            return [squared_scores(Matrix.of(p, expert), stats.get(p.name), expert, self.method) for p in projections]

        found = []
        for expert in range(block.experts):
            (down,) = squared("down", expert)
            found.append(best_order(squared("up", expert), down, self.config))
        return found

    def _fill(
        self, made: Packing | Masters, projection: Projection, stats: InputStats | None, orders: list[Tensor] | None
    ) -> ParameterReport:
        """Prune one expert after the other into what is to replace a parameter; the report on it."""
        dense, energy, error, size = projection.parameter, 0.0, 0.0, 0.0
        for expert in range(projection.experts):
            order = orders[expert] if orders and expert < len(orders) else None
            matrix = Matrix.of(projection, expert, order)
            kept = total = 0.0
            for rows in pruned_rows(matrix, stats, expert, self.config, self.method, self.refines):
                made.write(expert, rows)
                kept, total = kept + rows.kept, total + rows.total
                if stats is not None:
                    found = stats.samples[expert].errors(rows.dense, rows.weight)
                    error, size = error + found[0], size + found[1]
            energy += (kept / total if total else 1.0) / projection.experts
        return ParameterReport(
            projection.name, tuple(dense.shape), energy, (error / size) ** 0.5 if size else None,
            dense.nbytes, made.nbytes, orders is not None, _unreached(projection, stats),
        )  # fmt: skip


def _unreached(projection: Projection, stats: InputStats | None) -> tuple[int, ...]:
    if stats is None:
        return ()
    return tuple(expert for expert in range(projection.experts) if not stats.reached(expert))
