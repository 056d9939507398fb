"""The kernels of the Samoyeds paper and of VENOM, which are built by hand beside a run and never shipped.

Whoever has built one puts a module of this name on the path: ``prepare(shape, weights)`` gives a function of inputs
that gives a call, as for every contender here. It has to compute all columns of the output, and says by ``WORK`` what
it does of the block and in which type it sums.
"""

from __future__ import annotations

from benchmarks.gpu.contender import PRODUCTS, Bind, Contender
from benchmarks.gpu.peers.modules import module
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import Weights


def _peer(name: str, plugged: str) -> Contender:
    def prepare(shape: Shape, weights: Weights) -> Bind:
        found: Bind = module(plugged).prepare(shape, weights)
        return found

    return Contender(name, "75 %", prepare, work=PRODUCTS, checked=False, graph=False)


SAMOYEDS = _peer("original Samoyeds kernel", "samoyeds_original_peer")
VENOM = _peer("VENOM", "venom_peer")
