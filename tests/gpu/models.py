"""Models of transformers; tests of them are skipped on machines without it."""

import pytest
import torch


def mixtral() -> torch.nn.Module:
    """Of two layers with four experts each."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=128, num_hidden_layers=2, num_local_experts=4, **sizes)
    return transformers.MixtralForCausalLM(config)
