"""Compile a block with the pipeline and look at it: results with gradients, and the ops before and after."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from samoyeds_compile import Report
from samoyeds_compile.backend import optimize
from samoyeds_compile.base import compile_with_base
from samoyeds_compile.graph.values import graph_modules
from samoyeds_compile.options import Options

PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm", "grouped_mm", "zoo::gmm"}
"""Ops that multiply matrices."""
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (5e-2, 3e-2)}


@dataclass
class Seen:
    """What went through the backend: one entry a graph."""

    before: list[Counter[str]] = field(default_factory=list)
    after: list[Counter[str]] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def backend(self, base: str = "aot_eager", **options: Any) -> Callable[..., Any]:
        """``samoyeds`` with a look at the graph before and after the rewrite."""
        chosen = Options.from_call(options={"base": base, **options})

        def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            self.before.append(count_ops(gm))
            self.report(optimize(gm, example_inputs, chosen))
            self.after.append(count_ops(gm))
            return compile_with_base(gm, example_inputs, chosen)

        return compile_graph


def count_ops(gm: fx.GraphModule) -> Counter[str]:
    """Calls by name, nested graphs included; ``namespace::name`` for what is not torch's own."""
    nodes = (node for module in graph_modules(gm) for node in module.graph.nodes)
    return Counter(_name(node) for node in nodes if node.op in ("call_function", "call_method"))


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else target.name()
        return str(name).removeprefix("aten::").split(".")[0]
    return target if isinstance(target, str) else target.__name__


def products(ops: Counter[str]) -> int:
    return sum(n for name, n in ops.items() if name in PRODUCTS)


def ours(ops: Counter[str]) -> int:
    return sum(n for name, n in ops.items() if name.startswith("samoyeds::"))


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def run(forward: Callable[..., Any], module: nn.Module, x: Tensor, train: bool) -> dict[str, Tensor]:
    """Outputs, buffers, and with ``train`` all gradients, by name."""
    if not train:
        with torch.no_grad():
            found = {f"output {i}": t for i, t in enumerate(outputs(forward(x)))}
        return found | {f"buffer {name}": t.clone() for name, t in module.named_buffers()}
    x = x.clone().requires_grad_()
    results = outputs(forward(x))
    loss = sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in results)
    leaves = {"input": x, **dict(module.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    found = {f"output {i}": t.detach() for i, t in enumerate(results)}
    found |= {f"buffer {name}": t.clone() for name, t in module.named_buffers()}
    none = torch.zeros(())
    return found | {f"gradient of {name}": none if g is None else g for name, g in zip(leaves, grads, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: tuple[float, float]) -> None:
    """Equal up to rounding, which is as large as the largest of all values: small gradients are differences."""
    rtol, atol = tolerance
    assert actual.keys() == expected.keys()
    scale = max([1.0, *(float(value.abs().max()) for value in expected.values() if value.numel())])
    for name, value in expected.items():
        close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol * scale)
        close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")


def compare(
    module: nn.Module, x: Tensor, train: bool = True, base: str = "aot_eager", dynamic: bool | None = None,
    tolerance: tuple[float, float] = TOLERANCE[torch.float32], **options: Any,
) -> Seen:  # fmt: skip
    """Compile and compare with eager, which runs on a copy, so that buffers are compared as well."""
    seen, original = Seen(), copy.deepcopy(module)
    forward = torch.compile(module, backend=seen.backend(base, **options), dynamic=dynamic)
    assert_same(run(forward, module, x, train), run(original, original, x, train), tolerance)
    assert [g.problem for g in seen.report.graphs if g.problem] == []
    return seen
