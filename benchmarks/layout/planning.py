"""How long the choice of layouts takes: models of more and more layers, none like another, 64 experts each."""

from __future__ import annotations

import time

from samoyeds_compile.layout.machine import Machine
from samoyeds_compile.layout.measured import AMX_KERNELS
from samoyeds_compile.layout.regimes import few, regimes
from samoyeds_compile.layout.region import Sizes


def planning() -> dict[str, dict[str, float]]:
    """Milliseconds by number of layers: all alike, as in models, which are solved once; and all different."""
    constants = Machine(AMX_KERNELS, {}).constants("bfloat16 dense")
    found: dict[str, dict[str, float]] = {"alike": {}, "different": {}}
    for step, name in ((0, "alike"), (16, "different")):
        for layers in (12, 24, 48):
            few.cache_clear()
            regimes.cache_clear()
            start = time.thread_time()
            for layer in range(layers):
                sizes = Sizes(1, 2048, 768 + step * layer, 64, 8, size=2, tile_size=2)
                few(sizes, constants)
                regimes(sizes, constants)
            found[name][str(layers)] = round((time.thread_time() - start) * 1e3, 1)
    return found
