"""What `sparsify_` did to each parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from samoyeds_compile.sparsity.config import SparsityConfig

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ParameterReport:
    """One parameter that was made sparse.

    Attributes:
        name: its name in the model.
        shape: its dense shape, as stored.
        kept_energy: kept share of the squared scores, the mean over its experts.
        relative_error: of its outputs on a sample of the calibration tokens, each weighed by its routing weight:
            ‖ΔW x‖ / ‖W x‖. None without calibration, or where no token came. That of pruning: the fit of
            ``reconstruct`` comes later, and lets projections make up for each other (see `LayerReport`).
        bytes_before: dense.
        bytes_after: packed.
        permuted: its features are in another order now.
        unreached: experts that no calibration token reached, pruned by magnitude.
    """

    name: str
    shape: tuple[int, ...]
    kept_energy: float
    relative_error: float | None
    bytes_before: int
    bytes_after: int
    permuted: bool = False
    unreached: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """What ``reconstruct`` did to one layer.

    Attributes:
        name: of the module whose output was fitted.
        error_before, error_after: ‖y − y_dense‖ / ‖y_dense‖ over the calibration, before and after the fit.
    """

    name: str
    error_before: float
    error_after: float

    def __str__(self) -> str:
        """One line."""
        errors = f"{self.error_before:.4f}, {self.error_after:.4f} after reconstruction"
        return f"{self.name or 'the model'}: output error {errors}"


@dataclass(frozen=True)
class SparsityReport:
    """What `sparsify_` did; prints as a table.

    Attributes:
        method: the score.
        config: the pattern.
        parameters: one entry for each.
        notes: what a user should know.
        layers: what ``reconstruct`` did to each layer.
    """

    method: str
    config: SparsityConfig
    parameters: tuple[ParameterReport, ...]
    notes: tuple[str, ...] = ()
    layers: tuple[LayerReport, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Of all parameters, dense."""
        return sum(parameter.bytes_before for parameter in self.parameters)

    @property
    def bytes_after(self) -> int:
        """Of all parameters, packed."""
        return sum(parameter.bytes_after for parameter in self.parameters)

    @property
    def kept_energy(self) -> float:
        """Mean over the parameters."""
        return sum(parameter.kept_energy for parameter in self.parameters) / len(self.parameters)

    @property
    def relative_error(self) -> float | None:
        """Mean over the parameters that have one."""
        known = [p.relative_error for p in self.parameters if p.relative_error is not None]
        return sum(known) / len(known) if known else None

    @property
    def unreached(self) -> dict[str, tuple[int, ...]]:
        """Experts that no calibration token reached, by parameter."""
        return {parameter.name: parameter.unreached for parameter in self.parameters if parameter.unreached}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "method": self.method,
            "config": asdict(self.config),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "kept_energy": self.kept_energy,
            "relative_error": self.relative_error,
            "notes": list(self.notes),
            "layers": [asdict(layer) for layer in self.layers],
            "parameters": [asdict(parameter) for parameter in self.parameters],
        }

    def table(self) -> Table:
        """A row for each parameter, and one for all."""
        from rich.table import Table  # here, as importing the package must stay light

        table = Table(title=f"{self.config} by {self.method}", title_justify="left")
        for column in ("parameter", "shape", "kept energy", "output error", "MiB before", "MiB after", "unreached"):
            table.add_column(column, justify="left" if column in ("parameter", "shape") else "right")
        for p in self.parameters:
            shape = "x".join(map(str, p.shape))
            table.add_row(p.name, shape, *_numbers(p), str(len(p.unreached)))
        table.add_section()
        table.add_row("all", "", *_numbers(self), str(sum(len(p.unreached) for p in self.parameters)))
        return table

    def __str__(self) -> str:
        """The table and the notes as text."""
        from rich.console import Console  # here, as importing the package must stay light

        console = Console(width=140)
        with console.capture() as capture:
            console.print(self.table(), *map(str, self.layers), *self.notes, sep="\n")
        return capture.get()


def _numbers(of: ParameterReport | SparsityReport) -> Iterable[str]:
    error = "-" if of.relative_error is None else f"{of.relative_error:.4f}"
    return f"{of.kept_energy:.4f}", error, f"{of.bytes_before / 2**20:.2f}", f"{of.bytes_after / 2**20:.2f}"
