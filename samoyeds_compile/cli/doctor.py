"""``samoyeds doctor``: what this machine has, which kernels it gets, and why not others."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from samoyeds_codegen import build
from samoyeds_codegen.cpp import isa, ops
from samoyeds_codegen.cpp.spec import DTYPES
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.cli.output import AsJson, fail, show
from samoyeds_compile.layout import machine
from samoyeds_compile.options import ENVIRONMENT_PREFIX

PACKAGES = ("samoyeds-compile", "torch", "triton", "transformers", "accelerate", "peft", "safetensors")


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Attributes:
        name: what was looked at.
        state: ``ok``, ``none`` (it is not there, and nothing is wrong), or ``bad``.
        found: what was found.
        remedy: what to do about it; empty where there is nothing to do.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


Calibrate = Annotated[bool, typer.Option("--calibrate", help="First measure what layouts cost here, about a minute.")]


def doctor(as_json: AsJson = False, calibrate: Calibrate = False) -> None:
    """Say what this machine has and which kernels it gets; exit with 1 if something should be mended."""
    if calibrate:
        _calibrate()
    with Console(stderr=True).status("looking around; the first time ops are compiled"):
        checks = list(all_checks())
    show(_table(checks), [dataclasses.asdict(check) for check in checks], as_json)
    if any(check.state == "bad" for check in checks):
        raise typer.Exit(1)


def all_checks() -> Iterator[Check]:
    """In the order in which they build on each other."""
    yield Check("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        yield _package(package)
    yield Check("processor", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for dtype in DTYPES:
        yield _variants(dtype)
    yield _compiler()
    yield _ops()
    yield _cache()
    yield _costs()
    yield _gpu()
    yield _environment()


def _calibrate() -> None:
    """Measure the constants of costs with the threads at hand, and keep them."""
    from samoyeds_compile.layout.calibrate import calibrate
    from samoyeds_compile.layout.machine import store

    with Console(stderr=True).status("measuring") as status:
        try:
            store(calibrate(tell=lambda kernel: status.update(f"measuring {kernel}; compiled the first time")))
        except KernelError as error:
            raise typer.Exit(fail(str(error))) from error


def _costs() -> Check:
    found = machine.here()
    remedy = "" if found.origin == "measured" else "samoyeds doctor --calibrate, while the machine does nothing else"
    return Check("costs of layouts", "ok", f"{found.origin}, {len(found.kernels)} kernels", remedy)


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "none", "not installed")


def _variants(dtype: str) -> Check:
    usable = isa.usable_isas(dtype)
    others = [f"{i.name} needs {', '.join(sorted(isa.missing(i)))}" for i in isa.ISAS if isa.missing(i)]
    others += [f"{i.name} is not for {dtype}" for i in isa.ISAS if dtype not in i.dtypes and not isa.missing(i)]
    return Check(f"kernels, {dtype}", "ok", "; ".join([f"{usable[0].name} is used", *others]))


def _compiler() -> Check:
    try:
        compiler = build.find_compiler()
    except KernelError as error:
        return Check("compiler", "bad", str(error), "without one, experts run on PyTorch's products")
    return Check("compiler", "ok", f"{compiler.command}: {compiler.version.partition(chr(10))[0]}")


def _ops() -> Check:
    try:
        ops.ops_library()
    except KernelError as error:
        return Check("ops in C++", "bad", str(error).partition("\n")[0], "blocks run without kernels until it compiles")
    return Check("ops in C++", "ok", "loaded")


def _cache() -> Check:
    try:
        found = build.entries()
    except KernelError as error:
        return Check("cache", "bad", str(error))
    spoiled = sum(not entry.sound for entry in found)
    text = f"{len(found)} entries, {sum(entry.bytes for entry in found) / 1e6:.1f} MB in {build.cache_directory()}"
    if not spoiled:
        return Check("cache", "ok", text)
    return Check("cache", "bad", f"{text}; {spoiled} spoiled", "samoyeds cache clear; they are compiled again")


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check("CUDA device", "none", f"torch {torch.__version__} sees none")
    names = [
        f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]
    return Check("CUDA device", "ok", "; ".join(names))


def _environment() -> Check:
    found = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIX)}
    return Check("environment", "ok" if found else "none", ", ".join(f"{n}={v}" for n, v in sorted(found.items())))


def _table(checks: list[Check]) -> Table:
    colors = {"ok": "green", "none": "dim", "bad": "red"}
    table = Table(title="samoyeds doctor", title_justify="left")
    for name in ("what", "state", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for check in checks:
        state = f"[{colors[check.state]}]{check.state}[/]"
        table.add_row(check.name, state, check.found.replace("[", r"\["), check.remedy)
    return table
