"""`samoyeds::router` against its float64 twin, and bit for bit against the routers of models, ties and NaN included."""

import itertools

import pytest
import torch
import torch._inductor.config
import torch._inductor.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_compile.errors import OperandError
from samoyeds_compile.ops import reference
from samoyeds_compile.routers.region import Spec

INF = float("inf")
SOFTMAX = Spec("softmax", "score_then_topk", 2, True, "choice")
SIGMOID = Spec("sigmoid", "score_then_topk", 3, False, "scores", "sum", 1e-20, 2.5)
GROUPED = {"n_group": 4, "topk_group": 2, "group_sorted": False}


def call(spec, logits, bias=None):
    return torch.ops.samoyeds.router(logits, bias, *spec.arguments)


# ------------------------------------------------------------------ routers as models write them (transformers 5.23)


def mixtral(logits, bias):
    weights, ids = torch.topk(torch.nn.functional.softmax(logits.float(), dim=-1), 2, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, ids


def qwen3_moe(logits, bias):
    weights, ids = torch.topk(torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1), 2, dim=-1)
    return weights.to(logits.dtype), ids


def deepseek_v2(logits, bias):
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    group_scores = scores.view(-1, 4, 4).max(dim=-1).values
    masked = scores.masked_fill(~open_groups(group_scores).bool(), 0.0)
    weights, ids = torch.topk(masked, k=2, dim=-1, sorted=False)
    return weights * 1.5, ids


def granitemoe(logits, bias):
    weights, ids = logits.float().topk(2, dim=-1)
    return torch.softmax(weights, dim=-1).type_as(logits), ids


def gpt_oss(logits, bias):
    weights, ids = torch.topk(logits, 2, dim=-1)
    return torch.nn.functional.softmax(weights, dim=1, dtype=weights.dtype), ids


def kolibri1(logits, bias):
    _, ids = torch.topk(logits + bias, 2, dim=-1)
    return torch.sigmoid(logits.gather(1, ids)), ids


def minimax_m2(logits, bias):
    scores = torch.sigmoid(logits.float())
    _, ids = torch.topk(scores + bias, 2, dim=-1, sorted=False)
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, ids


def deepseek_v3(logits, bias):
    scores = logits.float().sigmoid()
    choice = scores + bias
    group_scores = choice.view(-1, 4, 4).topk(2, dim=-1)[0].sum(dim=-1)
    choice = choice.masked_fill(~open_groups(group_scores).bool(), -INF)
    ids = torch.topk(choice, k=3, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, ids


def ernie4_5(logits, bias):
    scores = torch.nn.functional.softmax(logits, dim=1, dtype=torch.float)
    _, ids = torch.topk(scores + bias, 2, dim=-1)
    weights = torch.gather(scores, dim=-1, index=ids)
    weights = weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-12)
    return weights.to(logits.dtype), ids


