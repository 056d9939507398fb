"""What the report says of layouts: plain data, made by `samoyeds_compile.layout.plan`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EdgeReport:
    """One edge of a region.

    Attributes:
        edge: the ops that it connects.
        layout: what its rows are written as.
        read: what they are read as, if a conversion stands on it; empty otherwise.
        microseconds: what the op that writes it, and the conversion, are expected to cost.
        runner_up: the second best layout, all others chosen anew; empty if no other is possible.
        margin: microseconds that the whole region would take longer with it.
    """

    edge: str
    layout: str
    read: str
    microseconds: float
    runner_up: str
    margin: float


@dataclass
class RegimeReport:
    """A range of token counts.

    Attributes:
        name: ``decode`` (rows stay token-major at all experts), ``mid``, or ``prefill`` (tiles nearly everywhere).
        first, last: numbers of tokens; last is None if it has no end.
        tokens: for how many the edges were computed.
        edges: in the order of the region.
        kernel: on a GPU, the kind of kernel and the slots of its tile; empty elsewhere.
    """

    name: str
    first: int
    last: int | None
    tokens: int
    edges: list[EdgeReport] = field(default_factory=list)
    kernel: str = ""

    @property
    def title(self) -> str:
        """``decode``, or ``decode (triton 16)``."""
        return f"{self.name} ({self.kernel})" if self.kernel else self.name

    @property
    def tokens_text(self) -> str:
        """``1 to 56``, or ``509 and more``."""
        return f"{self.first} and more" if self.last is None else f"{self.first} to {self.last}"


@dataclass
class LayoutReport:
    """The layouts of one block.

    Attributes:
        block: its name in the graph.
        index: of the block in the graph's report; None where it stands alone.
        kernel: which kernel's costs were taken.
        constants: where these come from: ``defaults`` or ``measured``.
        few: with which numbers of tokens an expert's rows stay token-major, such as ``1-13, 17-25``; kernels decide by
            them in each call.
        crossing: number of tokens of the block from which the mean expert has more than the first of these ranges.
        by_rows: edges that are written token by token where tiles are read: none unless asked for.
        conversions: passes over rows that are saved against an order fixed to token-major, at prefill.
        bytes_per_token: that these passes would have moved.
        regimes: at most three.
        tokens: of the inputs with which the block was compiled; None if their number was not known.
        microseconds: what the block is expected to take with so many, all its ops and passes together.
        gathered: on a GPU, with which numbers of slots rows are copied to slots before the first projection, such as
            ``513-`` or ``all``; with others that gathers while it loads. None on a CPU.
    """

    block: str
    index: int | None
    kernel: str
    constants: str
    few: str
    crossing: int
    by_rows: str
    conversions: int
    bytes_per_token: int
    regimes: list[RegimeReport] = field(default_factory=list)
    tokens: int | None = None
    microseconds: float | None = None
    gathered: str | None = None

    @property
    def summary(self) -> str:
        """One line; blocks that have it in common have all in common."""
        saved = f"; saves {self.conversions} conversions, {self.bytes_per_token} bytes a token" * bool(self.conversions)
        return f"layouts, {self.kernel} ({self.constants} costs): {self._rows}{saved}"

    @property
    def _rows(self) -> str:
        if self.gathered is None:
            return f"rows token-major for {self.few or 'no'} tokens an expert, else tiles"
        if not self.gathered:
            return "rows gathered while they are loaded"
        if self.gathered == "all":
            return "rows gathered before the first projection"
        return f"rows gathered before the first projection for {self.gathered} slots, else while they are loaded"
