"""A check for programs of several ranks: do all of them compile the same collectives and the same rewrites?

No rewrite moves a collective: the pipeline compares their order before and after each step that edits a graph, and puts
the graph back if it changed. What it cannot see is another rank. Ranks whose graphs differ, because one of them got no
tokens, or refused a rewrite that the others made, still issue what the program says; but a base compiler that schedules
collectives may then order them differently on each rank, and the job hangs. `require_agreement` says so instead.
"""

from __future__ import annotations

import torch.distributed as dist

from samoyeds_compile.errors import DistributedError
from samoyeds_compile.report.model import GraphReport, Report


def require_agreement(report: Report, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank unless all have compiled the same; call it on all ranks, after the first step or so.

    Graphs are told apart by their collectives, in order, and by what became of their blocks, not by their number: a
    rank that compiled one more for another number of tokens agrees.

    Args:
        report: what this rank passed as ``options={"report": report}``.
        group: the ranks to compare; all of them by default.

    Raises:
        DistributedError: a graph that some ranks have and others have not.
    """
    mine = sorted({_signature(graph) for graph in report.graphs if graph.collectives or graph.blocks})
    all_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(all_ranks, mine, group=group)
    common = set.intersection(*map(set, all_ranks))
    odd = [f"rank {rank}: {text}" for rank, texts in enumerate(all_ranks) for text in texts if text not in common]
    if odd:
        raise DistributedError(
            "ranks compiled different graphs:\n  " + "\n  ".join(odd) + "\nhave all ranks take the same branches, or "
            'leave blocks alone that only some rewrite (options={"disable": (family,)})'
        )


def _signature(graph: GraphReport) -> str:
    """Collectives in order, and each block with what it became."""
    blocks = [f"{block.module or block.source} -> {', '.join(block.became) or 'as it is'}" for block in graph.blocks]
    return f"collectives [{', '.join(graph.collectives)}], blocks [{'; '.join(blocks)}]"
