"""Large new tensors are wished to be on huge pages, as the kernel's list of mappings says."""

import re
from pathlib import Path

import pytest
import torch

from samoyeds_compile import huge_pages
from samoyeds_compile.huge_pages import WORTH_IT, on_huge_pages

SMAPS = Path("/proc/self/smaps")
needs_linux = pytest.mark.skipif(
    not SMAPS.exists() or "VmFlags" not in SMAPS.read_text() or huge_pages._advise() is None,
    reason="no list of mappings, or no huge pages to ask for",
)


def wished(address: int) -> bool:
    """Whether the mapping of an address has the flag hg."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping has the address")


@needs_linux
def test_large_ones_are() -> None:
    new = torch.empty(40 * 2**20, dtype=torch.uint8)
    middle = new.data_ptr() + new.nbytes // 2
    before = wished(middle)
    assert on_huge_pages(new) is new
    assert wished(middle) and not before


@needs_linux
def test_small_ones_and_empty_ones_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(huge_pages, "_advise", lambda: lambda *arguments: calls.append(arguments))
    for size in (0, 1, WORTH_IT - 1):
        on_huge_pages(torch.empty(size, dtype=torch.uint8))
    on_huge_pages(torch.empty(WORTH_IT, dtype=torch.uint8, device="meta"))
    assert not calls
    new = torch.empty(WORTH_IT + 1, dtype=torch.uint8)
    on_huge_pages(new)
    ((first, size, _),) = calls
    assert first % 4096 == 0 and first >= new.data_ptr() and first + size == new.data_ptr() + new.nbytes


def test_without_them_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_advise", lambda: None)
    new = torch.empty(WORTH_IT, dtype=torch.uint8)
    assert on_huge_pages(new) is new


@needs_linux
def test_gradients_of_experts_are_on_them() -> None:
    """And are what they were: each expert's rows with rows."""
    x = torch.randn(64, 1024)
    weight = torch.randn(16, 1024, 1024, requires_grad=True)
    ends = torch.arange(4, 65, 4, dtype=torch.int32)
    torch.ops.samoyeds.expert_linear(x, [weight], ends, False).sum().backward()
    assert weight.grad is not None and wished(weight.grad.data_ptr() + weight.grad.nbytes // 2)
    expected = x.reshape(16, 4, 1024).sum(1).unsqueeze(1).expand(16, 1024, 1024)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)
