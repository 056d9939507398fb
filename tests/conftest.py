"""What every test starts from: no compiled code of another one, and the same random state."""

import contextlib
import os

import pytest
import torch

pytest_plugins = ["tests.coverage_page"]

# tests/gpu runs on machines that have torch, Triton and pytest only (docs/gpu_benchmark.md).
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
    settings.register_profile("random", deadline=None, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Some microseconds where nothing was compiled, so that it can be everywhere."""
    torch._dynamo.reset()
    torch.manual_seed(0)
