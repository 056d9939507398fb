"""Where things are in a piece of weights, and which weights kernels refuse to read."""

import pytest
import torch

from samoyeds_codegen.cuda import layout
from samoyeds_codegen.cuda.operands import Projection
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.errors import UnsupportedSpecError
from tests.codegen.cuda.weights import matrix, random_weight


def test_offsets_print_what_they_compute() -> None:
    """As CUDA they are arithmetic of whole numbers; Python's agrees for numbers that are not negative."""
    for offset, values in [(layout.VALUE, (37, 1, 3)), (layout.METADATA, (37, 5))]:
        body = offset.to_cuda().split("return ")[1].split(";")[0].replace("/", "//")
        names = {str(a): v for a, v in zip(offset.arguments, values, strict=True)}
        assert eval(body, {}, names) == offset(*values)


def test_a_piece_has_a_place_for_everything() -> None:
    """No two values overlap, nothing is left over."""
    places = [layout.VALUE(row, half, step) for row in range(64) for half in range(2) for step in range(4)]
    assert sorted(places) == list(range(0, layout.VALUE_BYTES, 16))
    words = [layout.METADATA(row, sixteen) for row in range(64) for sixteen in range(8)]
    assert sorted(words) == list(range(0, layout.METADATA_BYTES, 2))


def test_weights_that_kernels_cannot_read() -> None:
    found = matrix(random_weight(Pattern(1, 2, 32), 2, 64, 128)[1])
    wider = matrix(random_weight(Pattern(1, 2, 32), 2, 128, 128)[1])
    spread = type(found)(found.values.repeat_interleave(2, 2)[..., ::2], found.metadata, found.selection)
    narrow = type(found)(found.values[..., :24].contiguous(), found.metadata, found.selection)
    for arguments, reason in [
        ((found, wider), "different shapes"),
        ((spread,), "follow one another"),
        ((narrow,), "48"),
    ]:
        with pytest.raises(UnsupportedSpecError, match=reason):
            Projection(64, 128, *arguments)
    assert Projection(64, 128, found).rows == 32


def test_misaligned_views_are_copied() -> None:
    storage = torch.zeros(2 * 32 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 32, 64)
    whole = matrix(random_weight(Pattern(1, 1, 32), 2, 32, 128)[1])
    moved = type(whole)(storage, whole.metadata, None).arguments("", torch.bfloat16)["values"]
    assert isinstance(moved, torch.Tensor) and moved.data_ptr() % 16 == 0
