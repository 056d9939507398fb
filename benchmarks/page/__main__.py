"""Write docs/benchmarks.md from benchmarks/results: nothing is measured, and nothing else is read.

    python -m benchmarks.page

What has no file in benchmarks/results is named on the page as not measured. Figures that no benchmark draws itself are
drawn here, beside their JSON.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.page.figures import draw, figure_of
from benchmarks.page.sections import SECTIONS, Section
from benchmarks.page.table import Content, Table, ratio, two_digits

PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
LINK = "../benchmarks/results"
INTRODUCTION = """\
# Benchmarks

`python -m benchmarks.page` writes this page from the files in `benchmarks/results`, and from nothing else. Each section
says what was compared, where, at which commit and how to repeat it; what came after that commit is not in its figures.

Ratios are the time of a peer by that of Samoyeds, of medians or medians over alternating rounds in one run: above 1
Samoyeds is faster. **Bold ratios are losses.** A ratio with ~ was disturbed by other processes.
"""


def main() -> None:
    """Draw, write."""
    for path in RESULTS.glob("*.json"):
        if figure_of(path.stem):
            draw(path)
    PAGE.write_text(render(RESULTS), encoding="utf-8")
    print(f"wrote {PAGE}")


def render(folder: Path) -> str:
    """The page, of the JSON files and figures of a folder."""
    found = {section.title: list(_files(section, folder)) for section in SECTIONS}
    contents = {path: json.loads(path.read_text(encoding="utf-8")) for paths in found.values() for path in paths}
    made = {path: list(s.tables(contents[path])) for s in SECTIONS for path in found[s.title]}
    missing = [title for title, paths in found.items() if not paths]
    lines = [INTRODUCTION, *_overview(found, made)]
    lines += [f"Not measured, or not kept: {', '.join(missing)}.", ""] if missing else []
    for section in SECTIONS:
        lines += [f"## {section.title}", "", section.text, ""]
        for path in found[section.title]:
            lines += _facts(section, path, contents[path])
            lines += _figure(section, path)
            lines += [table.markdown() for table in made[path]]
        if not found[section.title]:
            lines += [f"Not measured. To measure: `{section.command}`.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _files(section: Section, folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob("*.json")):
        if re.fullmatch(rf"(?:{section.files})(_\w+)?", path.stem):
            yield path


def _overview(found: dict[str, list[Path]], made: dict[Path, list[Table]]) -> Iterator[str]:
    """All tables of ratios, each in a line."""
    header = ("benchmark", "compared", "ratios", "below 1", "smallest", "median", "largest")
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for title, paths in found.items():
        for path in paths:
            for table in made[path]:
                if table.ratios:
                    yield f"| [{title}](#{_anchor(title)}), {path.stem} | {table.caption} | {_spread(table.ratios)} |"
    yield ""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _spread(ratios: Sequence[float]) -> str:
    shown = [float(two_digits(value)) for value in ratios]
    figures = (min(shown), statistics.median(shown), max(shown))
    return " | ".join([str(len(shown)), str(sum(value < 1 for value in shown)), *map(ratio, figures)])


def _facts(section: Section, path: Path, content: Content) -> Iterator[str]:
    """File, machine, commit, date, command."""
    machine = content["machine"]
    yield f"### {path.name}"
    yield ""
    threads = f", {machine['threads']} thread(s)" if "threads" in machine else ""
    yield f"- machine: {machine.get('cpu') or machine.get('device')}, {machine.get('cores', '?')} cores{threads}"
    versions = [f"{key} {machine[key]}" for key in ("torch", "python") if machine.get(key)]
    when = f"commit {machine.get('commit') or 'not recorded'}, {machine.get('date') or 'no date'}"
    yield f"- made with {', '.join(versions)}; {when}"
    yield from _remarks(section, machine)
    yield f"- to repeat: `{_command(section, path, content)}`; the file: [{path.name}]({LINK}/{path.name})"
    yield ""


def _remarks(section: Section, machine: Content) -> Iterator[str]:
    if machine.get("load_before", 0) > (machine.get("cores") or 1):
        yield f"- other processes were running: load average {machine['load_before']} before it"
    if machine.get("commit") in section.older:
        yield f"- older than today's code: {section.older[machine['commit']]}"


def _command(section: Section, path: Path, content: Content) -> str:
    rows = content.get("rows", [{}])
    tokens = " ".join(map(str, sorted({row.get("tokens", 0) for row in rows})))
    return section.command.format(stem=path.stem, tokens=tokens, implementation=rows[0].get("implementation"))


def _figure(section: Section, path: Path) -> Iterator[str]:
    if path.with_suffix(".png").exists() or figure_of(path.stem):
        picture = f"{LINK}/{path.stem}.png"
        yield f"[![{section.title}]({picture})]({picture})"
        yield ""


if __name__ == "__main__":
    main()
