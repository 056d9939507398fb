"""Random experts as kernels take them, and what they give in float64; shared by the interpreter and a GPU."""

import torch

from samoyeds_codegen import expr
from samoyeds_codegen.triton.kernel import combine, projection, work_list
from samoyeds_codegen.triton.operands import DenseSide, PackedSide
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Tile
from samoyeds_compile.ops.route import route
from samoyeds_compile.sparsity import best_mask
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import pack

NAN = float("nan")
# The interpreter cuts float32 to bfloat16 instead of rounding it, so an error is up to twice that of the dtype.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
TILE = Tile(16, 16, 16, 4, 2)
SWIGLU = "silu(gate) * up"
MLP = "gelu(x)"


def spec_of(dtype="float32", pattern=None, activation=SWIGLU):
    return ExpertsSpec(dtype, pattern, activation, "gate" in activation)


def prune(weight, pattern):
    """A weight [E, rows, cols] with the pattern, and its canonical storage."""
    config = SparsityConfig(pattern.n, pattern.m, pattern.vector, group=pattern.group)
    pruned = weight * best_mask(weight.float().abs(), config)
    return pruned, pack(pruned, config)


class Experts:
    """E experts with weights of a specification; ``dense`` are theirs, [E, rows, cols], whatever lies behind them."""

    def __init__(self, spec, experts, hidden, width, bias=False, device="cpu", seed=0):
        self.spec, self.device = spec, device
        self.generator = torch.Generator().manual_seed(seed)
        first = ("gate", "up") if spec.gated else ("up",)
        shapes = {name: (width, hidden) for name in first} | {"down": (hidden, width)}
        self.dense, self.sides, self.bias = {}, {}, {}
        for name, (rows, cols) in shapes.items():
            self.bias[name] = self.randn(experts, rows) if bias else None
            self.dense[name] = self.randn(experts, rows, cols) / cols**0.5
            self.sides[name] = self.side(name)
        self.experts, self.hidden, self.width = experts, hidden, width

    def randn(self, *shape):
        dtype = getattr(torch, self.spec.dtype)
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def side(self, name):
        weight, bias = self.dense[name], self.bias[name]
        if self.spec.pattern is None:
            return DenseSide(weight, bias)
        self.dense[name], packed = prune(weight, self.spec.pattern)
        return PackedSide(packed.values, packed.metadata, packed.selection, self.spec.pattern, weight.shape[1], 0, bias)

    def rows(self, x, ids):
        """In float64: what each (t, k) gives, before the routing weights; zero for those that belong to nobody."""
        out = torch.zeros(*ids.shape, self.hidden, dtype=torch.float64, device=self.device)
        for t, k in torch.ones(ids.shape).nonzero().tolist():
            if 0 <= int(ids[t, k]) < self.experts:
                out[t, k] = self.one(x[t].double(), int(ids[t, k]))
        return out

    def one(self, x_H, e):
        first = {name: self.linear(name, x_H, e) for name in self.dense if name != "down"}
        names = first if self.spec.gated else {"x": first["up"]}
        return self.linear("down", expr.evaluate(self.spec.activation, names), e)

    def linear(self, name, v, e):
        y = self.dense[name][e].double() @ v
        return y if self.bias[name] is None else y + self.bias[name][e].double()


def run(case, x, ids, weights, up_tile=TILE, down_tile=None):
    """The whole block by kernels whose outputs are poisoned before they run."""
    dtype, slots = getattr(torch, case.spec.dtype), ids.numel()
    plan = route(ids, case.experts)
    tiles = work_list(plan.offsets_E, slots, up_tile.slots)
    h = x.new_full((slots, case.width), NAN, dtype=dtype)
    y = x.new_full((slots, case.hidden), NAN, dtype=dtype)
    out = x.new_full((x.shape[0], case.hidden), NAN, dtype=torch.float32)
    first = {name: side for name, side in case.sides.items() if name != "down"}
    up, down = (KernelSpec(op, case.spec, tile) for op, tile in (("up", up_tile), ("down", down_tile or up_tile)))
    projection(up)(x, plan.order_S, ids.shape[1], tiles, first, h)
    projection(down)(h, plan.order_S, ids.shape[1], tiles, {"down": case.sides["down"]}, y)
    combine(y, plan.slot_TK, weights, plan.offsets_E, out)
    owned = int(plan.offsets_E[-1])
    assert h[owned:].isnan().all() and y[owned:].isnan().all(), "rows of nobody were written"
    return out


def check(case, tokens=7, top_k=2, ids=None, x=None, **tiles):
    """Compare the block with float64, relative to its largest number."""
    if ids is None:
        ids = torch.randint(-1, case.experts + 1, (tokens, top_k), generator=case.generator).to(case.device)
    x = case.randn(ids.shape[0], case.hidden) if x is None else x
    weights = torch.rand(ids.shape, generator=case.generator).to(case.device)
    found = run(case, x, ids, weights, **tiles)
    expected = (case.rows(x, ids) * weights.double().unsqueeze(-1)).sum(1)
    assert found.shape == expected.shape and found.isfinite().all()
    if found.numel():
        error = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
        assert error <= TOLERANCE[case.spec.dtype], error
        return error
    return 0.0
