"""Toy configurations of the transformers MoE families: data only, read by `tests.models.families`.

`TINY` holds the sizes that the families share; a family receives those keys that its config class has as
fields. `RECIPES` adds what a family needs beyond that, and a family that is not listed there needs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Experts of width 96 at hidden size 64: no weight is square, so a transposed or halved one cannot pass
# unnoticed (as with width 32, where gate and up together are 64), and both are multiples of 32, for the sake
# of sparse formats. Key-value heads are as many as query heads because latent attention wants it so.
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    # Routed experts: the library has no common name for their number, width and top-k.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "expert_ffn_hidden_size": 96,
    "moe_hidden_size": 96,
    # Shared experts and dense layers.
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_experts_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "ffn_hidden_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    # Every layer is an MoE layer, whichever of these a family uses to say so.
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    # Attention in its many forms: grouped-query, latent, sparse with an indexer, linear, state space.
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    # Train mode must be deterministic.
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "moe_token_dropout": 0.0,
}

LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
DATA_DEPENDENT_LOOP = "the loop over the experts which were hit has a data-dependent length"


@dataclass(frozen=True)
class Recipe:
    """How a family is built at toy size, and what a test has to know about it.

    Attributes:
        config: Config fields beyond, or instead of, `TINY`.
        experts: The class of the experts, where no decorator tells.
        model: The model class in the modeling file; if empty, derived from the module.
        feed: Names of the forward arguments; if empty, derived from the signature.
        gains: Factors for the random weights, by fragment of their path.
        idle: Path fragments of MoE blocks that the forward does not reach with the inputs it is given.
        stochastic_in_train: Why two equal calls differ in train mode; empty if they do not.
        graph_breaks: Why Dynamo needs more than one graph; empty if it does not.
        train_base: The base compiler for training tests, where PyTorch's own `aot_eager` fails on the family.
        notes: What else may surprise.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    experts: str = ""
    model: str = ""
    feed: tuple[str, ...] = ()
    gains: Mapping[str, float] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    stochastic_in_train: str = ""
    graph_breaks: str = ""
    train_base: str = "aot_eager"
    notes: str = ""


_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [3, 3, 2]}

RECIPES: dict[str, Recipe] = {
    "bailing_hybrid": Recipe({"layer_types": LINEAR_THEN_FULL}),
    "deepseek_v4": Recipe({"num_key_value_heads": 1, "mlp_layer_types": ["hash_moe", "moe"]}),
    "diffusion_gemma": Recipe({"global_head_dim": 16}),
    "ernie4_5_vl_moe": Recipe(
        {"moe_intermediate_size": [96, 96], "rope_parameters": _MROPE},
        idle=("vision_moe",),
        notes="Text and vision tokens have experts of their own; text alone leaves the vision experts idle.",
    ),
    "gemma4": Recipe({"enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 16}),
    "glm4v_moe": Recipe(
        {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    ),
    "glm5_next": Recipe(
        {"qk_rope_head_dim": 0, "head_dim": 0, "hc_mult": 2, "index_topk": 16},
        notes="Linear attention only (the default here); the pooling of indexed attention breaks the graph.",
    ),
    "jamba": Recipe({"attn_layer_period": 2, "attn_layer_offset": 1}),
    "kimi_linear": Recipe({"layer_types": LINEAR_THEN_FULL}),
    "lfm2_moe": Recipe({"layer_types": ["conv", "full_attention"]}),
    "mimo_v2_flash": Recipe({"num_key_value_heads": 2}),
    "muse_spark": Recipe(
        gains={"mlp.gate": 4.0},
        notes="Without the gain the routing hardly depends on the token.",
    ),
    "nemotron_h": Recipe({"layers_block_type": ["attention", "moe"]}),
    "phimoe": Recipe(stochastic_in_train="the router adds Gumbel noise; equal seeds give equal outputs"),
    # aot_eager alone, without samoyeds, raises "view size is not compatible" for these three in training.
    "qwen3_5_moe": Recipe({"layer_types": LINEAR_THEN_FULL}, train_base="inductor"),
    "qwen3_next": Recipe({"layer_types": LINEAR_THEN_FULL}, train_base="inductor"),
    "qwen3_omni_moe-Qwen3OmniMoeTalkerTextExperts": Recipe(
        {"shared_expert_intermediate_size": 48},
        feed=("inputs_embeds",),
        notes="The talker's forward applies to input_ids an embed_tokens which it does not have.",
    ),
    "qwen4_exp": Recipe({"hc_lowrank": 16}, train_base="inductor"),
    "zaya": Recipe(
        {"num_experts_per_tok": 1, "router_hidden_size": 32},
        gains={"router_mlp": 5.0},
        notes="Without the gain each token goes to one expert. One more class of the router means no expert.",
    ),
}

# Not decorated: MoE in other forms, and modules that only look like MoE.
UNDECORATED: dict[str, Recipe] = {
    "dbrx": Recipe(
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "moe_num_experts": 8,
                "moe_top_k": 2,
                "ffn_act_fn": {"name": "silu"},
            },
        },
        experts="DbrxExperts",
        graph_breaks=DATA_DEPENDENT_LOOP,
    ),
    "doge": Recipe(
        {"is_moe": True, "num_experts": 16},
        experts="DogeCDMoE",
        notes="The experts are rows of an embedding, not matrices.",
    ),
    "jetmoe": Recipe(
        {"kv_channels": 16},
        experts="JetMoeParallelExperts",
        graph_breaks="the experts' inputs are split by a list of token counts",
        notes="Routed projections around the attention as well as in the MLP: four such modules a layer.",
    ),
    "llama4": Recipe(
        {"num_experts_per_tok": 1},
        experts="Llama4TextExperts",
        notes="Dense: every expert sees every token, which is scaled by its score before.",
    ),
    "longcat_flash": Recipe(
        {"zero_expert_num": 2},
        experts="LongcatFlashExperts",
        graph_breaks=DATA_DEPENDENT_LOOP,
        notes="Two of the router's experts are the identity.",
    ),
    "nllb_moe": Recipe(
        {
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "expert_capacity": 8,
        },
        experts="NllbMoeExperts",
        model="NllbMoeForConditionalGeneration",
        graph_breaks=DATA_DEPENDENT_LOOP,
    ),
    "step3p7": Recipe(
        {
            "share_expert_dim": 48,
            "swiglu_limits": [None, 7.0],
            "swiglu_limits_shared": [None, 7.0],
            "layer_types": ["full_attention", "full_attention"],
        },
        experts="Step3p7Experts",
        graph_breaks=DATA_DEPENDENT_LOOP,
    ),
    "switch_transformers": Recipe(
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_heads": 4,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 8,
            "router_jitter_noise": 0.0,
        },
        experts="SwitchTransformersExperts",
        model="SwitchTransformersForConditionalGeneration",
        graph_breaks=DATA_DEPENDENT_LOOP,
    ),
    "vitpose_backbone": Recipe(
        {
            "image_size": [64, 48],
            "patch_size": [16, 16],
            "num_experts": 3,
            "part_features": 16,
            "mlp_ratio": 2,
        },
        experts="VitPoseNaiveMoe",
        model="VitPoseBackbone",
        feed=("pixel_values", "dataset_index"),
        notes="The data set of an image selects the expert; there is no router.",
    ),
}
