"""The pass in Inductor's slot: what the backend does, for compilers that are somebody else's."""

import pickle

import pytest
import torch

from samoyeds_compile import OptionError, Report
from samoyeds_compile.passes import SamoyedsPass, pre_grad
from tests.blocks import Block


@pytest.mark.inductor
def test_in_inductors_slot() -> None:
    """After a pass of the user's own; what it writes is what the backend writes, whose gradients have their tests."""
    seen, report, block = [], Report(), Block()
    passes = [lambda graph: seen.append(len(graph.nodes)), SamoyedsPass({"report": report})]
    compiled = torch.compile(block, backend="inductor", options={"pre_grad_custom_pass": passes})
    x = torch.randn(7, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert seen and [b.became for b in report.blocks] == [("samoyeds::moe_experts",)]


def test_uuid() -> None:
    """Of the source and of what decides results; the same in every process, and in a pickled key."""
    one, other = SamoyedsPass(), SamoyedsPass({"validate": False})
    assert one.uuid() == SamoyedsPass({"report": Report()}).uuid() != other.uuid()
    assert pickle.dumps(one) == pickle.dumps(SamoyedsPass({"report": print})) != pickle.dumps(other)


def test_uuid_follows_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SamoyedsPass().uuid()
    monkeypatch.setattr(pre_grad, "source_hash", lambda: "another version")
    assert SamoyedsPass().uuid() != before


@pytest.mark.parametrize("name", ["base", "mode", "inductor"])
def test_options_of_the_base_compiler_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=rf"option '{name}' is the base compiler's; pass it to torch.compile"):
        SamoyedsPass({name: "default"})
