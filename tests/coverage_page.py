"""docs/coverage.md, written by the tests that run families and styles.

A test says what it saw with ``record_property(*cell(group, row, column, report))``. When the run ends, what passing
tests recorded is compared with the page: a difference fails the run, and ``SAMOYEDS_ACCEPT=1`` writes it to the page.
Only cells that ran are compared or written, so parts of the suite may run alone; `tests/test_coverage_page.py` checks
that none is missing. Properties travel with the reports of tests, so this works in the process from which pytest-xdist
starts its workers. What a block becomes depends on the versions of torch and transformers: under others than those
named on the page nothing is compared.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from samoyeds_compile import Report

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
PROPERTY = "coverage"
LOOPS = ("dbrx", "jetmoe", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers")

Cells = dict[tuple[str, str, str], str]
"""Text by (group, row, column)."""


@dataclass(frozen=True)
class Group:
    """One table: its title, what stands above it, its columns, and the rows that it has to have."""

    title: str
    text: str
    columns: tuple[str, ...]
    rows: Callable[[], list[str]]


def _decorated() -> list[str]:
    from tests.models import families

    return [entry.id for entry in families.decorated_experts_classes()]


def _undecorated(loops: bool) -> list[str]:
    from tests.models import families

    return [entry.id for entry in families.undecorated() if (entry.id in LOOPS) == loops]


def _styles(pattern: str) -> list[str]:
    from tests.styles.zoo import STYLES

    return [style.name for style in STYLES.values() if style.pattern == pattern]


def _hand_written(pattern: str, title: str, text: str = "") -> Group:
    return Group(f"Written by hand: {title}", text, ("eval", "train"), lambda: _styles(pattern))


GROUPS: Mapping[str, Group] = {
    "decorated": Group(
        "transformers: families with `@use_experts_implementation`",
        "`grouped_mm` is the default of transformers. `eager` is a Python loop that no graph holds;\n"
        "[`enable`](integrations.md) runs it as the implementation named here.",
        ("grouped_mm, eval", "grouped_mm, train", "batched_mm, eval", "batched_mm, train", "eager, with enable"),
        _decorated,
    ),
    "loops": Group(
        "transformers: families with loops of their own",
        "",
        ("as it is", "with enable, eval", "with enable, train"),
        lambda: _undecorated(loops=True),
    ),
    "others": Group(
        "transformers: other mixtures",
        "What `doge` and `vitpose_backbone` compute is not what this backend rewrites: rows of an embedding as\n"
        "experts, and experts that the data set of an image selects.",
        ("eval", "train"),
        lambda: _undecorated(loops=False),
    ),
    "P1": _hand_written("P1", "grouped products"),
    "P2": _hand_written("P2", "weights gathered for each token"),
    "P3": _hand_written("P3", "loops over experts"),
    "P4": _hand_written(
        "P4", "every expert on every token",
        "`threshold` and `soft_mixture` do not choose a fixed number of experts; they are meant to stay as they are.",
    ),
    "P5": _hand_written(
        "P5", "rows dispatched before the experts",
        "One-hot dispatch goes if every row has a place of its own; else only the experts are rewritten.",
    ),
}  # fmt: skip

HEAD = """# Coverage

What becomes of the ways of writing a block that the tests run: blocks rewritten, of those found, and why the others
were not ([reasons](inspect.md#reasons-and-what-to-do)). The cells under `eval` and `train` are written by tests that
compare results with eager mode, in training the gradients too; the test run fails where this page is not true. Models
are small ones with random weights, in fp32 on CPU. Made with {versions}.
"""


def versions() -> str:
    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in ("torch", "transformers"))


def cell(group: str, row: str, column: str, report: Report | str) -> tuple[str, tuple[str, str, str, str]]:
    """What `record_property` is to be called with; the report may be a text as well."""
    assert column in GROUPS[group].columns
    return PROPERTY, (group, row, column, report if isinstance(report, str) else summary(report))


def mode(train: bool) -> str:
    return "train" if train else "eval"


def summary(report: Report) -> str:
    """``2 of 2``, or ``0 of 2: why``."""
    if not report.blocks:
        return "no block found"
    reasons = dict.fromkeys(block.reason or "" for block in report.blocks if not block.rewritten)
    count = f"{len(report.rewritten)} of {len(report.blocks)}"
    return f"{count}: {'; '.join(reasons)}" if reasons else count


def render(cells: Cells, made_with: str) -> str:
    parts = [HEAD.format(versions=made_with)]
    for key, group in GROUPS.items():
        rows = sorted({row for name, row, _ in cells if name == key})
        lines = [("", *group.columns), ("---",) * (len(group.columns) + 1)]
        lines += [(f"`{row}`", *(cells.get((key, row, column), "") for column in group.columns)) for row in rows]
        table = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)
        parts.append("\n\n".join([f"## {group.title}", *([group.text] if group.text else []), table]) + "\n")
    return "\n".join(parts)


def parse(page: str) -> Cells:
    """Inverse of `render`."""
    keys = {group.title: key for key, group in GROUPS.items()}
    cells: Cells = {}
    for section in page.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        header, _, *rows = (re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|"))
        for row in rows:
            texts = [text.strip().replace("\\|", "|") for text in row]
            columns = [text.strip() for text in header[1:]]
            cells |= {(keys[title], texts[0].strip("`"), c): t for c, t in zip(columns, texts[1:], strict=True) if t}
    return cells


def differences(ran: Cells, page: Cells) -> list[str]:
    """One line for each cell that ran and reads otherwise on the page."""
    return [
        f"{', '.join(key)}: the page says {page.get(key, 'nothing')!r}, the test saw {text!r}"
        for key, text in sorted(ran.items())
        if page.get(key) != text
    ]


def merged(ran: Cells, page: Cells) -> Cells:
    """The page with the cells that ran, without rows that no test has any more."""
    rows = {key: set(group.rows()) for key, group in GROUPS.items()}
    return {
        key: text for key, text in (page | ran).items() if key[1] in rows[key[0]] and key[2] in GROUPS[key[0]].columns
    }


class CoveragePage:
    """Collects what passing tests record, and compares or writes the page when the run ends."""

    def __init__(self, page: Path = PAGE) -> None:
        self.page = page
        self.ran: Cells = {}
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            found = [value for name, value in report.user_properties if name == PROPERTY]
            self.ran |= {(group, row, column): text for group, row, column, text in found}  # type: ignore[misc]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        text = self.page.read_text(encoding="utf-8") if self.page.exists() else ""
        if not self.ran:
            return
        if os.environ.get("SAMOYEDS_ACCEPT"):
            self.page.write_text(render(merged(self.ran, parse(text)), versions()), encoding="utf-8")
        elif f"Made with {versions()}." not in text:
            self.lines.append(f"not compared: it was made with other versions than {versions()}")
        elif found := differences(self.ran, parse(text)):
            self.lines += [*found, "SAMOYEDS_ACCEPT=1 accepts the new cells"]
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.lines:
            terminalreporter.section(str(self.page.name))
            for line in self.lines:
                terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers hand their reports to the process that started them
        config.pluginmanager.register(CoveragePage(), "samoyeds-coverage-page")
