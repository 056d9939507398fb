"""What surrounds a replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from samoyeds_compile.graph.values import Context


@contextlib.contextmanager
def replaying(context: Context) -> Iterator[None]:
    """Real tensors, gradients on, and the autocast state of ``context``; the caller's random state is not touched."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for args in context.autocast:
            stack.enter_context(torch.autocast(*args))
        yield
