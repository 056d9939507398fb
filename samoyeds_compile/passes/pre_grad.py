"""`SamoyedsPass`: the pipeline in Inductor's slot ``pre_grad_custom_pass``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from samoyeds_compile.backend import optimize
from samoyeds_compile.base import source_hash
from samoyeds_compile.errors import OptionError
from samoyeds_compile.options import Options


class SamoyedsPass(CustomGraphPass):
    """Rewrites the MoE blocks of a graph before autograd takes it apart; whatever fails, the graph stays as it came.

    ::

        options = {"pre_grad_custom_pass": SamoyedsPass({"report": report})}
        torch.compile(model, backend="inductor", options=options)

    The slot is the one before AOTAutograd: later graphs are too dissolved to be matched. Loops over experts that only
    `samoyeds_compile.capture` makes visible stay with the backend ``"samoyeds"``, which traces their frames itself.

    Args:
        options: as for ``torch.compile(..., backend="samoyeds", options=...)``; what concerns the base compiler is
            refused, since here it is the caller's.

    Raises:
        OptionError: an unknown option, or one of the base compiler.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        given = dict(options or {})
        for name in ("base", "mode", "inductor"):
            if name in given:
                raise OptionError(f"SamoyedsPass: option {name!r} is the base compiler's; pass it to torch.compile")
        self.options = Options.from_call(None, given)

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite one graph in place.

        Args:
            graph: of an `fx.GraphModule` as Dynamo made it, with ``example_value`` in the metadata of its nodes.
        """
        assert graph.owning_module is not None
        report = optimize(graph.owning_module, [], self.options)
        if self.options.report is not None:
            self.options.report(report)

    def uuid(self) -> bytes:
        """A hash of our source and of the options that decide what is computed, for Inductor's caches.

        Where results are dumped or reported to is not among them.
        """
        options = {name: value for name, value in vars(self.options).items() if name not in ("report", "dump")}
        return hashlib.sha256(f"{source_hash()} {sorted(options.items())!r}".encode()).digest()

    def __reduce__(self) -> tuple[Any, ...]:
        """For keys of caches, which pickle their configuration."""
        return (SamoyedsPass, ({},), {"uuid": self.uuid()})

    def __setstate__(self, state: Any) -> None:
        """Nothing: a pass made from a key is never run."""
