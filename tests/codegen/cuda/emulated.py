"""Launches on the CPU: the emulator executes the generated text itself."""

import ctypes

import torch

from samoyeds_codegen import emulate
from samoyeds_codegen.cuda.arguments import arguments_of
from samoyeds_codegen.cuda.emit import ENTRY, emit
from samoyeds_codegen.cuda.launch import Launch


def argument(kind: str, value):
    if kind == "int64_t":
        return ctypes.c_int64(value)
    return emulate.Output(value) if kind in ("Element*", "Result*", "Tile*", "int32_t*", "int64_t*") else value


def run(launch: Launch, seed: int = 0, text: str = "") -> None:
    """Raises an `EmulationError` for what is wrong; ``text`` stands for the launch's own."""
    fields = arguments_of(launch.spec).fields
    values = [argument(kind, launch.arguments[name]) for kind, name, _ in fields]
    for value in values:
        if isinstance(value, emulate.Output):
            value.tensor.view(torch.uint8).fill_(255)  # NaN, or -1
    spec, text = launch.spec, text or emit(launch.spec)
    entry, block = f"samoyeds::{ENTRY}", (spec.threads,)
    emulate.run(text, entry, launch.grid, block, spec.shared_bytes, values, cluster=spec.cluster, seed=seed)
