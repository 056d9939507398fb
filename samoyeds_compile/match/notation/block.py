"""From an output of the graph to an `MoERegion`: ``out[t] = base[t] + sum over k of w[t, k] * F_ids[t, k](x[t])``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.notation.assemble import linears
from samoyeds_compile.match.notation.batched import require_alike
from samoyeds_compile.match.notation.contributions import (
    UNINITIALISED,
    Condition,
    Contribution,
    Contributions,
    Equal,
)
from samoyeds_compile.match.notation.experts import ExpertFunction, ExpertReader, Projection, token_row
from samoyeds_compile.match.notation.index import (
    Element,
    Index,
    Size,
    Var,
    atoms,
    flatten,
    size_of,
    sizes_of,
    substitute,
)
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Products
from samoyeds_compile.match.notation.scores import (
    Call,
    Chosen,
    Leaf,
    Score,
    Scores,
    combine,
    negated,
    substitute_score,
)
from samoyeds_compile.match.region import Decline, Derived, Linear, MoERegion, Operand, require


@dataclass(frozen=True)
class Branch:
    """One contribution, fully read: expert ``number`` (or the one that ``ids`` names), its function, its weight."""

    ids: Index
    expert: int | None
    function: ExpertFunction
    weight: Any
    input_weight: Any
    slot: Index
    distinct: bool
    dtypes: frozenset[torch.dtype]


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
        self.feature = self.index[-1]
        self.reached = 0

    def region(self) -> MoERegion:
        """The region that ends in the output, members excepted."""
        found = Contributions(self.notation, self.products, self.output, self.index)
        require(found.experts, "the output is not the sum of products with expert weights", self.output)
        self.reached = 1
        branches, others = self._branches(found.experts)
        self.reached = 3
        branches = self._over_slots(branches)
        first = branches[0]
        self._require_alike(branches)
        base = self._base([*found.bases, *others])
        ids = self._ids(branches)
        if first.distinct:
            require(is_distinct(first.ids.atom), "the expert ids of a token are not known to differ", ids[1])
        return self._assembled(branches, ids, base)

    def _branches(self, contributions: list[Contribution]) -> tuple[list[Branch], list[Contribution]]:
        """The experts' contributions, and those of products that are none (a shared expert), which make up a base."""
        branches: list[Branch] = []
        declined: list[tuple[Contribution, Decline]] = []
        origins = set()
        for contribution in contributions:
            try:
                branches.append(self._branch(contribution))
                origins.add(contribution.origin)
            except Decline as decline:
                declined.append((contribution, decline))
        for contribution, reason in declined:
            if not branches or contribution.origin is None or contribution.origin in origins:
                raise reason
        return branches, [c for c, _ in declined]

    # ------------------------------------------------------------------------------- one contribution

    def _branch(self, contribution: Contribution) -> Branch:
        hidden = self.sizes[-1]
        self._require_no_rounding(contribution)
        reader = ExpertReader(self.notation, self.products, contribution, self.feature, self.sizes[:-1])
        if contribution.conditions:
            self.reached = 2
        function = reader.read(token_row(self.tokens, self.count, hidden))
        if function.expert is not None:
            self.reached = 2
        expert = function.expert
        experts = [expert] if expert is not None and isinstance(expert.atom, Var) else []
        slots = [b for b in contribution.bound if b not in experts]
        scores = Scores(self.notation, self.index[:-1], slots, experts)
        weight = self._product([self._condition(scores, c) for c in contribution.conditions], contribution)
        weight = self._times(weight, [scores.of(*f) for f in contribution.factors], contribution)
        scaled = self._times(Score(1.0), [scores.of(*f) for f in function.inputs], contribution)
        if weight.chosen is not None:
            self.reached = 2
        weight, scaled = self._outside(weight, scaled, function, contribution)
        return self._named(contribution, function, weight, scaled)

    def _require_no_rounding(self, contribution: Contribution) -> None:
        """Rows are summed in the dtype of the products or a wider one."""
        own = contribution.value.dtype
        assert own is not None
        for dtype in contribution.dtypes:
            wide = torch.promote_types(dtype, own) == dtype
            require(wide, f"rows are rounded to {dtype} on the way to the output", contribution.value)

    def _condition(self, scores: Scores, condition: Condition) -> Score | None:
        if isinstance(condition, Equal):
            for ids, expert in ((condition.left, condition.right), (condition.right, condition.left)):
                if isinstance(ids.atom, Element):
                    return Score(1.0, Chosen(ids, expert))
            return None
        found = scores.of(condition.value, condition.index)
        if found is None or found.chosen is None or {found.term, found.other} != {0.0, 1.0}:
            return None
        return found if condition.wanted else negated(found)

    def _product(self, conditions: Sequence[Score | None], contribution: Contribution) -> Score:
        """All conditions as one; those that exclude other experts say nothing new."""
        require(None not in conditions, "a mask does not say which expert a token goes to", contribution.value)
        known = [c for c in conditions if c is not None]
        positive = [c for c in known if c.term == 1.0]
        total = self._times(Score(1.0), positive, contribution)
        for excluded in (c for c in known if c.term == 0.0):
            assert excluded.chosen is not None
            differs = total.chosen is not None and _differ(total.chosen, excluded.chosen)
            require(differs, "a mask excludes an expert that it should not", contribution.value)
        return total

    def _times(self, total: Score, factors: Sequence[Score | None], contribution: Contribution) -> Score:
        for factor in factors:
            combined = combine(torch.mul, total, factor)
            require(combined is not None, "a factor of the experts' rows is no routing weight", contribution.value)
            assert combined is not None
            total = combined
        return total

    def _outside(
        self, weight: Score, scaled: Score, function: ExpertFunction, contribution: Contribution
    ) -> tuple[Score, Score]:
        """A scale on the way in that is 0 for experts not chosen leaves them out, if 0 goes to 0."""
        if scaled.chosen is None:
            return weight, scaled
        zero = scaled.other == 0.0 and not any(p.bias for p in function.projections) and maps_zero_to_zero(function)
        require(zero, "experts that are not chosen still contribute, as 0 does not go to 0 in them", contribution.value)
        return self._times(weight, [replace(scaled, term=1.0)], contribution), replace(scaled, chosen=None)

    def _named(self, contribution: Contribution, function: ExpertFunction, weight: Score, scaled: Score) -> Branch:
        """The branch with its expert: a number, or the entry of the ids."""
        expert, chosen = function.expert, weight.chosen
        number = chosen.expert.number if chosen is not None else None
        if number is None:
            one = set(function.experts) == {expert}
            require(one, "the projections of a row belong to different experts", contribution.value)
        require(chosen is None or weight.other == 0.0, "experts that are not chosen contribute", contribution.value)
        if chosen is None:
            require(expert is not None and isinstance(expert.atom, Element),
                    "nothing says which tokens an expert is for", contribution.value)  # fmt: skip
            assert expert is not None
            return self._branch_of(contribution, function, weight, scaled, expert, None, None)
        if expert is not None and isinstance(expert.atom, Var):
            require(chosen.expert == expert, "the weights are those of another expert", contribution.value)
            return self._branch_of(contribution, function, weight, scaled, chosen.ids, None, expert)
        require(number is not None, "the expert of a row is not known", contribution.value)
        own = all(e is None or e.number == number for e in function.experts)
        require(own, "the weights are those of another expert", contribution.value)
        return self._branch_of(contribution, function, weight, scaled, chosen.ids, number, None)

    def _branch_of(
        self, c: Contribution, function: ExpertFunction, weight: Score, scaled: Score, ids: Index,
        number: int | None, expert: Index | None,
    ) -> Branch:  # fmt: skip
        element = ids.atom
        assert isinstance(element, Element)
        own = {a for i in self.index for a in atoms(i)}
        slots = [a for i in element.index for a in atoms(i) if isinstance(a, Var) and a not in own]
        require(len(set(slots)) <= 1, "the expert ids are no table [T, K]", element.value)
        slot = Index(0, frozenset(((slots[0], 1),))) if slots else Index()
        free = [b for b in c.bound if b not in (slot, expert)]
        require(not free, "a sum runs over something other than slots and experts", c.value)
        by_expert: dict[Any, Index] = {}
        if expert is not None:
            by_expert[expert.atom] = ids
        terms = [substitute_score(replace(s, chosen=None), by_expert.get).term for s in (weight, scaled)]
        if c.scale != 1.0:
            terms[0] = Call(torch.mul, (terms[0], c.scale)) if terms[0] != 1.0 else c.scale
        if function.scale != 1.0:
            terms[1] = Call(torch.mul, (terms[1], function.scale)) if terms[1] != 1.0 else function.scale
        distinct = c.distinct or weight.distinct or scaled.distinct
        return Branch(ids, number, function, terms[0], terms[1], slot, distinct, c.dtypes)

    # ------------------------------------------------------------------------------- all of them

    def _over_slots(self, branches: list[Branch]) -> list[Branch]:
        """Branches of single slots, one for each of 0 .. K-1, as one over all slots."""
        numbers = [_slot_number(b) for b in branches]
        if None in numbers:
            return branches
        first = branches[0].ids.atom
        assert isinstance(first, Element)
        top_k = sizes_of(first.value)[-1]
        slot = self.notation.variables.new(top_k)
        by_expert: dict[int | None, list[Branch]] = {}
        for branch, number in zip(branches, numbers, strict=True):
            by_expert.setdefault(branch.expert, []).append(_generalised(branch, number, top_k, slot))
        for alike in by_expert.values():
            every = len(alike) == top_k and set(numbers) == set(range(top_k))
            require(every, "not every slot of a token goes to an expert", alike[0].function.down.product)
            for other in alike[1:]:
                self._require_same(alike[0], other)
        return [alike[0] for alike in by_expert.values()]

    def _require_alike(self, branches: list[Branch]) -> None:
        """One branch for all experts, or one for each of 0 .. E-1, with the same function."""
        first = branches[0]
        if first.expert is None:
            require(
                len(branches) == 1, "several sums over experts end in one output", branches[-1].function.down.product
            )
            return
        numbers = [b.expert for b in branches]
        at = first.function.down.product
        require(None not in numbers, "some experts are unrolled and others are not", at)
        missing = sorted(set(range(self._count_experts(branches))) - {n for n in numbers if n is not None})
        require(not missing, f"no tokens go to expert {missing[:1]}" if missing else "", at)
        require(len(set(numbers)) == len(numbers), "an expert is used twice", at)
        for branch in branches[1:]:
            self._require_same(first, branch)

    def _count_experts(self, branches: list[Branch]) -> Size:
        """E: the size of the stack, or how many the router chooses from; at least all up to the highest one used."""
        stacked = branches[0].function.down.weight
        if stacked.expert is not None:
            return sizes_of(stacked.value)[0]
        highest = max(b.expert or 0 for b in branches) + 1
        return max(highest, len(branches), _choices(branches[0].ids.atom) or 0)

    def _require_same(self, first: Branch, other: Branch) -> None:
        a, b = first.function, other.function
        at = b.down.product
        require_alike(a, b)
        require(a.x[0] is b.x[0], "experts have different inputs", at)
        renamed = _slot_renaming(other, first)
        require(renamed is not None, "experts are chosen by different ids", at)
        assert renamed is not None
        for mine, theirs in ((first.weight, other.weight), (first.input_weight, other.input_weight)):
            wanted = _at_expert(mine, first)
            given = substitute_score(Score(_at_expert(theirs, other)), renamed).term
            require(wanted == given, "experts have different routing weights", at)

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

    # ------------------------------------------------------------------------------- operands

    def _ids(self, branches: list[Branch]) -> tuple[Operand, Value, int]:
        """(ids [T, K], the value behind them, K)."""
        branch = branches[0]
        element = branch.ids.atom
        assert isinstance(element, Element)
        top_k = branch.slot.atom.size if isinstance(branch.slot.atom, Var) else 1
        require(isinstance(top_k, int), "the number of experts a token goes to is not static", element.value)
        table = self._table(element.value, element.index, branch.slot, top_k)
        require(table is not None, "the expert ids are no table [T, K]", element.value)
        assert table is not None
        return table, element.value, top_k

    def _table(self, value: Value, index: tuple[Index, ...], slot: Index, top_k: int) -> Operand | None:
        """The tensor [T, K] (or [T, 1]) whose entry at (t, k) is ``value[index]``."""
        sizes = sizes_of(value)
        position = flatten(index, sizes)
        wanted = {"rows": flatten((self.tokens, slot), (self.count, top_k)), "once": self.tokens}
        total = math.prod(sizes)
        if position == wanted["rows"] and total == self.count * top_k:
            two = len(sizes) == 2 and sizes[1] == top_k
            return value if two else Derived(torch.reshape, (value, (-1, top_k)))
        if position == flatten((slot, self.tokens), (top_k, self.count)) and total == self.count * top_k:
            return Derived(torch.t, (Derived(torch.reshape, (value, (top_k, -1))),))
        if position == wanted["once"] and total == self.count:
            return Derived(torch.reshape, (value, (-1, 1)))
        last = index[-1].number if index else None
        if last is not None and len(index) >= 2 and flatten(index[:-1], sizes[:-1]) == self.tokens:
            columns = Derived(torch.reshape, (value, (-1, sizes[-1])))
            return Derived(torch.narrow, (columns, 1, last, 1))
        return None

    def _weights(self, term: Any, branch: Branch, ids: Operand, top_k: int) -> Operand | None:
        """A term as a tensor [T, K]; None for the number 1."""
        if term == 1.0:
            return None
        operand = self._operand(term, branch, ids, top_k)
        if isinstance(operand, (int, float)):
            return Derived(torch.full_like, (ids, operand), (("dtype", branch.function.down.product.dtype),))
        narrow = top_k > 1 and not self._has_slot(term, branch)
        return Derived(torch.Tensor.expand, (operand, -1, top_k)) if narrow else operand

    def _has_slot(self, term: Any, branch: Branch) -> bool:
        if isinstance(term, Leaf):
            return any(a == branch.slot.atom for i in term.index for a in atoms(i))
        return isinstance(term, Call) and any(self._has_slot(a, branch) for a in term.arguments)

    def _operand(self, term: Any, branch: Branch, ids: Operand, top_k: int) -> Any:
        if isinstance(term, Call):
            arguments = tuple(self._operand(a, branch, ids, top_k) for a in term.arguments)
            return Derived(term.function, arguments, term.keywords)
        if not isinstance(term, Leaf):
            return term
        found = self._looked_up(term, branch, ids) or self._table(term.value, term.index, branch.slot, top_k)
        require(found is not None, "a factor is neither [T, K] nor looked up by the expert ids", term.value)
        return found

    def _looked_up(self, leaf: Leaf, branch: Branch, ids: Operand) -> Operand | None:
        """``scores[t, ids[t, k]]`` or ``scale[ids[t, k]]``."""
        value, index = leaf.value, leaf.index
        by_expert = bool(index) and (
            index[-1] == branch.ids or (branch.expert is not None and index[-1].number == branch.expert
                                        and sizes_of(value)[-1] == self.experts and not self._has_slot(leaf, branch))
        )  # fmt: skip
        if not by_expert:
            return None
        if len(index) == 1:
            return Derived(getitem, (value, ids))
        if flatten(index[:-1], sizes_of(value)[:-1]) != self.tokens:
            return None
        table = value if len(index) == 2 else Derived(torch.reshape, (value, (-1, sizes_of(value)[-1])))
        wide = Derived(torch.Tensor.to, (ids, torch.int64))
        return Derived(torch.gather, (table, 1, wide))

    # ------------------------------------------------------------------------------- region

    def _assembled(self, branches: list[Branch], ids: tuple[Operand, Value, int], base: Value | None) -> MoERegion:
        first, (table, _, top_k) = branches[0], ids
        function = first.function
        gate, up, down = linears([(b.expert, b.function) for b in branches])
        self.experts = down.num_experts
        require(down.out_features == up.in_features, "the experts change the width of the rows", down.weights[0])
        self._require_shape(function)
        both = first.weight != 1.0 and first.input_weight != 1.0
        require(not both, "the rows are weighted before the experts and after them", function.down.product)
        weighting = "input" if first.input_weight != 1.0 else "output"
        weights = self._weights(first.input_weight if weighting == "input" else first.weight, first, table, top_k)
        return MoERegion(
            family=self._style(first), graph=self.graph, x=self._tokens(function), expert_ids=table,
            expert_weights=self._precise(weights, first, down), top_k=top_k, up=up, down=down, gate=gate,
            activation=function.activation, gate_up_layout=function.layout, output=self.output, weighting=weighting,
            base=base,
        )  # fmt: skip

    def _require_shape(self, function: ExpertFunction) -> None:
        """The rewrite can give its rows [T, H] the shape of the output."""
        alike = sizes_of(function.x[0])[:-1] == self.sizes[:-1]
        known = len(self.sizes) == 2 or alike or sum(not isinstance(n, int) for n in self.sizes) <= 1
        require(known, "the output has a shape that neither the tokens have nor is known", self.output)

    def _precise(self, weights: Operand | None, branch: Branch, down: Linear) -> Operand | None:
        """Routing weights in the widest dtype in which the original weighs and sums."""
        widest = down.compute_dtype
        for dtype in branch.dtypes:
            widest = torch.promote_types(widest, dtype)
        if weights is None or widest == down.compute_dtype:
            return weights
        if isinstance(weights, Value) and weights.dtype == widest:
            return weights
        return Derived(torch.Tensor.to, (weights, widest))

    def _style(self, branch: Branch) -> str:
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


