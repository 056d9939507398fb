"""`samoyeds::choose_experts` in C++ against the same router in ops of ATen: everything equal bit for bit."""

import itertools
import locale

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_codegen.cpp.ops import has_ops_library
from samoyeds_compile.ops.router import ORDERS, SCORINGS, _in_aten, choose_experts, runs_as_one_op
from samoyeds_compile.routers.region import Spec
from tests.ops.test_router import CASTS_FIRST, MODELS, NO_BIAS, draw, same

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(not has_ops_library(), reason="needs a C++ compiler")


def words(spec):
    return " ".join(str(a).removeprefix("torch.") for a in spec.arguments)


def check(spec, logits, bias=None):
    """The op against ATen; T = 0 and non-contiguous logits as well."""
    with torch.no_grad():
        assert runs_as_one_op(logits, bias, spec.score_dtype, spec.out_dtype)
        weights, ids = torch.ops.samoyeds.router(logits, bias, *spec.arguments)
        expected, expected_ids = _in_aten(logits, bias, *spec.arguments)
    assert ids.dtype == torch.int64 and torch.equal(ids, expected_ids)
    assert weights.dtype == expected.dtype and weights.is_contiguous() and ids.is_contiguous()
    same(weights, expected)


AXES = list(itertools.product(
    ["softmax", "sigmoid"], ["score_then_topk", "topk_then_score"], ["choice", "scores"],
    ["none", "sum", "clamped_sum"], [(1, 1), (2, 1), (4, 2), (4, 4)], ["max", "top2_sum"], [False, True],
))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(dtype):
    """Ties, infinities and NaN in all of them."""
    for number, axes in enumerate(AXES):
        scoring, order, weights_from, renormalise, (n_group, topk_group), group_score, biased = axes
        bias = torch.linspace(-0.3, 0.3, 12, dtype=dtype).roll(number % 5) if biased else None
        epsilon, scale = (0.0, 1e-20, 0.3)[number % 3], (None, 2.5)[number % 2]
        score_dtype, out_dtype = (None, torch.float32)[number % 5 == 0], (None, *DTYPES)[number % 4]
        spec = Spec(scoring, order, 1 + number % 7, number % 2 == 0, weights_from, renormalise, epsilon, scale,
                    n_group, topk_group, group_score, number % 3 == 0, (0.0, -INF)[number % 2], score_dtype,
                    out_dtype)  # fmt: skip
        for kind in ("random", "tied", "equal", "infinite", "nan"):
            check(spec, draw(kind, 9, dtype, 12), bias)


