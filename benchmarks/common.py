"""What every benchmark shares: alternating rounds, medians, resident memory, the machine, the results file."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def alternate(arms: Mapping[str, Callable[[], Any]], seconds: float = 0.6, least: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each arm, round by round: A B C A B C ...; the order is reversed every other round."""
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    end, rounds = time.perf_counter() + seconds * len(arms), 0
    while time.perf_counter() < end or rounds < least:
        names = list(arms) if rounds % 2 == 0 else list(reversed(arms))
        for name in names:
            times[name].append(_timed(arms[name]))
        rounds += 1
    return times


def _timed(arm: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    arm()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each arm."""
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def resident(peak: bool = False) -> float:
    """MiB that the process holds, or held at most since `forget_peak`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Start the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def quieten() -> None:
    """Keep remarks of Dynamo about the source of transformers out of the output."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")


def machine() -> dict[str, Any]:
    """Where a result was taken."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    features = {word for line in lines if line.startswith("flags") for word in line.split()}
    isa = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in features]
    return f"{name or platform.processor()} ({', '.join(isa)})"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except OSError:  # a bare machine may have no git
        return ""


def save(name: str, rows: list[dict[str, Any]], where: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    return path
