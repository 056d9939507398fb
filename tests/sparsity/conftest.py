"""Less searching in tests: what a search of orders finds is not what they are about."""

import pytest

from samoyeds_compile.sparsity import order


@pytest.fixture(autouse=True)
def _few_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SWEEPS", 40)
