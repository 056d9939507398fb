"""Specifications: printable, and refused with a reason where there is no kernel."""

from dataclasses import replace

import pytest

from samoyeds_codegen.cuda.launch import target_of
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.spec import ALONE, VARIANTS, CombineSpec, ProjectionSpec, RouteSpec
from samoyeds_codegen.errors import UnsupportedSpecError

UP = ProjectionSpec("up", "sm_80", Pattern(1, 2, 32), activation="silu(gate) * up", gated=True)
DOWN = ProjectionSpec("down", "sm_90a", Pattern(1, 2, 128, 16), "float16", 128, 128, 4, bias=True)


def test_printed() -> None:
    assert str(UP) == "up bfloat16 1:2:32+2:4 swiglu 64x16x4 sm_80"
    assert str(DOWN) == "down float16 1:2:128+2:4/16 bias 128x128x4 sm_90a"
    paired = replace(DOWN, variant=VARIANTS["register_pairs"])
    assert str(paired).endswith("bias 128x128x4 from registers sharing tokens sm_90a")


@pytest.mark.parametrize(
    ("pattern", "sets", "dense_rows"), [((1, 1, 32), 1, 1), ((1, 2, 32), 2, 2), ((2, 4, 32), 3, 2)]
)
def test_patterns(pattern, sets, dense_rows) -> None:
    found = Pattern(*pattern)
    assert (found.sets, found.dense_rows) == (sets, dense_rows)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((1, 4, 32), "another set of sums"), ((8, 16, 32), "another set of sums"), ((1, 2, 16), "agree on a sub-row"),
     ((1, 2, 32, 0), "group of 0")],
)  # fmt: skip
def test_patterns_without_kernel(arguments, reason) -> None:
    with pytest.raises(UnsupportedSpecError, match=reason):
        Pattern(*arguments)


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        (UP, {"op": "side"}, "not up or down"),
        (UP, {"target": "sm_75"}, "sm_75 is not one of"),
        (UP, {"dtype": "float32"}, "float32 is not one of"),
        (UP, {"op": "down"}, "only up projections"),
        (UP, {"activation": "silu(x)"}, "reads other names"),
        (UP, {"activation": "to(gate, 'float16') * up"}, "round to float16"),
        (UP, {"tokens": 128}, "128 tokens is not one of"),
        (UP, {"rows": 96}, "96 rows is not one of"),
        (UP, {"rows": 128, "tokens": 64}, "128 sums in each thread spill"),
        (UP, {"stages": 1}, "1 stages"),
        (UP, {"target": "sm_86", "tokens": 64, "stages": 4}, "shared memory"),
        (DOWN, {"tokens": 8}, "8 tokens is not one of"),
        (DOWN, {"rows": 64}, "64 rows is not one of"),
        (DOWN, {"stages": 5}, "shared memory"),
        (DOWN, {"pattern": Pattern(2, 4, 64)}, "192 sums"),
        (ALONE, {"weights": "cache"}, "weights in cache"),
        (ALONE, {"cluster": 4}, "clusters of 4"),
        (ALONE, {"cluster": 2, "shares": "biases"}, "biases, is not weights or tokens"),
        (ALONE, {"weights": "registers", "cluster": 2}, "do not share weights that lie in registers"),
        (DOWN, {"variant": VARIANTS["registers"], "pattern": Pattern(1, 2, 32)}, "vectors of 32 columns are torn"),
        (DOWN, {"variant": VARIANTS["token_pairs"], "tokens": 16}, "half of 16 tokens"),
        (UP, {"variant": VARIANTS["registers"]}, "kernels from registers need wgmma, which sm_80 has not"),
        (RouteSpec("sm_80", 8, 16), {"target": "sm_1"}, "sm_1 is not"),
        (RouteSpec("sm_80", 8, 16), {"experts": 1025}, "1025 experts"),
        (RouteSpec("sm_80", 8, 16), {"ids": "int8"}, "int8"),
        (CombineSpec("sm_80", "bfloat16", "float32", "float32"), {"weights": "float64"}, "float64"),
        (CombineSpec("sm_80", "bfloat16", "float32", "float32"), {"dtype": "float32"}, "float32"),
    ],
)
def test_refused(spec, changes, reason) -> None:
    with pytest.raises(UnsupportedSpecError, match=reason):
        replace(spec, **changes)


@pytest.mark.parametrize(
    ("capability", "wgmma", "target"),
    [((8, 0), False, "sm_80"), ((8, 7), False, "sm_86"), ((8, 9), False, "sm_89"), ((9, 0), False, "sm_90"),
     ((9, 0), True, "sm_90a"), ((10, 3), False, "sm_100"), ((12, 1), False, "sm_120")],
)  # fmt: skip
def test_target_of_a_device(capability, wgmma, target) -> None:
    """Cubins run on devices of the same generation with the same or a higher minor number."""
    assert target_of(capability, wgmma) == target


@pytest.mark.parametrize(("capability", "wgmma"), [((7, 5), False), ((10, 0), True), ((11, 0), False)])
def test_devices_without_kernel(capability, wgmma) -> None:
    with pytest.raises(UnsupportedSpecError):
        target_of(capability, wgmma)
