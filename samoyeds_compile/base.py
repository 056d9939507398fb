"""Hand the rewritten graph to the compiler that does the rest."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from samoyeds_compile.options import Options


def compile_with_base(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile with Inductor, or with one of Dynamo's debugging backends."""
    if options.base == "inductor":
        return _compile_with_inductor(gm, example_inputs, options)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(options.base)(gm, list(example_inputs))


def _compile_with_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    config: Any = torch.compiler.config
    tag = f"{config.cache_key_tag}samoyeds-{source_hash()}"
    with config.patch(cache_key_tag=tag):
        return compile_fx(gm, example_inputs, config_patches=options.inductor_patches())  # type: ignore[return-value]


@functools.cache
def source_hash() -> str:
    """Hash of the source of both packages.

    It is part of Inductor's cache keys: the graph names composite ops whose meaning is our source, so a cache entry of
    another version must not be used.
    """
    import samoyeds_codegen
    import samoyeds_compile

    digest = hashlib.sha256()
    for package in (samoyeds_compile, samoyeds_codegen):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".h")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