def maps_zero_to_zero(function: ExpertFunction) -> bool:
    """Whether an expert without biases maps a row of zeros to zeros."""
    from samoyeds_codegen import expr

    zero = torch.zeros(1, dtype=torch.float64)
    names = (expr.PLAIN_NAME, *expr.GATED_NAMES)
    return bool((expr.evaluate(function.activation, dict.fromkeys(names, zero)) == 0).all())


def is_distinct(element: Any) -> bool:
    """Whether the entries of a row of ids are known to differ: they are indices of a top-k, or there is one."""
    if not isinstance(element, Element):
        return False
    value = element.value
    if sizes_of(value)[-1] == 1 or len(value.shape) == 1:
        return True
    return value.op == "item" and value.input.op in ("topk", "sort") and value.arg("key") == 1


def _choices(element: Any) -> int | None:
    """How many experts a router chooses from, if the ids come from one."""
    assert isinstance(element, Element)
    value = element.value
    choice = value.input if value.op == "item" else value
    known = choice.op in ("topk", "argmax", "max", "sort", "argsort") and isinstance(choice.input, Value)
    axis = choice.arg("dim", -1)
    width = sizes_of(choice.input)[axis] if known and isinstance(axis, int) else None
    return width if isinstance(width, int) else None


def _differ(a: Chosen, b: Chosen) -> bool:
    """Whether two conditions name different experts of the same entry."""
    return a.ids == b.ids and a.expert.number is not None and b.expert.number not in (None, a.expert.number)


