"""The results as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cpu.arms import BEST, EAGER, INDUCTOR, PREFIX
from benchmarks.cpu.point import Row
from benchmarks.cpu.shapes import SHAPES

OVER = (EAGER, INDUCTOR, BEST)
NOTES = """\
Ratios are the peer's time by that of Samoyeds, medians over rounds in which all arms took turns, with the last-level
cache flushed before each call; above 1 Samoyeds is faster. Every Samoyeds arm is the whole block through
`torch.compile`, router included; `eager` and `inductor` are the same block, dense. `best dense` is the fastest of
`torch.mm` and of oneDNN and MKL with weights packed beforehand, untimed; it multiplies and does nothing else: no
router, gather, activation or sum. With one thread times are CPU times of the thread; with more they are wall clock in
rounds with little foreign load. A row marked ~ had foreign load all the time and is not to be relied on. `roofline` is
the share of the least time in which the machine can read the bytes and do the multiplications; GF/s count kept weights.
"""


@dataclass(frozen=True)
class Table:
    """Text cells."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """With a heading."""
        rows = [self.header, ["---"] * len(self.header), *self.lines]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Ratios, then rates, for each dtype and number of threads."""
    groups = {(row["threads"], row["dtype"]): None for row in rows}
    for threads, dtype in sorted(groups):
        of_group = [row for row in rows if (row["threads"], row["dtype"]) == (threads, dtype)]
        title = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
        yield _table(f"{title}: {', '.join(OVER)}, each over Samoyeds", of_group, _ratio_cells(of_group))
        yield _table(f"{title}: time; GB/s; GF/s; share of the roofline", of_group, _rate_cells(of_group))


def _table(title: str, rows: Sequence[Row], columns: dict[str, list[str]]) -> Table:
    names = {
        "shape": [row["shape"] for row in rows],
        "tokens": [f"{row['tokens']}{'' if row['rounds']['quiet'] else ' ~'}" for row in rows],
        "an expert": [str(row["tokens_per_expert"]) for row in rows],
    }
    all_columns = names | columns
    return Table(title, list(all_columns), [list(line) for line in zip(*all_columns.values(), strict=True)])


def _ratio_cells(rows: Sequence[Row]) -> dict[str, list[str]]:
    """A column for each arm of Samoyeds."""
    arms = {arm: None for row in rows for arm in row["ratio"]}
    columns = {arm.removeprefix(PREFIX): [_ratios(row, arm) for row in rows] for arm in arms}
    return columns | {BEST: [row[BEST] or "-" for row in rows]}


def _ratios(row: Row, arm: str) -> str:
    found = row["ratio"].get(arm, {})
    return " / ".join(f"{found[peer]:.2f}" if peer in found else "-" for peer in OVER)


def _rate_cells(rows: Sequence[Row]) -> dict[str, list[str]]:
    arms = {arm: None for row in rows for arm in row["ms"]}
    return {arm.removeprefix(PREFIX): [_rates(row, arm) for row in rows] for arm in arms}


def _rates(row: Row, arm: str) -> str:
    if arm not in row["ms"]:
        return "-"
    rate = row["rate"][arm]
    return f"{row['ms'][arm]:.3g} ms; {rate['GB/s']:.3g}; {rate['GF/s']:.3g}; {100 * rate['roofline']:.0f} %"


def markdown(content: dict[str, Any]) -> str:
    """The page: the machine, its rooflines, the tables."""
    machine, rows = content["machine"], content["rows"]
    lines = ["# MoE blocks on a CPU", "", *(f"- {key}: {value}" for key, value in machine.items())]
    for roofline in content["rooflines"].values():
        rates = f"{roofline['read']} GB/s, {roofline['fma']} GF/s of FMA, {roofline['amx']} GF/s of the matrix unit"
        pairs = roofline.get("pairs", 0)
        rates += f", {pairs} GF/s of pairs of bfloat16 in vectors" if pairs else ""
        lines.append(f"- roofline, {roofline['threads']} thread(s): {rates}")
    shapes = dict.fromkeys(row["shape"] for row in rows)
    lines += [f"- {shape}: {SHAPES[shape].title}" for shape in shapes]
    skipped = {f"{name}, {row['dtype']}: {why}" for row in rows for name, why in row["skipped"].items()}
    lines += [f"- left out: {text}" for text in sorted(skipped)]
    return "\n".join([*lines, "", NOTES, *(table.markdown() for table in tables(rows))])
