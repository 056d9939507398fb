"""No two blocks of a family's graphs read tokens by the same routing, so there is no gather for them to share."""

from collections import Counter

import pytest
import torch
from torch import fx

from samoyeds_compile import backend
from samoyeds_compile.graph.values import graph_modules
from samoyeds_compile.options import Options
from tests.models import families

NAMES = [entry.id for entry in families.decorated_experts_classes()][::8]
"""Some; each takes seconds."""
READERS = (torch.ops.samoyeds.moe_experts.default, torch.ops.samoyeds.expert_up.default)
"""Ops that gather tokens, with the position of what says which."""


def routings(module: fx.GraphModule) -> Counter:
    """How many ops gather the same tokens by the same ids, or by the same plan."""
    return Counter(node.args[:2] for op in READERS for node in module.graph.find_nodes(op="call_function", target=op))


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(entry for entry in families.decorated_experts_classes() if entry.id == name)
    seen: list[Counter] = []

    def counted(gm: fx.GraphModule, options: Options) -> list:
        seen.extend(map(routings, graph_modules(gm)))
        return []

    monkeypatch.setattr(backend, "plan_layouts", counted)
    torch.compiler.reset()
    try:
        model = families.build(entry).eval()
    except families.CannotBuild as reason:
        pytest.skip(f"{entry.id} cannot be built from a config: {reason}")
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        torch.compile(model, backend="samoyeds", options={"base": "eager"})(**families.inputs(entry, model))
    assert sum(map(len, seen)) > 0
    assert all(count == 1 for counter in seen for count in counter.values())
