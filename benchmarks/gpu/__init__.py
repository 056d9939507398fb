"""Blocks of experts on a CUDA device: this project's kernels against each other and against peers, in one run."""
