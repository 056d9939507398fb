"""What takes part: how a kernel or a peer is prepared for weights, then for tokens, and then called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import Weights

Call = Callable[[], "Tensor | None"]
"""Runs once; gives [T, H] if the whole block was computed."""


@dataclass(frozen=True)
class Chosen:
    """A `Call` of this project's kernels.

    Attributes:
        call: runs them.
        candidate: which ones they are: `samoyeds_codegen.gpu.candidate.Candidate`, in words.
        model_ms: milliseconds of both projections by the cost model.
    """

    call: Call
    candidate: str
    model_ms: float

    def __call__(self) -> Tensor | None:
        """Run them."""
        return self.call()


Bind = Callable[[Inputs], Call]


class Absent(Exception):
    """A contender is not there; the message says what is missing."""


BLOCK, PRODUCTS, ROUTED = "block", "products only", "block and router"


@dataclass(frozen=True)
class Contender:
    """Something that computes a block of experts.

    Attributes:
        name: in tables and results.
        form: of weights that it takes, see `Weights.name`.
        prepare: binds it to weights; raises `Absent` where it cannot take part.
        ours: whether it is this project's.
        work: what it does of a block; `PRODUCTS` leaves the gather, the activation and the sum out, which flatters it.
        checked: whether its result is that of the block; not so where it has another activation or its own weights.
        graph: whether a CUDA graph can hold it.
    """

    name: str
    form: str
    prepare: Callable[[Shape, Weights], Bind]
    ours: bool = False
    work: str = BLOCK
    checked: bool = True
    graph: bool = True
