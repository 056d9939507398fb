"""What is on the page, in order: which files, what they compare, how to repeat them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.page import tables
from benchmarks.page.table import Content, Table


@dataclass(frozen=True)
class Section:
    """One benchmark.

    Attributes:
        files: a regular expression of names in benchmarks/results; a part that begins with ``_`` may follow.
        command: repeats it; ``{tokens}``, ``{stem}``, ``{implementation}`` are taken from a file.
        older: by commit, what has changed since a file was made, so that its figures are no longer today's.
    """

    title: str
    files: str
    text: str
    command: str
    tables: Callable[[Content], Iterator[Table]]
    older: Mapping[str, str] = field(default_factory=dict)


SECTIONS = (
    Section(
        "Blocks on a CPU", "cpu(?!_peak)",
        "Whole blocks of transformers with their router, compiled by `torch.compile`, in inference, against the "
        "dense block compiled by Inductor, and against the fastest of `torch.mm`, oneDNN and MKL, which only "
        "multiply (no router, gather, activation or sum). The last-level cache is flushed before each call. Pruned "
        "experts compute less, so their ratios compare no equal models: see [quality](#quality). More in [kernels "
        "on a CPU](cpu.md).",
        "python -m benchmarks.cpu --tokens {tokens} --json benchmarks/results/{stem}.json", tables.cpu,
    ),
    Section(
        "Memory of a call on a CPU", "cpu_peak",
        "What a compiled block takes at its peak beyond what was held before it.",
        "python -m benchmarks.cpu.peak", tables.cpu_peak,
    ),
    Section(
        "Layouts", "layout",
        "Rows laid out [as costs say](layouts.md), against one order on every edge and against the dearest choice. "
        "All three give the same numbers. At few tokens the first two do the same; what is left there is the spread"
        " of the measurement.",
        "python -m benchmarks.layout", tables.layout,
    ),
    Section(
        "Training", "training",
        "A step of training, forward and backward, without the optimizer: Samoyeds against Inductor. `masked` are "
        "the masked weights of sparse training, whose products are dense in both arms. Times are medians over "
        "steps (over rounds, in files without `of means`); `of means` is the ratio of the means, in which steps count "
        "that touched memory which the machine had given back to its host. More in [training](training.md).",
        "python -m benchmarks.training --tokens {tokens} --json benchmarks/results/{stem}.json", tables.training,
    ),
    Section(
        "Whole models in generate", "generate",
        "`generate` of transformers, greedy, bf16, a batch of one; random weights and two layers, but for "
        "`small_lm`, which is trained. The blocks' share of Inductor's time bounds what is to be gained: `possible`"
        " is the ratio if they took no time at all.",
        "python -m benchmarks.generate", tables.generate,
        {"8c4be9a": "packed weights did not lie in strips yet"},
    ),
    Section(
        "Memory of packed weights", "memory",
        "What the process holds before and after `sparsify_` of a Mixtral in bf16, and the peak in between. A peak "
        "above one stack of experts, the largest, is in bold.",
        "python -m benchmarks.memory", tables.memory,
    ),
    Section(
        "Quality", "quality",
        "What pruning costs: perplexity on held-out text above that of the dense model, for small models trained "
        "here. `VENOM` and `unstructured` are patterns of others. Small numbers are better. More in [sparse "
        "experts](sparsity.md); the [whole table](../benchmarks/results/quality.md) has perplexities too.",
        "python -m benchmarks.quality", tables.quality,
    ),
    Section(
        "Compile time", "compile_time",
        "The first call of a model with 64 experts a layer, in a fresh process with every cache off.",
        "python -m benchmarks.compile_time", tables.compile_time,
    ),
    Section(
        "The dump folder", "dump",
        "What [the dump folder](inspect.md) adds to compile time; `off` runs twice, so that the spread is seen.",
        "python -m benchmarks.dump", tables.dump,
    ),
    Section(
        "Matching", "matching",
        "Our own steps, reading the graph and matching, for loops over separate experts that Dynamo unrolled.",
        "python -m benchmarks.matching", tables.matching,
    ),
    Section(
        "Blocks by implementation", "block",
        "The implementations of experts that transformers offers, dense and lossless, in inference; caches are not "
        "flushed.",
        "python -m benchmarks.block --implementation {implementation} --name {stem}", tables.block,
        dict.fromkeys(("d343de4", "f617f5d"), "there were no kernels for dense experts yet"),
    ),
    Section(
        "GPUs", "gpu-.*",
        "Blocks of experts on a CUDA device against dense peers; see [measuring on a GPU](gpu_benchmark.md).",
        "python -m benchmarks.gpu", tables.gpu,
    ),
)  # fmt: skip
