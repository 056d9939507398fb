"""Why not, as a few lines of text: each block left alone, each graph break, each kernel and router not used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from samoyeds_compile.report.advice import remedy_for_kernel
from samoyeds_compile.report.model import BlockReport, Report

WITHOUT = "without a kernel"
"""How `BlockReport.kernel` begins where there is none."""

Entry = tuple[str, tuple[tuple[str, str], ...]]
"""What is wrong, and (word, text) pairs about it."""


def why(report: Report) -> str:
    """All that could be better, with the reason, the line, and what to do; entries that say the same are one."""
    entries = [*_breaks(report), *_blocks(report)]
    texts = [_text([name for (name, _) in same], facts) for facts, same in groupby(entries, key=lambda entry: entry[1])]
    return "\n".join(texts) or "nothing is left to do: every block that was found is rewritten"


def _blocks(report: Report) -> Iterator[Entry]:
    for block in report.blocks:
        name = block.module or _place(block.source)
        if not block.rewritten:
            yield f"{name} is left as it is", _facts(block)
        elif block.kernel.startswith(WITHOUT):
            reason, _, remedy = block.kernel.partition(": ")[2].partition("; ")
            remedy = remedy or remedy_for_kernel(reason)
            instead = block.kernel.partition(": ")[0].partition(", ")[2]
            yield f"{name} is rewritten, {WITHOUT}: {instead}", _pairs(why=reason, do=remedy)
        if block.router_reason:
            yield f"the router of {name} stays as it is", _pairs(why=block.router_reason)


def _place(source: str) -> str:
    """``file.py:12`` of ``/path/file.py:12: code``."""
    return re.sub(r"^(?:.*/)?([^/:]+:\d+): .*", r"\1", source, flags=re.DOTALL)


def _facts(block: BlockReport) -> tuple[tuple[str, str], ...]:
    reason = (block.reason or "").removesuffix(block.remedy).removesuffix("; ").removesuffix(": ")
    return _pairs(why=reason, where=block.reason_source or block.source, nearest=block.family, do=block.remedy)


def _pairs(**facts: str) -> tuple[tuple[str, str], ...]:
    return tuple((word, text) for word, text in facts.items() if text)


def _breaks(report: Report) -> Iterator[Entry]:
    for reason, remedy in report.breaks:
        yield "the graph breaks", _pairs(why=reason, do=remedy)


def _text(names: list[str], facts: tuple[tuple[str, str], ...]) -> str:
    lines = [f"  {word:<8}{text}" for word, text in facts]
    return "\n".join([*dict.fromkeys(names), *lines])