@pytest.mark.parametrize("kind", ["random", "tied", "equal", "infinite", "nan"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_as_models_write_it(model, dtype, kind):
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for tokens in (0, 1, 33):
        logits = draw(kind, tokens, dtype)
        fed = logits.float() if model in CASTS_FIRST else logits
        with torch.no_grad():
            weights, ids = model(logits, bias)
            got, got_ids = torch.ops.samoyeds.router(
                fed, None if model.__name__ in NO_BIAS else bias, *MODELS[model](dtype).arguments
            )
        assert torch.equal(got_ids, ids)
        same(got, weights)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ties(data):
    """Few different numbers, so that nearly everything ties; from 1 to 256 experts, any k."""
    experts, tokens = data.draw(st.integers(1, 256), label="E"), data.draw(st.integers(1, 6), label="T")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    levels = data.draw(st.lists(st.sampled_from([-INF, -3.0, -0.0, 0.0, 0.5, 1.0, 1e-3, 80.0, INF, float("nan")]),
                                min_size=1, max_size=4), label="levels")  # fmt: skip
    seed = data.draw(st.integers(0, 2**20), label="seed")
    pick = torch.randint(len(levels), (tokens, experts), generator=torch.Generator().manual_seed(seed))
    logits = torch.tensor(levels)[pick].to(dtype)
    divisors = [n for n in range(1, experts + 1) if experts % n == 0 and experts // n >= 2] or [1]
    n_group = data.draw(st.sampled_from(divisors), label="groups")
    spec = Spec(
        data.draw(st.sampled_from(SCORINGS)), data.draw(st.sampled_from(ORDERS)),
        data.draw(st.integers(1, experts), label="k"), data.draw(st.booleans(), label="sorted"),
        data.draw(st.sampled_from(["choice", "scores"])), "none", n_group=n_group,
        topk_group=data.draw(st.integers(1, n_group)), group_score=data.draw(st.sampled_from(["max", "top2_sum"])),
        group_sorted=data.draw(st.booleans()), masked_score=data.draw(st.sampled_from([0.0, -INF])),
    )  # fmt: skip
    bias = torch.zeros(experts, dtype=dtype) if data.draw(st.booleans(), label="bias") else None
    check(spec, logits, bias)


def test_sums_have_the_order_of_aten():
    """Sums of float32 round in one order only; any number of experts a token below the length of ATen's cascade."""
    for top_k in range(1, 64):
        for dtype in (torch.float32, torch.bfloat16) if top_k < 16 else (torch.float32,):
            logits = draw("random", 20, dtype, 64)
            check(Spec("sigmoid", "score_then_topk", top_k, True, "choice", "sum", 1e-20, 2.5), logits)


def test_many_tokens_threads_and_strides():
    """More than one thread gets to do; whatever their number, nothing changes."""
    before, bias = torch.get_num_threads(), torch.randn(128)
    spec = Spec("sigmoid", "score_then_topk", 8, False, "scores", "sum", 1e-20, 2.5, 8, 4, "top2_sum", False, -INF)
    wide = torch.randn(9000, 256).round(decimals=1)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for logits in (wide[:, ::2], wide[:, 128:], wide[:128].t()[:, :128]):
                check(spec, logits, bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_opcheck(model):
    bias = None if model.__name__ in NO_BIAS else torch.randn(16)
    operands = (draw("random", 5, torch.float32), bias, words(MODELS[model](torch.float32)))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.samoyeds.choose_experts.default, operands)


def test_python_reads_the_same_words():
    """Where there is no C++."""
    spec = MODELS[next(m for m in MODELS if m.__name__ == "deepseek_v3")](torch.float32)
    logits, bias = draw("tied", 7, torch.float32), torch.randn(16)
    for mine, theirs in zip(
        choose_experts(logits, bias, words(spec)), _in_aten(logits, bias, *spec.arguments), strict=True
    ):
        same(mine, theirs)


def test_a_decimal_comma_changes_nothing():
    spec = Spec("sigmoid", "score_then_topk", 2, True, "choice", "sum", 0.25, 1.375)
    before = locale.setlocale(locale.LC_NUMERIC)
    try:
        locale.setlocale(locale.LC_NUMERIC, "de_DE.UTF-8")
    except locale.Error:
        pytest.skip("the machine has no locale with a comma")
    try:
        check(spec, draw("random", 7, torch.float32))
    finally:
        locale.setlocale(locale.LC_NUMERIC, before)


@pytest.mark.parametrize(
    ("logits", "bias", "change", "problem"),
    [
        (torch.zeros(2, 3, 4), None, {}, "logits"),
        (torch.zeros(2, 1), None, {}, "logits"),
        (torch.zeros(2, 8, dtype=torch.float64), None, {}, "float32"),
        (torch.zeros(2, 8), torch.zeros(4), {}, "correction_bias"),
        (torch.zeros(2, 8), None, {"n_group": 3}, "groups"),
    ],
)
def test_operands_that_do_not_fit(logits, bias, change, problem):
    spec = Spec(**{**vars(Spec("softmax", "score_then_topk", 2, True, "choice")), **change})
    with pytest.raises(ValueError, match=f"choose_experts: .*{problem}"):
        torch.ops.samoyeds.choose_experts(logits, bias, words(spec))


def test_where_it_is_not_used():
    """Gradients, float64, autocast: ops of ATen, which differentiate and cast as they always did."""
    logits = torch.zeros(2, 4)
    assert runs_as_one_op(logits, None, None, None)
    assert not runs_as_one_op(torch.zeros(2, 4, requires_grad=True), None, None, None)
    assert not runs_as_one_op(logits.double(), None, None, None)
    assert not runs_as_one_op(logits, None, torch.float64, None)
    assert not runs_as_one_op(logits.to("meta"), None, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_as_one_op(logits, None, None, None)
