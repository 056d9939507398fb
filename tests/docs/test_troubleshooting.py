"""docs/troubleshooting.md says what the tools print, and what it advises helps."""

import os

import pytest
import torch

from tests.docs.trouble_page import PAGE, environment, explained, mended, page, section, spoilt, written
from tests.docs.troubles import PROGRAMS, TROUBLES

NOTHING = "nothing is left to do"


def test_page_says_what_is_printed(tmp_path):
    """Every section, made anew; ``SAMOYEDS_ACCEPT=1`` writes what differs."""
    sections = []
    for i, trouble in enumerate(TROUBLES):
        torch._dynamo.reset()
        torch.manual_seed(0)
        (tmp_path / str(i)).mkdir()
        sections.append(section(trouble, tmp_path / str(i)))
        assert NOTHING not in sections[-1], trouble.title
    if os.environ.get("SAMOYEDS_ACCEPT"):
        PAGE.write_text(page(sections), encoding="utf-8")
    there = written()
    assert list(there) == [trouble.title for trouble in TROUBLES] + ["The programs"]
    for trouble, made in zip(TROUBLES, sections, strict=True):
        assert there[trouble.title] == made.rstrip(), "run with SAMOYEDS_ACCEPT=1 if the new text is right"


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_rewritten(program, tmp_path):
    """What is advised in most sections is to undo the edit."""
    report = explained(PROGRAMS[program], program, tmp_path)
    assert report.rewritten and report.why().startswith(NOTHING)


@pytest.mark.parametrize("trouble", [t for t in TROUBLES if t.fix is not None], ids=lambda t: t.title.replace(" ", "-"))
def test_fixes_help(trouble, tmp_path):
    assert mended(trouble) != spoilt(trouble)
    with environment(trouble):
        report = explained(mended(trouble), trouble.program, tmp_path, trouble.grad)
    assert report.rewritten and all(block.rewritten for block in report.blocks)
