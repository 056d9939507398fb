"""The tables of each benchmark, from the content of its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.page.table import Content, Row, Table, bold, by_tokens, listed, ratio

DENSE = "dense"
OURS = "samoyeds "


def cpu(content: Content) -> Iterator[Table]:
    """Against Inductor and against the best library, lossless and sparse, for each number of threads."""
    found = list(_arms(content["rows"]))
    for threads in sorted({row["threads"] for row in found}):
        for peer, name in (("inductor", "Inductor"), ("best dense", "Best library of products")):
            of_peer = [row for row in found if row["threads"] == threads and peer in row["ratio"]]
            for arms, what in ((True, "dense experts (lossless)"), (False, "sparse experts (less is computed)")):
                rows = [row for row in of_peer if (row["arm"] == DENSE) is arms]
                caption = f"{name} over Samoyeds, {what}, {_threads(threads)}"
                if rows:
                    yield by_tokens(caption, rows, ("shape", "dtype", "arm"), lambda r, peer=peer: r["ratio"][peer])


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _arms(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        for arm, ratios in row["ratio"].items():
            quiet = row["rounds"]["quiet"]
            yield {**row, "arm": arm.removeprefix(OURS), "ratio": ratios, "quiet": quiet}


def cpu_peak(content: Content) -> Iterator[Table]:
    """Memory of a call, and the bound."""
    yield listed("MiB that a call takes at its peak, and the bound that it is to keep", content["rows"], {
        "shape": lambda r: r["shape"], "dtype": lambda r: r["dtype"], "experts": lambda r: r["pattern"],
        "tokens": lambda r: f"{r['tokens']:,}", "peak": lambda r: f"{r['peak_mib']:.1f}",
        "bound": lambda r: f"{r['bound_mib']:.1f}", "kept": lambda r: "yes" if r["holds"] else "**no**",
    })  # fmt: skip


def layout(content: Content) -> Iterator[Table]:
    """Off and worst over on; thresholds; planning."""
    keys, rows = ("model", "dtype", "pattern"), content["points"]
    for arm, name in (("off", "Token-major rows on every edge"), ("worst", "The dearest choice")):
        caption = f"{name} over layouts by cost, {_threads(content['threads'])}"
        yield by_tokens(caption, rows, keys, lambda r, arm=arm: r["ratios"][f"{arm}/on"])
    yield listed("Number of tokens from which tiles are faster, solved from default constants and measured",
                 content["crossings"], {
        **{key: lambda r, key=key: r[key] for key in keys},
        "solved": lambda r: str(r["solved"]), "measured": lambda r: str(r["measured"]),
    })  # fmt: skip
    planning = [{"blocks": name, **times} for name, times in content["planning"].items()]
    counts = [key for key in planning[0] if key != "blocks"]
    yield listed("Milliseconds that planning takes, by number of layers", planning, {
        "blocks": lambda r: r["blocks"], **{count: lambda r, count=count: f"{r[count]:.0f}" for count in counts},
    })  # fmt: skip


def training(content: Content) -> Iterator[Table]:
    """Time and memory of a step."""
    rows = content["rows"]
    table = listed("Inductor over Samoyeds, time and peak memory of a step", rows, {
        "model": lambda r: r["model"], "dtype": lambda r: r["dtype"], "weights": lambda r: r["weights"],
        "tokens": lambda r: str(r["tokens"]), "layers": lambda r: str(r["layers"]),
        "Inductor, ms": lambda r: f"{r['ms']['inductor']:.1f}", "Samoyeds, ms": lambda r: f"{r['ms']['samoyeds']:.1f}",
        "time": lambda r: ratio(r["ratio"], r["rounds"]["quiet"]),
        "of means": lambda r: ratio(r["mean_ratio"]) if "mean_ratio" in r else "-",
        "peak memory": lambda r: ratio(r["memory_ratio"]),
    })  # fmt: skip
    counted = ("ratio", "mean_ratio", "memory_ratio")
    yield Table(table.caption, table.header, table.lines, [row[key] for row in rows for key in counted if key in row])


def generate(content: Content) -> Iterator[Table]:
    """Rates of whole models, what they are against Inductor, and what could be gained at most."""
    rows = content["rows"]
    arms = list(dict.fromkeys(arm for row in rows for arm in row["tokens_per_second"]))
    yield listed("Tokens per second", rows, {
        "model": lambda r: r["model"], "parameters": lambda r: f"{r['parameters'] / 1e6:.1f} M",
        **{arm: lambda r, arm=arm: f"{r['tokens_per_second'][arm]:.0f}" for arm in arms},
    })  # fmt: skip
    ours = [arm for arm in arms if arm.startswith(OURS)]
    table = listed("Inductor, dense, over Samoyeds", rows, {
        "model": lambda r: r["model"],
        **{arm.removeprefix(OURS): lambda r, a=arm: ratio(r["ratio"][a]["inductor"], r["rounds"]["quiet"])
           for arm in ours},
        "share of blocks": lambda r: f"{r['moe_share_of_inductor']:.0%}",
        "possible": lambda r: f"{r['most_possible']:.2f}",
    })  # fmt: skip
    yield Table(table.caption, table.header, table.lines, [r["ratio"][arm]["inductor"] for r in rows for arm in ours])


def memory(content: Content) -> Iterator[Table]:
    """What is held before and after, and the peak."""
    extras = ("refine", "permute")
    yield listed("Resident memory in MiB; the share is that of packed weights by dense ones", content["rows"], {
        "pattern": lambda r: r["config"], "layers": lambda r: str(r["layers"]),
        "method": lambda r: ", ".join([r["method"], *(key for key in extras if r.get(key))]),
        "model": lambda r: f"{r['model_mib']:.0f}", "after": lambda r: f"{r['after_mib']:.0f}",
        "share of experts": lambda r: f"{r['packed_share']:.1%}",
        "peak above the model": lambda r: f"{r['peak_above_model_mib']:.0f}",
        "in largest stacks": lambda r: bold(f"{r['peak_above_model_stacks']:.2f}", r["peak_above_model_stacks"] > 1),
    })  # fmt: skip


def quality(content: Content) -> Iterator[Table]:
    """One-shot by method; then what was reconstructed or trained."""
    once = [row for row in content["rows"] if row["when"] == "one-shot" and row["pattern"] != DENSE]
    methods = list(dict.fromkeys(row["method"] for row in once))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in once:
        name = (row["pattern"], "yes" if row["permute"] else "")
        lines.setdefault(name, {})[row["method"]] = f"{row['mean_percent']:+,.1f}"
    cells = [[*name, *(line.get(method, "-") for method in methods)] for name, line in lines.items()]
    yield Table("One-shot: perplexity above dense in %, mean of seeds", ["pattern", "permuted", *methods], cells)
    after = [row for row in content["rows"] if row["when"] != "one-shot" and row["pattern"] != DENSE]
    yield listed("After reconstruction or training: perplexity above dense in % after the same extra steps", after, {
        "when": lambda r: r["when"], "pattern": lambda r: r["pattern"], "method": _method,
        "mean": lambda r: f"{r['mean_percent']:+.1f}",
        "seeds": lambda r: f"{min(r['above_dense_percent']):+.1f} to {max(r['above_dense_percent']):+.1f}",
    })  # fmt: skip


def _method(row: Row) -> str:
    extras = [key for key in ("permute", "distill") if row[key]] + ["SR-STE"] * (row["training"] == "sr_ste")
    return ", ".join([row["method"], *extras])


def compile_time(content: Content) -> Iterator[Table]:
    """Seconds of the first call."""
    rows = content["rows"]
    table = listed("Inductor over Samoyeds, seconds of the first call", rows, {
        "layers": lambda r: str(r["layers"]), "for": lambda r: "training" if r["train"] else "inference",
        "Inductor": lambda r: f"{r['seconds']['inductor']:.1f}",
        "Samoyeds": lambda r: f"{r['seconds']['samoyeds']:.1f}",
        "ratio": lambda r: ratio(1 / r["samoyeds/inductor"]), "our passes, ms": lambda r: f"{r['pipeline_ms']:.0f}",
    })  # fmt: skip
    yield Table(table.caption, table.header, table.lines, [1 / row["samoyeds/inductor"] for row in rows])


def matching(content: Content) -> Iterator[Table]:
    """Time by size of the graph."""
    yield listed("Reading and matching; microseconds a node are of the processor", content["rows"], {
        "experts": lambda r: str(r["experts"]), "layers": lambda r: str(r["layers"]), "graph": lambda r: r["graph"],
        "nodes": lambda r: f"{r['nodes']:,}", "elapsed, s": lambda r: f"{r['total_s']:.2f}",
        "processor, s": lambda r: f"{r['cpu_s']:.2f}", "µs a node": lambda r: f"{r['cpu_us_per_node']:.0f}",
    })  # fmt: skip


def block(content: Content) -> Iterator[Table]:
    """Against Inductor and eager mode."""
    for peer, name in (("inductor", "Inductor"), ("eager", "Eager mode")):
        keys = ("shape", "dtype", "implementation")
        caption = f"{name} over Samoyeds"
        yield by_tokens(caption, content["rows"], keys, lambda r, peer=peer: r[f"{peer}/samoyeds"])


def gpu(content: Content) -> Iterator[Table]:
    """All arms of all points."""
    yield listed("Milliseconds, and the best dense peer that computes the whole block over each", content["rows"], {
        "shape": lambda r: r["shape"], "tokens": lambda r: f"{r['tokens']:,}", "name": lambda r: r["name"],
        "work": lambda r: r["work"], "ms": lambda r: f"{r['ms']:.4f}",
        "ratio": lambda r: "-" if r["ratio"] is None else ratio(r["ratio"]),
    })  # fmt: skip


def dump(content: Content) -> Iterator[Table]:
    """Seconds with and without a dump folder."""
    yield listed("Seconds of the first call", content["rows"], {
        "layers": lambda r: str(r["layers"]), **{arm: lambda r, arm=arm: f"{r['seconds'][arm]:.1f}"
                                                 for arm in content["rows"][0]["seconds"]},
        "on / off": lambda r: f"{r['on/off']:.2f}", "off again / off": lambda r: f"{r['off again/off']:.2f}",
        "MB written": lambda r: f"{r['dump_bytes'] / 1e6:.1f}",
    })  # fmt: skip
