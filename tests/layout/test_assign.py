"""Layouts of regions: exact, as declared, and different for different numbers of tokens."""

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_codegen.cpp.layouts import MOST
from samoyeds_compile.errors import LayoutError
from samoyeds_compile.layout import declare
from samoyeds_compile.layout.algebra import Place
from samoyeds_compile.layout.assign import Problem, assign, price, token_major, with_runners_up
from samoyeds_compile.layout.cut import FORBIDDEN, cost
from samoyeds_compile.layout.declare import DECLARATIONS
from samoyeds_compile.layout.machine import Constants, Machine
from samoyeds_compile.layout.measured import AMX_KERNELS
from samoyeds_compile.layout.rates import Kernel, Rates
from samoyeds_compile.layout.regimes import (
    crossing,
    few,
    first_tokens,
    kernel_beats,
    per_expert,
    regimes,
    tiled,
    untiled,
)
from samoyeds_compile.layout.region import Sizes, experts_region

SIZES = Sizes(1, 1024, 768, 64, 8)
CONSTANTS = Constants(Kernel(Rates(200, 20, 12), Rates(200, 100, 5, 16)), 80, 300)
GATHER, DOWN = "gather -> expert_up", "activation -> expert_down"


def places(tokens: int, sizes: Sizes = SIZES) -> dict[str, Place]:
    at = sizes.at(tokens)
    return {e.edge.name: e.written for e in assign(experts_region(at), at.numbers(CONSTANTS)).edges}


def test_depends_on_the_number_of_tokens() -> None:
    """One token reads the tokens themselves, many are feature-major from the gather to the last product."""
    assert places(1)[GATHER] is Place.TOKENS and places(1)[DOWN] is Place.SLOTS
    assert places(4096)[GATHER] is places(4096)[DOWN] is places(4096)["expert_up -> activation"] is Place.TILES
    assert not any(e.converts for e in assign(experts_region(SIZES), SIZES.at(4096).numbers(CONSTANTS)).edges)
    assert {places(n)["x"] for n in (1, 4096)} == {Place.TOKENS}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 3, 40, 700]), st.booleans(), st.sampled_from(list(AMX_KERNELS)))
def test_as_cheap_as_trying_everything(tokens: int, bias: bool, kernel: str) -> None:
    """All layouts of all edges, by dynamic programming over the chain that a block of experts is."""
    sizes = replace(SIZES, tokens=tokens, bias=bias)
    region, constants = experts_region(sizes), Machine(AMX_KERNELS, {}).constants(kernel)
    problem = Problem(region, sizes.numbers(constants))
    found = problem.solve()
    first, last = region.together[0]
    best = FORBIDDEN
    for up, down in itertools.product(Place, repeat=2):  # what the two products read, the only tie besides the chain
        if (up is Place.TILES) == (down is Place.TILES):
            best = min(best, _cheapest(problem, {2 * first + 1: up, 2 * last + 1: down}))
    assert found.picoseconds == best < FORBIDDEN


def _cheapest(problem: Problem, pins: dict[int, Place]) -> int:
    """Variables stand in the order of the chain: written, read, written, read."""
    tables = {(a, b): full for a, b, full in problem.pairs if b == a + 1}
    best = [problem.unary[0][label] for label in range(3)]
    for variable in range(1, len(problem.unary)):
        full = tables[variable - 1, variable]
        best = [
            min(best[before] + full[before][label] for before in range(3))
            + problem.unary[variable][label]
            + (FORBIDDEN if pins.get(variable, label) != label else 0)
            for label in range(3)
        ]
    return min(best)


def test_runner_up_is_what_pinning_costs() -> None:
    at = SIZES.at(256)
    region, numbers = experts_region(at), at.numbers(CONSTANTS)
    best = with_runners_up(region, numbers)
    edge = best[DOWN]
    assert edge.runner_up is Place.SLOTS and edge.margin > 0
    assert assign(region, numbers, {DOWN: Place.SLOTS}).picoseconds == best.picoseconds + edge.margin
    assert best["x"].runner_up is None and best["out"].runner_up is None


def test_one_order_converts_twice() -> None:
    at = SIZES.at(4096)
    fixed = token_major(experts_region(at), at.numbers(CONSTANTS))
    assert [e.edge.name for e in fixed.edges if e.converts] == [GATHER, DOWN]
    assert fixed.picoseconds > assign(experts_region(at), at.numbers(CONSTANTS)).picoseconds


