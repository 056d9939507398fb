"""The emulator has every wrapper of the kernels' ptx.cuh, with the same template and the same arguments."""

import re

from samoyeds_codegen.cuda.emit import template
from samoyeds_codegen.emulate import library

FUNCTION = re.compile(
    r"(?:template <(?P<template>[^<>]*)>\s*)?(?:DEVICE|inline|static) \w+ (?P<name>\w+)\((?P<arguments>[^{};]*)\)"
)


def wrappers(text: str) -> dict[str, tuple[str, list[str]]]:
    """Name to template and types of arguments, without the line that the emulator's have."""
    found = {}
    for match in FUNCTION.finditer(text[text.index("namespace ptx {") :]):
        arguments = [a for a in re.split(r",\s*", match["arguments"]) if a and "__builtin_LINE" not in a]
        kinds = [re.sub(r"\s*\b\w+$", "", a) if "(&" not in a else re.sub(r"\(&\w*\)", "(&)", a) for a in arguments]
        found.setdefault(match["name"], (match["template"] or "", kinds))
    return found


def test_same_wrappers() -> None:
    device, host = wrappers(template("ptx.cuh")), wrappers(library._file("device/ptx.h"))
    assert len(device) > 15
    assert {name: host.get(name) for name in device} == device
