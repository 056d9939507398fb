"""Blocks small enough for tests, in place of those of the benchmark."""

from transformers import DeepseekV2Config, MixtralConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.cpu.shapes import Shape

PLAIN = Shape(
    "Tiny",
    MixtralSparseMoeBlock,
    MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2),
)
SHARED = Shape(
    "Tiny with shared experts",
    DeepseekV2Moe,
    DeepseekV2Config(
        hidden_size=64, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2
    ),
)
