"""Every test starts from the same random state and without compiled code; a summary of the generated blocks."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many of the generated blocks were rewritten, by way of dispatching and in all."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    shares = [value for r in reports for name, value in getattr(r, "user_properties", []) if name == "generated"]
    if not shares:
        return
    terminalreporter.section("generated blocks that are rewritten")
    total = ("all", sum(share[1] for share in shares), sum(share[2] for share in shares))
    for dispatch, rewritten, blocks in [*sorted(shares), total]:
        terminalreporter.write_line(f"{dispatch:14} {rewritten:5} of {blocks:5}  {rewritten / blocks:6.1%}")
