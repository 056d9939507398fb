"""What every test starts from: no compiled code of another one, and the same random state."""

import pytest
import torch

pytest_plugins = ["tests.coverage_page"]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Some microseconds where nothing was compiled, so that it can be everywhere."""
    torch._dynamo.reset()
    torch.manual_seed(0)
