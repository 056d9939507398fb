"""PyTorch's own tools see what we do: artifacts of ``TORCH_TRACE`` for tlparse, the ``TORCH_COMPILE_DEBUG`` folder.

Nothing is made unless somebody listens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import torch
from torch import fx
from torch._logging._internal import trace_structured_artifact

from samoyeds_compile.report.model import GraphReport

DEBUG_FOLDER = "samoyeds"
"""Name of our dump in the folder of ``TORCH_COMPILE_DEBUG``."""


def trace_graph(step: str, gm: fx.GraphModule) -> None:
    """The graph behind a step, as the artifact ``samoyeds_after_<step>``."""
    trace_structured_artifact(
        f"samoyeds_after_{step}", "string", lambda: gm.print_readable(print_output=False, include_stride=True)
    )


def trace_report(report: GraphReport) -> None:
    """The report of a graph, as JSON and as text: the artifacts ``samoyeds_report`` and ``samoyeds_summary``."""
    trace_structured_artifact("samoyeds_report", "json", lambda: dataclasses.asdict(report))
    trace_structured_artifact("samoyeds_summary", "string", lambda: _summary(report))


def _summary(report: GraphReport) -> str:
    from samoyeds_compile.report.model import Report

    whole = Report([report])
    return f"{whole}\n{whole.why()}\n"


def debug_dump(dump: Path | None) -> Path | None:
    """Where to dump: what the option says; with ``TORCH_COMPILE_DEBUG=1`` without it, into PyTorch's debug folder.

    That folder gets a link to a dump that lies elsewhere.
    """
    if os.environ.get("TORCH_COMPILE_DEBUG", "0") != "1":
        return dump
    folder = Path(torch._dynamo.utils.get_debug_dir()) / DEBUG_FOLDER
    if dump is None:
        return folder
    with contextlib.suppress(OSError):  # it is there already, or the file system has no links
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(dump.resolve(), target_is_directory=True)
    return dump