def open_groups(group_scores):
    best = torch.topk(group_scores, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(group_scores).scatter_(1, best, 1)
    return mask.unsqueeze(-1).expand(-1, 4, 4).reshape(-1, 16)


MODELS = {
    mixtral: lambda d: Spec("softmax", "score_then_topk", 2, True, "choice", "sum", score_dtype=torch.float),
    qwen3_moe: lambda d: Spec("softmax", "score_then_topk", 2, True, "choice", score_dtype=torch.float, out_dtype=d),
    deepseek_v2: lambda d: Spec("softmax", "score_then_topk", 2, False, "choice", scale=1.5, score_dtype=torch.float,
                                group_score="max", masked_score=0.0, **GROUPED),
    granitemoe: lambda d: Spec("softmax", "topk_then_score", 2, True, "choice", score_dtype=torch.float, out_dtype=d),
    gpt_oss: lambda d: Spec("softmax", "topk_then_score", 2, True, "choice", score_dtype=d),
    kolibri1: lambda d: Spec("sigmoid", "topk_then_score", 2, True, "scores"),
    minimax_m2: lambda d: Spec("sigmoid", "score_then_topk", 2, False, "scores", "sum"),
    deepseek_v3: lambda d: Spec("sigmoid", "score_then_topk", 3, False, "scores", "sum", 1e-20, 2.5,
                                group_score="top2_sum", masked_score=-INF, **GROUPED),
    ernie4_5: lambda d: Spec("softmax", "score_then_topk", 2, True, "scores", "clamped_sum", 1e-12,
                             score_dtype=torch.float, out_dtype=d),
}  # fmt: skip
CASTS_FIRST = (granitemoe, minimax_m2, deepseek_v3)
"""Their cast of the logits stands in front of the op."""


def draw(kind, tokens, dtype, experts=16):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(tokens, experts, generator=generator) * 2
    if kind == "tied":
        logits = logits.round()
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    elif kind == "infinite":
        logits[torch.rand(logits.shape, generator=generator) < 0.4] = -INF
        logits[:1] = -INF
    elif kind == "nan":
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = float("nan")
    return logits.to(dtype)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["random", "tied", "equal", "infinite", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_bit_for_bit(model, dtype, kind):
    """Ids, their order, weights and gradients are those of the model's own sequence of ops."""
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for tokens in (0, 1, 33):
        logits = draw(kind, tokens, dtype).requires_grad_()
        weights, ids = model(logits, bias)
        fed = logits.float() if model in CASTS_FIRST else logits
        actual, actual_ids = call(MODELS[model](dtype), fed, None if model.__name__ in NO_BIAS else bias)
        assert torch.equal(actual_ids, ids)
        same(actual, weights)
        cotangent = torch.linspace(-1, 1, weights.numel(), dtype=weights.dtype).view(weights.shape)
        same(*(torch.autograd.grad(w, logits, cotangent)[0] for w in (actual, weights)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "infinite", "nan"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_bit_for_bit_on_cuda(model, kind):
    logits, bias = draw(kind, 300, torch.float32).cuda(), torch.randn(16).cuda()
    spec = MODELS[model](torch.float32)
    for mine, theirs in zip(
        call(spec, logits, None if model.__name__ in NO_BIAS else bias), model(logits, bias), strict=True
    ):
        same(mine, theirs)


@pytest.mark.inductor
@pytest.mark.parametrize("model", [deepseek_v2, deepseek_v3], ids=lambda m: m.__name__)
def test_group_limit_needs_fewer_kernels(model, monkeypatch):
    """Comparing ids needs no scatter, which is a kernel of its own and ends the one before."""
    monkeypatch.setattr("samoyeds_compile.ops.router.runs_as_one_op", lambda *_: False)
    bias = None if model.__name__ in NO_BIAS else torch.randn(16)
    counts = []
    for function in (model, lambda logits, bias: call(MODELS[model](torch.float32), logits, bias)):
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            torch._inductor.metrics.reset()
            torch.compile(function)(draw("random", 64, torch.float32), bias)
        counts.append(torch._inductor.metrics.generated_kernel_count)
    assert 0 < counts[1] < counts[0]


NO_BIAS = ("mixtral", "qwen3_moe", "deepseek_v2", "granitemoe", "gpt_oss")


# ------------------------------------------------------------------------------------------- the float64 twin

AXES = list(itertools.product(
    ["softmax", "sigmoid"], ["score_then_topk", "topk_then_score"], ["choice", "scores"],
    ["none", "sum", "clamped_sum"], [(1, 1), (2, 1), (4, 2), (4, 4)], ["max", "top2_sum"], [False, True],
))  # fmt: skip


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_against_twin(axes):
    scoring, order, weights_from, renormalise, (n_group, topk_group), group_score, biased = axes
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(12, generator=generator, dtype=torch.float64) if biased else None
    spec = Spec(scoring, order, 2, True, weights_from, renormalise, 0.3, 1.5, n_group, topk_group, group_score, True,
                -9.0)  # fmt: skip
    weights, ids = call(spec, logits, bias)
    expected, expected_ids = reference.router(
        logits, bias, scoring, order, 2, weights_from, renormalise, 0.3, 1.5, n_group, topk_group, group_score, -9.0
    )
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@settings(max_examples=60, deadline=None)
@given(t=st.integers(0, 12), group=st.integers(2, 5), n_group=st.integers(1, 5), data=st.data())
def test_any_shape(t, group, n_group, data):
    """K up to E, one group, all groups open: ids are distinct experts, and masked ones come last."""
    experts = group * n_group
    top_k, topk_group = data.draw(st.integers(1, experts)), data.draw(st.integers(1, n_group))
    logits = torch.randn(t, experts, generator=torch.Generator().manual_seed(t))
    spec = Spec("sigmoid", "score_then_topk", top_k, True, "scores", n_group=n_group, topk_group=topk_group,
                group_score="top2_sum", masked_score=-INF)  # fmt: skip
    weights, ids = call(spec, logits)
    assert weights.shape == ids.shape == (t, top_k)
    same(weights, logits.sigmoid().gather(1, ids))
    for row in ids:
        assert len(set(row.tolist())) == top_k
        assert len({e // group for e in row.tolist()[: topk_group * group]}) <= topk_group


# ----------------------------------------------------------------------------------------------- as an operator


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_opcheck(model, requires_grad):
    bias = None if model.__name__ in NO_BIAS else torch.randn(16)
    arguments = (draw("random", 5, torch.float32).requires_grad_(requires_grad), bias)
    torch.library.opcheck(torch.ops.samoyeds.router.default, (*arguments, *MODELS[model](torch.float32).arguments))


def test_derivatives():
    """First and second, in the logits, and in a bias that is part of the weights."""
    logits, bias = draw("random", 4, torch.float64).requires_grad_(), torch.randn(16, dtype=torch.float64)
    for spec in (SIGMOID, MODELS[deepseek_v2](None), SOFTMAX):
        plain = Spec(**{**vars(spec), "score_dtype": None})
        torch.autograd.gradcheck(lambda x, s=plain: call(s, x)[0], logits)
        torch.autograd.gradgradcheck(lambda x, s=plain: call(s, x)[0], logits)
    torch.autograd.gradcheck(lambda b: call(SOFTMAX, logits.detach(), b)[0], bias.requires_grad_())


def test_the_correction_gets_no_gradient():
    bias = torch.randn(16, requires_grad=True)
    weights, _ = call(SIGMOID, draw("random", 4, torch.float32).requires_grad_(), bias)
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("logits", "bias", "changes", "message"),
    [
        (torch.zeros(2, 3, 4), None, {}, "logits is torch.float32 of rank 3"),
        (torch.zeros(2, 8, dtype=torch.int64), None, {}, "logits is torch.int64"),
        (torch.zeros(2, 8), torch.zeros(2, 8), {}, "correction_bias has shape"),
        (torch.zeros(2, 8), None, {"top_k": 9}, "top_k is 9"),
        (torch.zeros(2, 8), None, {"top_k": 0}, "top_k is 0"),
        (torch.zeros(2, 8), None, {"n_group": 3}, "n_group is 3"),
        (torch.zeros(2, 8), None, {"n_group": 0}, "n_group is 0"),
        (torch.zeros(2, 8), None, {"n_group": 2, "topk_group": 3}, "topk_group is 3"),
        (torch.zeros(2, 8), None, {"n_group": 8, "group_score": "top2_sum"}, "two experts a group"),
        (torch.zeros(2, 8), None, {"scoring": "relu"}, "scoring is 'relu'"),
        (torch.zeros(2, 8), None, {"order": "never"}, "order is 'never'"),
        (torch.zeros(2, 8), None, {"weights_from": "logits"}, "weights_from is 'logits'"),
        (torch.zeros(2, 8), None, {"renormalise": "l2"}, "renormalise is 'l2'"),
        (torch.zeros(2, 8), None, {"group_score": "mean"}, "group_score is 'mean'"),
    ],
)
def test_bad_operands_name_themselves(logits, bias, changes, message):
    with pytest.raises(OperandError, match=message):
        call(Spec(**{**vars(SOFTMAX), **changes}), logits, bias)
