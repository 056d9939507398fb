"""The site has every page, and what its API page names exists."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_name_of_the_api_page_exists_and_is_documented():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(names) == len(set(names)) > 10
    for name in names:
        owner, _, attribute = name.rpartition(".")
        if name == "samoyeds_compile.errors":
            assert importlib.import_module(name).__doc__
        else:
            assert getattr(importlib.import_module(owner), attribute).__doc__, name


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target, anchor in re.findall(r"\]\(((?:[\w./-]+\.\w+)?)(?:#([\w-]+))?\)", text):
            path = (page.parent / target) if target else page
            assert path.exists(), f"{page.name} links to {target}"
            if anchor and path.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page.name} links to {target}#{anchor}"
