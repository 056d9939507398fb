"""What every test starts from: no compiled code of another one, and the same random state."""

import os

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.coverage_page"]

settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Some microseconds where nothing was compiled, so that it can be everywhere."""
    torch._dynamo.reset()
    torch.manual_seed(0)
