"""Random blocks of experts: as launches, and as float64."""

from dataclasses import dataclass

import torch

from samoyeds_codegen import expr
from samoyeds_codegen.cuda.block import Experts, Routing
from samoyeds_codegen.cuda.operands import Projection
from samoyeds_codegen.cuda.pattern import Pattern
from tests.codegen.cuda.weights import matrix, random_weight


@dataclass(frozen=True)
class Case:
    """A block of random weights; ``experts`` is what kernels take, the rest is dense."""

    pattern: Pattern
    activation: str = "silu(gate) * up"
    gated: bool = True
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    experts: int = 3
    hidden: int = 160
    width: int = 96
    seed: int = 0

    def dense(self) -> dict[str, torch.Tensor]:
        shapes = {"up": (self.width, self.hidden), "down": (self.hidden, self.width)}
        if self.gated:
            shapes["gate"] = shapes["up"]
        return {
            name: random_weight(self.pattern, self.experts, *shape, self.dtype, self.seed + i)[0]
            for i, (name, shape) in enumerate(shapes.items())
        }

    def packed(self) -> Experts:
        found, biases = {}, self.biases()
        for i, (name, weight) in enumerate(self.dense().items()):
            packed = random_weight(self.pattern, *weight.shape, self.dtype, self.seed + i)[1]
            found[name] = matrix(packed, biases.get(name))
        first = (found["gate"], found["up"]) if self.gated else (found["up"], None)
        up, down = Projection(self.width, self.hidden, *first), Projection(self.hidden, self.width, found["down"])
        return Experts(self.pattern, self.activation, self.gated, up, down)

    def biases(self) -> dict[str, torch.Tensor]:
        if not self.bias:
            return {}
        generator = torch.Generator().manual_seed(self.seed + 9)
        return {n: torch.randn(*w.shape[:2], generator=generator).to(self.dtype) for n, w in self.dense().items()}


def routing(ids: torch.Tensor, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Routing:
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Routing(ids, weights.to(ids.device))


def reference(case: Case, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The block in float64, but for h and y, which kernels round to their dtype."""
    dense, biases = case.dense(), case.biases()
    out = torch.zeros(x.shape, dtype=torch.float64)

    def project(name: str, expert: int, row: torch.Tensor) -> torch.Tensor:
        bias = biases[name][expert].double() if biases else 0.0
        return dense[name][expert].double() @ row.double() + bias

    for t in range(x.shape[0]):
        for k, expert in enumerate(ids[t].tolist()):
            if not 0 <= expert < case.experts:
                continue
            names = ("gate", "up") if case.gated else ("up",)
            inputs = {name if case.gated else "x": project(name, expert, x[t]) for name in names}
            h = expr.evaluate(case.activation, inputs).to(case.dtype)
            y = project("down", expert, h).to(case.dtype)
            out[t] += weights[t, k].double() * y.double()
    return out
