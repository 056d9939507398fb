"""From an output of the graph to an `MoERegion`: ``out[t] = base[t] + sum over k of w[t, k] * F_ids[t, k](x[t])``."""

from __future__ import annotations

import math

import torch

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.notation.assemble import linears
from samoyeds_compile.match.notation.branch import Branch, BranchReader
from samoyeds_compile.match.notation.choices import Choice, choices_of
from samoyeds_compile.match.notation.contributions import UNINITIALISED, Contribution, Contributions
from samoyeds_compile.match.notation.experts import ExpertFunction
from samoyeds_compile.match.notation.index import flatten, size_of, sizes_of
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.operands import Operands
from samoyeds_compile.match.notation.products import Products
from samoyeds_compile.match.notation.projections import Projection
from samoyeds_compile.match.notation.segments import names_once
from samoyeds_compile.match.region import Decline, Derived, Linear, MoERegion, Operand, require


class Block:
    """Reads one output.

    Attributes:
        reached: how far the last reading got, to tell near-misses from accidents.

    Raises:
        Decline: the output is not the weighted sum of experts over the slots of each token.
    """

    def __init__(self, graph: ValueGraph, notation: Notation, products: Products, output: Value) -> None:
        self.graph, self.notation, self.products, self.output = graph, notation, products, output
        self.index = notation.index_of(output)
        self.sizes = sizes_of(output)
        self.tokens = flatten(self.index[:-1], self.sizes[:-1])
        self.count = math.prod(self.sizes[:-1])
        self.reached = 0

    def region(self) -> MoERegion:
        """The region that ends in the output, members excepted."""
        found = Contributions(self.notation, self.products, self.output, self.index)
        require(found.experts, "the output is not the sum of products with expert weights", self.output)
        self.reached = 1
        branches, others = self._branches(found.experts)
        self.reached = 3
        choices = choices_of(branches, self.notation)
        base = self._base([*found.bases, *others])
        return self._assembled(choices, base)

    def _branches(self, contributions: list[Contribution]) -> tuple[list[Branch], list[Contribution]]:
        """The experts' contributions, and those of products that are none (a shared expert), which make up a base."""
        reader = BranchReader(self.notation, self.products, self.index, self.sizes, self.tokens, self.count)
        branches: list[Branch] = []
        declined: list[tuple[Contribution, Decline]] = []
        origins = set()
        for contribution in contributions:
            try:
                branches += reader.read(contribution)
                origins.add(contribution.origin)
            except Decline as decline:
                declined.append((contribution, decline))
            self.reached = 2 if reader.looks_like_a_block else self.reached
        for contribution, reason in declined:
            if not branches or contribution.origin is None or contribution.origin in origins:
                raise reason
        return branches, [c for c, _ in declined]

    def _base(self, bases: list[Contribution]) -> Value | None:
        """What the experts' contributions are added to."""
        found = []
        for item in bases:
            if item.value.op in UNINITIALISED:
                continue  # every row is written
            require(item.origin is not None, f"the output depends on {item.value.op} in a way that is not known",
                    item.value)  # fmt: skip
            found.append(item.origin)
        bases_found = list(dict.fromkeys(found))
        require(len(bases_found) <= 1, "the experts' contributions are added to more than one tensor", self.output)
        if not bases_found:
            return None
        base = bases_found[0]
        assert base is not None
        same = [size_of(s) for s in base.shape] == list(self.sizes)
        require(same, "the experts' contributions are added to a tensor of another shape", base)
        return base

    # ------------------------------------------------------------------------------- region

    def _assembled(self, choices: list[Choice], base: Value | None) -> MoERegion:
        first = choices[0][0]
        function = first.function
        gate, up, down = linears([(b.expert, b.function) for b in choices[0]])
        require(down.out_features == up.in_features, "the experts change the width of the rows", down.weights[0])
        self._require_shape(function)
        operands = [Operands(c[0], self.tokens, self.count, down.num_experts) for c in choices]
        for choice in choices:
            once = not choice[0].distinct or names_once(choice[0].element.value)
            require(once, "the expert ids of a token are not known to differ", choice[0].element.value)
        weighting, weights = self._weights(operands)
        computed = dict.fromkeys(v for o in operands for v in o.computed())
        return MoERegion(
            family=self._style(first), graph=self.graph, x=self._tokens(function),
            expert_ids=_joined([o.ids() for o in operands]), expert_weights=self._precise(weights, choices, down),
            top_k=sum(o.top_k for o in operands), up=up, down=down, gate=gate, activation=function.activation,
            gate_up_layout=function.layout, output=self.output, weighting=weighting, base=base,
            computed=tuple(computed), flags=tuple(dict.fromkeys(v for o in operands for v in o.flags())),
            capacity=first.places if isinstance(first.places, int) else None,
        )  # fmt: skip

    def _weights(self, operands: list[Operands]) -> tuple[str, Operand | None]:
        """(where rows are weighted, the routing weights [T, K] or None if all are 1)."""
        before = [o for o in operands if o.branch.input_weight != 1.0]
        after = [o for o in operands if o.branch.weight != 1.0]
        at = operands[0].branch.function.down.product
        require(not (before and after), "the rows are weighted before the experts and after them", at)
        if not before and not after:
            return "output", None
        terms = [o.branch.input_weight if before else o.branch.weight for o in operands]
        return "input" if before else "output", _joined([o.filled(t) for o, t in zip(operands, terms, strict=True)])

    def _require_shape(self, function: ExpertFunction) -> None:
        """The rewrite can give its rows [T, H] the shape of the output."""
        alike = sizes_of(function.x[0])[:-1] == self.sizes[:-1]
        known = len(self.sizes) == 2 or alike or sum(not isinstance(n, int) for n in self.sizes) <= 1
        require(known, "the output has a shape that neither the tokens have nor is known", self.output)

    def _precise(self, weights: Operand | None, choices: list[Choice], down: Linear) -> Operand | None:
        """Routing weights in the widest dtype in which the original weighs and sums."""
        widest = down.compute_dtype
        for dtype in {d for choice in choices for d in choice[0].dtypes}:
            widest = torch.promote_types(widest, dtype)
        if weights is None or widest == down.compute_dtype:
            return weights
        if isinstance(weights, Value) and weights.dtype == widest:
            return weights
        return Derived(torch.Tensor.to, (weights, widest))

    def _style(self, branch: Branch) -> str:
        if branch.conditions:
            return "capacity"
        if branch.expert is not None:
            return "unrolled"
        down = branch.function.down
        if down.product.op in self.products.grouped:
            return "grouped"
        return self._gathered_or_dense(down)

    def _gathered_or_dense(self, down: Projection) -> str:
        """Whether the product has one weight a slot or multiplies every token with every expert."""
        shape = sizes_of(down.product)
        return "dense" if any(n == sizes_of(down.weight.value)[0] for n in shape[:-1]) else "gathered"

    def _tokens(self, function: ExpertFunction) -> Operand:
        value = function.x[0]
        return value if len(value.shape) == 2 else Derived(torch.flatten, (value, 0, -2))


def _joined(tables: list[Operand]) -> Operand:
    """Tables [T, k] side by side."""
    return tables[0] if len(tables) == 1 else Derived(torch.cat, (tuple(tables), 1))
