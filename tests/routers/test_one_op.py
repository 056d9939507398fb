"""Without any option, routers of models are one op in inference on a CPU; a block is three: logits, choice, experts."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from samoyeds_codegen.cpp.ops import has_ops_library
from samoyeds_compile import Report, SparsityConfig, sparsify_
from tests.models.test_families import TOLERANCE, relative
from tests.routers.test_models import build

pytestmark = pytest.mark.skipif(not has_ops_library(), reason="needs a C++ compiler")


def compiled(model, **options):
    report = Report()
    return torch.compile(model, backend="samoyeds", options={"report": report, **options}), report


def calls(function, op):
    """How often an op runs."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return sum(event.name == op for event in record.events())


@pytest.mark.parametrize(
    "name",
    ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "granitemoe", "gpt_oss", "minimax_m2", "ernie4_5_moe"],
)
def test_models(name):
    """One graph, every router fused, and what eager gives."""
    model, inputs = build(name)
    fast, report = compiled(model, base="aot_eager")
    with torch.no_grad():
        expected, actual = model(**inputs).logits, fast(**inputs).logits
        count = calls(lambda: fast(**inputs), "samoyeds::choose_experts")
    assert relative(actual, expected) < TOLERANCE
    assert len(report.graphs) == 1 and report.blocks
    assert all(block.router_fused and block.router_reason is None for block in report.blocks)
    assert count == len(report.blocks)
    assert "(fused)" in str(report)


def test_with_gradients_routers_stay():
    model, inputs = build("mixtral", train=True)
    fast, report = compiled(model, base="aot_eager")
    assert calls(lambda: fast(**inputs), "samoyeds::choose_experts") == 0
    assert report.blocks and not any(block.router_fused for block in report.blocks)


def test_they_stay_if_that_is_wanted():
    model, inputs = build("mixtral")
    fast, report = compiled(model, base="aot_eager", fuse_routers=False)
    with torch.no_grad():
        assert calls(lambda: fast(**inputs), "samoyeds::choose_experts") == 0
    assert report.blocks and not any(block.router_fused for block in report.blocks)


@pytest.mark.inductor
def test_a_block_is_three_calls_for_any_number_of_tokens():
    """No kernel of Inductor beside them, and no recompilation."""
    from torch._inductor import metrics
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(hidden_size=48, moe_intermediate_size=32, num_experts=16, num_experts_per_tok=4)
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    sparsify_(block.eval(), SparsityConfig(1, 2, 32), method="magnitude", progress=False)
    fast, report = compiled(block)
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        for tokens in (3, 7, 50, 4, 2):
            x = torch.randn(1, tokens, 48)
            torch.testing.assert_close(fast(x), block(x), rtol=1e-4, atol=1e-5)
        for op in ("samoyeds::choose_experts", "samoyeds::sparse_experts", "aten::mm"):
            assert calls(lambda: fast(x), op) == 1
    assert metrics.generated_kernel_count == 0
    assert len(report.graphs) == 2  # static, then for any number
