"""The block benchmark on a CUDA device: ``python -m benchmarks.gpu``; says so and stops where there is none.

``python -m benchmarks.gpu --compile-only`` needs no device: it compiles every CUDA kernel for every target and prints
what machine code came out. ``--json FILE`` keeps that, ``--page`` writes it into docs/gpu_cuda.md.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import block, cubins


def compile_only() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu --compile-only")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    cubins.main(options.json, options.page)


if __name__ == "__main__":
    if "--compile-only" in sys.argv:
        compile_only()
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device here; nothing measured")
    else:
        sys.argv += ["--device", "cuda", "--name", "gpu"]
        block.main()
