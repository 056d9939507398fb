"""Large pages: advice only, so values and addresses stay."""

import pytest
import torch

from samoyeds_compile.ops import large_pages
from samoyeds_compile.ops.large_pages import in_large_pages

BIG = 5 * 2**20


@pytest.fixture
def advised(monkeypatch):
    calls = []
    monkeypatch.setattr(large_pages, "_advise", lambda: lambda *arguments: calls.append(arguments))
    return calls


def test_values_and_address_stay():
    tensor = torch.arange(BIG // 4, dtype=torch.float32)
    address, before = tensor.data_ptr(), tensor.clone()
    assert in_large_pages(tensor) is tensor and tensor.data_ptr() == address
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("offset", [0, 1, 1023])
def test_only_whole_pages_of_the_tensor(advised, offset):
    tensor = torch.zeros(BIG // 4)[offset:]
    in_large_pages(tensor)
    ((first, length, _),) = advised
    assert first.value % large_pages.mmap.PAGESIZE == 0 and length.value % large_pages.mmap.PAGESIZE == 0
    assert tensor.data_ptr() <= first.value and first.value + length.value <= tensor.data_ptr() + tensor.nbytes


def test_small_tensors_and_other_systems_are_left_alone(advised, monkeypatch):
    in_large_pages(torch.zeros(8))
    in_large_pages(torch.zeros(0, 3))
    in_large_pages(torch.empty(BIG, device="meta"))
    assert not advised
    monkeypatch.setattr(large_pages, "_advise", lambda: None)
    in_large_pages(torch.zeros(BIG))
