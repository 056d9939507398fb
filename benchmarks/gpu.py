"""The block benchmark on a CUDA device: ``python -m benchmarks.gpu``; says so and stops where there is none."""

import sys

import torch

from benchmarks import block

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; nothing measured")
    sys.argv += ["--device", "cuda", "--name", "gpu"]
    block.main()
