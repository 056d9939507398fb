"""Hook of mkdocs: what pages link to outside of docs is part of the site.

Pages link as GitHub needs it, ``../benchmarks/results/cpu.png``; on the site a file has its path in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files."""
    from mkdocs.structure.files import File, InclusionLevel

    texts = [path.read_text(encoding="utf-8") for path in Path(config.docs_dir).glob("*.md")]
    for name in sorted({name for text in texts for name in OUTSIDE.findall(text)}):
        inclusion = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to them."""
    return OUTSIDE.sub(r"](\1)", markdown)