def _slot_number(branch: Branch) -> int | None:
    """The slot of a branch that is for one slot of several only."""
    element = branch.ids.atom
    assert isinstance(element, Element)
    several = len(element.index) >= 2 and sizes_of(element.value)[-1] != 1
    return element.index[-1].number if several else None


def _generalised(branch: Branch, number: int | None, top_k: int, slot: Index) -> Branch:
    """A branch of slot ``number`` as one of slot ``slot``."""

    def term_of(term: Any) -> Any:
        if isinstance(term, Leaf) and sizes_of(term.value)[-1] == top_k and term.index[-1].number == number:
            return Leaf(term.value, (*term.index[:-1], slot))
        if isinstance(term, Call):
            return replace(term, arguments=tuple(term_of(a) for a in term.arguments))
        return term

    element = branch.ids.atom
    assert isinstance(element, Element)
    ids = Index(0, frozenset(((Element(element.value, (*element.index[:-1], slot)), 1),)))
    weights = {"weight": term_of(branch.weight), "input_weight": term_of(branch.input_weight)}
    return replace(branch, ids=ids, slot=slot, **weights)


def _slot_renaming(branch: Branch, like: Branch) -> Any:
    a, b = branch.ids.atom, like.ids.atom
    assert isinstance(a, Element) and isinstance(b, Element)
    if a.value is not b.value or len(a.index) != len(b.index):
        return None
    names: dict[Any, Index] = {}
    if branch.slot != like.slot:
        names[branch.slot.atom] = like.slot
    renamed = tuple(substitute(i, names.get) for i in a.index)
    return names.get if renamed == b.index else None


def _at_expert(term: Any, branch: Branch) -> Any:
    """A term with the expert's own number replaced by a mark, so that terms of different experts compare."""
    if isinstance(term, Leaf):
        last = term.index[-1].number if term.index else None
        if last is not None and last == branch.expert and sizes_of(term.value)[-1] != 1:
            return Leaf(term.value, (*term.index[:-1], Index(-1)))
        return term
    if isinstance(term, Call):
        return replace(term, arguments=tuple(_at_expert(a, branch) for a in term.arguments))
    return term
