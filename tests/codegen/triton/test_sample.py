"""Problems that kernels prove themselves on: they have to be able to tell right from wrong."""

import pytest
import torch

from samoyeds_codegen.gpu.candidate import KINDS, candidates, projection
from samoyeds_codegen.gpu.prove import _sampled
from samoyeds_codegen.triton.prove import compare
from samoyeds_codegen.triton.sample import Form, problem
from samoyeds_codegen.triton.select import kernels
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Pattern

CPU = torch.device("cpu")
SIZES = [(1, 1, 32), (1, 2, 32), (1, 2, 64), (1, 2, 128), (2, 4, 32), (2, 4, 128)]
GROUPS = (1, 16, 64)
PATTERNS = [Pattern(*size, group) for size in SIZES for group in GROUPS if size[1] > 1 or group == 1]


def asked(spec) -> list[KernelSpec]:
    """Of Triton and of CUDA, by whatever tile."""
    cuda = [projection(spec, op, c.kind, c.slots, (9, 0)) for c in candidates(spec, KINDS[1:], (9, 0))
            for op in ("up", "down")]  # fmt: skip
    return [*kernels(spec), *(KernelSpec(kernel.op, spec, _sampled(kernel)) for kernel in cuda)]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "ragged"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_hardly_any_result_is_zero(pattern, aligned) -> None:
    """Rows of gates that are zero where those of ups are not would leave nothing to compare."""
    for spec in dict.fromkeys(asked(ExpertsSpec("bfloat16", pattern, "silu(gate) * up", True))):
        expected = problem(spec, Form(aligned), CPU).expected
        assert float((expected != 0).any(0).double().mean()) > 0.85, spec


def test_choices_that_many_blocks_share_differ() -> None:
    """The second group of a side chooses for itself, and a kernel that takes the first one's is wrong."""
    spec = ExpertsSpec("bfloat16", Pattern(1, 2, 128, 64), "silu(gate) * up", True)
    sides = problem(kernels(spec)[0], Form(), CPU).sides
    assert all(side.selection.shape[1] == 2 for side in sides.values())
    assert any(not torch.equal(side.selection[:, 0], side.selection[:, 1]) for side in sides.values())


def test_zeros_are_compared() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert compare("zero", zero.float(), zero, 1e-3) == ""
    assert "times the error" in compare("zero", torch.tensor([0.0, 1e-30, 0.0]), zero, 1e-3)
    assert "inf times" in compare("zero", torch.tensor([0.0, float("nan"), 0.0]), zero, 1e-3)