def test_price_is_the_cost_of_the_same_labels() -> None:
    for tokens, fixed in itertools.product((1, 90, 3000), (False, True)):
        at = SIZES.at(tokens)
        region, numbers = experts_region(at), at.numbers(CONSTANTS)
        found = token_major(region, numbers) if fixed else assign(region, numbers)
        labels = [label for e in found.edges for label in (e.written, e.read)]
        problem = Problem(region, numbers)
        assert price(region, found.edges, numbers) == cost(labels, problem.unary, problem.pairs)


@pytest.mark.parametrize("op", DECLARATIONS)
def test_declarations_are_submodular(op: str) -> None:
    """Whatever the number of tokens; `table` refuses others."""
    for tokens in (1, 7, 100, 5000):
        Problem(experts_region(SIZES), SIZES.at(tokens).numbers(CONSTANTS))._op(op)


def test_a_new_op_is_one_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared, it is in the cut; a declaration that no cut could solve is refused."""

    class Smooth(declare.Elementwise):
        op = "scale"
        costs: ClassVar[declare.Costs] = {(Place.SLOTS, Place.SLOTS): declare.T}

    monkeypatch.setattr("samoyeds_compile.layout.assign.DECLARATIONS", {**DECLARATIONS, "scale": Smooth})
    assert places(4)["scale -> combine"] is Place.SLOTS
    Smooth.costs = {(Place.SLOTS, Place.SLOTS): declare.T, (Place.TILES, Place.TILES): declare.T,
                    (Place.SLOTS, Place.TILES): declare.ZERO, (Place.TILES, Place.SLOTS): declare.ZERO}  # fmt: skip
    with pytest.raises(LayoutError, match="not submodular"):
        places(4)


def test_expected_experts_against_draws() -> None:
    """The closed forms are those of even routing, counted over many draws."""
    torch.manual_seed(0)
    sizes, rows = replace(SIZES, experts=16, top_k=2, tokens=20), (1, 2)
    counts = torch.stack([torch.bincount(torch.rand(20, 16).topk(2).indices.flatten(), minlength=16)
                          for _ in range(400)]).double()  # fmt: skip
    active = (counts > 0).double().sum(1).mean()
    assert abs(40 / float(active) - per_expert(sizes, CONSTANTS)) < 0.05
    assert abs(float((counts > 2).sum(1).double().mean()) - tiled(sizes, rows, 20)) < 0.2
    few_counts = ((counts > 0) & (counts <= 2)).sum(1).double().mean()
    assert abs(float(few_counts) - untiled(sizes, rows, 20)) < 0.2


def test_few_is_where_rows_cost_less() -> None:
    """Each number of tokens on its own, gaps included: tiles are full at 16, and rows are best again at 17."""
    found = few(SIZES, CONSTANTS)
    for n in range(1, MOST + 1):
        one = SIZES.of_one_expert(n)
        best = assign(experts_region(one), one.numbers(CONSTANTS))
        assert (best[GATHER].read is not Place.TILES) == (n in found), n
    assert 16 not in found and 17 in found


def test_regimes_cover_all_tokens() -> None:
    for kernel in AMX_KERNELS:
        found = regimes(SIZES, Machine(AMX_KERNELS, {}).constants(kernel))
        assert 1 <= len(found) <= 3 and found[0].first == 1 and found[-1].last is None
        assert all(a.last + 1 == b.first for a, b in itertools.pairwise(found) if a.last)
        assert crossing(SIZES, Machine(AMX_KERNELS, {}).constants(kernel)) >= found[0].first


def test_other_machines_other_plans() -> None:
    """Where tiles cost nothing they are taken at once; where they cost too much, never."""
    cheap = Constants(Kernel(Rates(200, 20, 12), Rates(1, 0, 0.01, 16)), 80, 0.01)
    dear = Constants(Kernel(Rates(1, 0, 0.1), Rates(9000, 9000, 9, 16)), 80, 300)
    assert few(SIZES, cheap) == () and [r.name for r in regimes(SIZES, cheap)] == ["prefill"]
    assert len(few(SIZES, dear)) == MOST and regimes(SIZES, dear)[0].last > 100


def test_solving() -> None:
    assert [first_tokens(lambda t, n=n: t >= n) for n in (1, 2, 3, 1000)] == [1, 2, 3, 1000]
    assert kernel_beats(Rates(100, 0, 1), Kernel(Rates(10, 0, 5), Rates(500, 500, 9, 16))) == 19
    assert kernel_beats(Rates(100, 0, 9), Kernel(Rates(10, 0, 5), Rates(5, 5, 1, 16))) is None


def test_layers_that_are_alike_are_solved_once() -> None:
    """So time grows with the number of different blocks, each of which takes the same number of cuts."""
    regimes.cache_clear()
    for layer in range(48):
        regimes(replace(SIZES, width=1000 + layer % 2), CONSTANTS)
    assert regimes.cache_info().misses == 2
