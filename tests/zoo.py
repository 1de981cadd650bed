"""Tiny random models of mlx-lm's architectures: everything an adapter has to fit.

A model is its COMMON arguments and what is its own; every ModelArgs takes the keys that it knows.
"""

import copy
import importlib
import importlib.util
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import cpu, models

WIDTH, INNER, HEAD, VOCABULARY = 64, 128, 16, 96
WINDOW = 4  # narrower than the texts, so that a sliding window is felt
GROUP = {"affine": 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}  # weights that share a scale

# fmt: off
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "head_dim": HEAD,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INNER,
    "rms_norm_eps": 1e-5, "norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5, "rotary_dim": 8,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "use_qk_norm": True,
    "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_conv_bias": True,
    # experts, by each of their names
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2,
    "moe_intermediate_size": 64, "expert_ffn_hidden_size": 64, "shared_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "share_expert_dim": 64,
    "n_shared_experts": 1, "num_shared_experts": 1, "num_shared_expert": 1,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "routed_scaling_factor": 1.0,
    "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    # latent attention
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD,
    "v_head_dim": HEAD, "index_head_dim": 32, "index_n_heads": 4, "index_topk": 4,
    # convolutions and recurrences
    "conv_L_cache": 3, "conv_bias": False, "conv_kernel": 4, "state_size": 16, "n_groups": 1,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD, "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
SLIDING_PATTERN = {"sliding_window": WINDOW, "sliding_window_pattern": 2}
CONVOLVED = {"layer_types": ["conv", "full_attention"]}
UNTIED = {"tie_word_embeddings": False}
HEADS_ALIKE = {"num_key_value_heads": 4}
GPT = {"n_embd": WIDTH, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_ctx": 64}
SCALED = {"logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0,
          "residual_multiplier": 0.5}
MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
PLAIN_ROPE = {kind: {"rope_theta": 10000.0, "rope_type": "default"}
              for kind in SLIDING["layer_types"]}
SCALED_ROPE = {"rope_parameters": {
    "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64,
    "type": "default"}}
LONGCAT = {"num_layers": 2, "ffn_hidden_size": INNER, "zero_expert_num": 2,
           "zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
           "attention_method": "MLA"}
MAMBA_LIKE = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_heads": 4, "mamba_d_head": HEAD,
              "mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_proj_bias": False}
KDA = {"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 4,
                              "head_dim": HEAD, "short_conv_kernel_size": 4}}
LFM2 = {**CONVOLVED, "block_dim": WIDTH, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False}
WIDER = {"hidden_size": 128, "head_dim": 32, "linear_key_head_dim": 32,
         "linear_value_head_dim": 32}
HADAMARD = {  # a pack in which every linear layer is rotated and packed
    "tensor_namespace": "mlx-vlm-qwen3_5",
    "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    "modules": [
        {"path": f"model.{path}", "embedding": path == "embed_tokens", "dtype": "float16",
         "block": 0}
        for path in (
            "embed_tokens",
            *(f"layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")),
            *(f"layers.1.self_attn.{n}_proj" for n in "qkvo"),
            *(f"layers.0.linear_attn.{n}" for n in (
                "in_proj_a", "in_proj_b", "in_proj_z", "in_proj_qkv", "out_proj")))]}
GEMMA3N = {
    **SLIDING, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY,
    "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0, "laurel_rank": 16,
    "activation_sparsity_pattern": [0.5, 0.0], "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2, "altup_coef_clip": 120.0, "altup_correct_scale": True,
    "altup_active_idx": 0}
GEMMA4 = {**SLIDING_PATTERN, "global_head_dim": 32, "num_kv_shared_layers": 0,
          "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}


def within(inner: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """A model with eyes: the language model inside, which is all that mlx-lm keeps of it."""
    return {"text_config": {**COMMON, **(extra or {}), "model_type": inner}}


DENSE: dict[str, dict[str, Any]] = {
    "llama": {}, "llama untied": UNTIED, "qwen2": {}, "qwen2 untied": UNTIED,
    "qwen3": {}, "qwen3 untied": UNTIED, "gemma": {}, "phi3": {}, "olmo2": {}, "cohere": {},
    "starcoder2": {}, "helium": {}, "internlm2": {}, "internlm3": {}, "glm": {}, "glm4": {},
    "seed_oss": UNTIED, "seed_oss tied": {}, "ernie4_5": {}, "hunyuan_v1_dense": {}, "mimo": {},
    "nanbeige": {}, "talkie": {}, "telechat3": {}, "youtu_llm": {}, "gpt2": GPT, "gptj": GPT,
    "granite": SCALED, "phi": HEADS_ALIKE, "nanochat": HEADS_ALIKE, "exaone": {"num_layers": 2},
    "gemma2": {"query_pre_attn_scalar": HEAD},
    "qwen": {"no_bias": True, "kv_channels": HEAD},
    "gpt_bigcode": {**GPT, "n_inner": INNER},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "stablelm": {"use_qkv_bias": True},
    "minicpm": {**MINICPM, **UNTIED}, "minicpm tied": MINICPM,
    "minicpm3": {**MINICPM, **HEADS_ALIKE, "rope_scaling": YARN},
    "smollm3": {"no_rope_layer_interval": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
        {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}}]},
    "apertus": {"post_norm": False, "qk_norm": True},
    "openelm": {"num_transformer_layers": 2, "model_dim": WIDTH, "ffn_dim_divisor": 32,
                "num_query_heads": [4, 4], "num_kv_heads": [2, 2], "ffn_multipliers": [2.0, 2.0]},
    "plamo": {"n_shared_head": 2},
    "llama4_text": {**UNTIED, "intermediate_size_mlp": INNER, "no_rope_layers": [1, 0]},
    "llama4_text tied": {"intermediate_size_mlp": INNER, "no_rope_layers": [1, 0]},
    "lille-130m": {**GPT, "block_size": 64, "n_kv_heads": 2},
    "afm7": {"hidden_dim": WIDTH, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4,
             "num_kv_heads": 2},
    "phi3small": {"vocab_size": 100352,  # it writes at token ids up to here, whatever the size
                  "dense_attention_every_n_layers": 2, "ff_intermediate_size": INNER,
                  "gegelu_limit": 20.0, "blocksparse_block_size": 32},
    "bitnet": {},
    "qwen2_vl": within("qwen2"), "qwen3_vl": within("qwen3"), "pixtral": within("llama"),
    "iquestloopcoder": {"loop_window_size": WINDOW},
}
WINDOWS: dict[str, dict[str, Any]] = {
    "llama sliding": SLIDING, "olmo3": SLIDING, "gear": SLIDING, "muse_glimmer": SLIDING,
    "gemma3_text": SLIDING_PATTERN, "cohere2": SLIDING_PATTERN,
    "exaone4": {**SLIDING_PATTERN, "sliding_window_pattern": "LG"},
    "gemma3": within("gemma3_text", SLIDING_PATTERN),
    "gemma3n": within("gemma3n_text", GEMMA3N),
    "gemma3n every": within("gemma3n_text", GEMMA3N),
    "gemma4_text": GEMMA4, "gemma4": within("gemma4_text", GEMMA4),
    "ministral3": {**SLIDING, **SCALED_ROPE},
    "mistral3": within("ministral3", {**SLIDING, **SCALED_ROPE}),
    "spark2_5": {**SLIDING, "rope_parameters": PLAIN_ROPE},
    "plamo3": {**SLIDING_PATTERN, "window_size": WINDOW},
    "baichuan_m1": {**UNTIED, "sliding_window": WINDOW, "sliding_window_layers": [0],
                    "conv_window": 2},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {}, "olmoe": {}, "deepseek": {},
    "deepseek_v3": {}, "deepseek_v32": {}, "dots1": {}, "Klear": {}, "glm4_moe": {},
    "glm4_moe_lite": {}, "bailing_moe": {}, "minimax": {}, "solar_open": {},
    "granitemoe": SCALED, "mistral4": SCALED_ROPE, "longcat_flash": LONGCAT,
    "gpt_oss": SLIDING, "afmoe": SLIDING,
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": YARN},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0}},
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3,
                            "emb_split_num": 2},
    "exaone_moe": {**SLIDING, "is_moe_layer": [False, True]},
    "laguna": {**SLIDING, "mlp_layer_types": ["dense", "sparse"]},
    "mellum": {**SLIDING, "rope_parameters": PLAIN_ROPE},
    "step3p5": {**SLIDING, "num_attention_groups": 2, "moe_layers_enum": "1",
                "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2}},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2,
                "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": WIDTH, "num_heads": 4, "num_layers": 2},
    "phimoe": {"rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8,
                                "long_mscale": 1.0, "short_mscale": 1.0}},
    "dbrx": {"d_model": WIDTH, "n_layers": 2, "n_heads": 4,
             "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "llama4": within("llama4_text", {
        "num_hidden_layers": 4, "num_experts_per_tok": 1, "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 1, "intermediate_size_mlp": INNER, "rope_traditional": True}),
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1], "sliding_window_size": WINDOW,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "layernorm_epsilon": 1e-5, "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": HEAD, "swa_v_head_dim": HEAD},
    "lfm2_moe": {**CONVOLVED, "use_expert_bias": True},
    "deepseek_v41": {"head_dim": 32, "o_groups": 2, "o_lora_rank": 32, "sliding_window": WINDOW,
                     "compress_ratios": [0, 2], "kv_source_layer_ids": [1],
                     "index_source_layer_ids": [1]},
    "minimax_m3_vl": within("minimax_m3", {"dense_intermediate_size": INNER,
                                           "moe_layer_freq": [0, 1]}),
    "muse_spark": within("muse_spark_text", {
        **SLIDING, "post_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0},
        "layer_rope_theta": [10000.0, 0], "final_logit_softcapping": 20.0,
        "output_multiplier": 0.2, "moe_hidden_size": WIDTH, "num_shared_experts": 0}),
    "qwen3_vl_moe": within("qwen3_moe"),
    "kimi_vl": within("deepseek_v3"), "kimi_k25": within("deepseek_v3"),
}
STATES: dict[str, dict[str, Any]] = {
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": HEAD, "time_step_limit": (0.001, 100.0),
               "time_step_rank": 4},
    "falcon_h1": {**MAMBA_LIKE, "mamba_d_ssm": WIDTH, "mamba_chunk_size": 8},
    "jamba": {**MAMBA_LIKE, "attn_layer_offset": 1, "attn_layer_period": 2,
              "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_expand": 2},
    "recurrent_gemma": {"conv1d_width": 4, "logits_soft_cap": 30.0, "num_key_value_heads": 1,
                        "attention_window_size": WINDOW,
                        "block_types": ["recurrent", "attention"]},
    "rwkv7": {"a_low_rank_dim": 16, "v_low_rank_dim": 16, "gate_low_rank_dim": 16,
              "decay_low_rank_dim": 16},
    "lfm2": LFM2, "lfm2-vl": within("lfm2", LFM2),
    "granitemoehybrid": {**SCALED, **MAMBA_LIKE, "mamba_n_heads": 8,
                         "layer_types": ["mamba", "attention"]},
    "qwen3_next": {}, "qwen3_5": within("qwen3_5_text", {"num_experts": 0}),
    "qwen3_5_moe": within("qwen3_5_text"),
    "prism_hadamard_qwen35": {
        **within("qwen3_5_text", {**WIDER, "num_experts": 0}), **HADAMARD},
    "olmo_hybrid": {"linear_allow_neg_eigval": True,
                    "layer_types": ["linear_attention", "full_attention"]},
    "plamo2": {"hidden_size_per_head": HEAD, "attention_window_size": WINDOW, "mamba_step": 2,
               "full_attention_idx": [], "mamba_d_state": 16, "mamba_num_heads": 4},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": HEAD, "mamba_proj_bias": False,
                   "ssm_state_size": 16, "hybrid_override_pattern": "M*-E",
                   "moe_shared_expert_intermediate_size": 64},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_v3": {"layer_group_size": 2, "moe_shared_expert_intermediate_size": 64},
    "kimi_linear": {**KDA, "model_max_length": 64},
    "kimi_k3": within("kimi_linear", KDA),
}
# fmt: on
KEYS = {  # where the default, every linear layer, is too much
    "gemma3n": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
KINDS = {"dense": DENSE, "sliding window": WINDOWS, "experts": EXPERTS, "state space": STATES}
KIND_OF = {name: kind for kind, group in KINDS.items() for name in group}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: {**COMMON, **extra, "model_type": name.split()[0]}
    for group in KINDS.values()
    for name, extra in group.items()
}
TIED = "it multiplies by the tied embedding's weight as if that were not packed; untied it packs"
NO_METAL = {"runs": "No Metal back-end"}
NO_MERGE = {"padded": "takes no rows of different lengths"}
NO_WEIGHT: dict[str, str] = dict.fromkeys(
    ("harmless", "gradients", "switched off", "loads", "decodes", "padded", "fast path"),
    "no attribute 'weight'",
)
Faults = dict[str, tuple[dict[str, str], str]]  # checks that fail, how they say so, and why
LIMITS: Faults = {  # mlx-lm's
    "bitnet": (NO_METAL, "its ternary layers are a Metal kernel"),
    "muse_spark": (NO_METAL, "its attention is a Metal kernel (qk_norm_rope)"),
    "recurrent_gemma": (
        {"runs": "_no_grad"},
        "its `Model.__init__` leaves out `super().__init__()`, so that `freeze()` fails",
    ),
    "seed_oss tied": ({"4 bit": "matmul"}, TIED),
    "minicpm tied": ({"4 bit": "matmul"}, TIED),
    "llama4_text tied": ({"4 bit": "matmul"}, TIED),
    "gemma2": ({"padded": "broadcast"}, "its attention takes no mask of a left-padded batch"),
    "gpt_bigcode": ({"padded": "length-1"}, "it counts positions once for the whole batch"),
    "phi3small": (
        {"decodes": "differs", "padded": "broadcast"},
        "its block-sparse layers add a boolean mask to the scores, so that a token sees those "
        "after it when they are there; a left-padded mask does not fit them",
    ),
    "plamo3": (
        {"decodes": "differs", "padded": "differs"},
        "without a cache its window is one token wider than with one; equal up to the window",
    ),
    "afm7": (
        {"4 bit": "mode", "padded": "differs"},
        "its fused layer takes no `mode` when packed, and brings its own LoRA class, so that it "
        "is left out; its last layers count positions from the padded start",
    ),
    "gemma3n every": (
        NO_WEIGHT,
        "it reads the weight of two of its linear layers (`altup.*_coefs`) itself, which an "
        "adapter hides; with the keys of attention and MLP it works, as `gemma3n`",
    ),
    "deepseek_v32": ({"gradients": "indexer"}, "its indexer only picks tokens: B stays 0 there"),
    "glm_moe_dsa": ({"gradients": "indexer"}, "its indexer only picks tokens: B stays 0 there"),
    "phimoe": (
        {"gradients": "gate"},
        "its router learns only where two experts come within its jitter of each other",
    ),
    "prism_hadamard_qwen35": (
        {"attaches": "no linear layer"},
        "its linear layers are all `HadamardQuantizedLinear`, which mlx-lm's LoRA does not know",
    ),
    "llama4": (NO_MERGE, "its `ChunkedKVCache` takes rows of one length only"),
    "deepseek_v41": (
        {"gradients": "VJP with respect to indices", **NO_MERGE},
        "it picks experts and rounds to FP4 by indices at which no gradient is stopped; its "
        "`LayerCache` takes rows of one length only",
    ),
}
UNTRIED = {"olmo": "it needs the package ai2-olmo, and ends the process without it"}


def expected(name: str) -> dict[str, str]:
    """The checks that are known to fail, and how they say so."""
    return LIMITS.get(name, ({}, ""))[0]


def broken(name: str, *checks: str) -> bool:
    """True where one of these checks is known to fail."""
    return bool(expected(name).keys() & set(checks))


def known(name: str) -> bool:
    """False where this mlx-lm does not have the architecture."""
    return (
        importlib.util.find_spec(f"mlx_lm.models.{ARCHITECTURES[name]['model_type']}") is not None
    )


def build(
    name: str, bits: int | None = None, dtype=mx.float32, *, mode: str = "affine", seed: int = 0
) -> nn.Module:
    """A frozen model with random weights from `seed`, packed as mlx-lm packs this architecture."""
    cpu.settle()
    mx.random.seed(seed)
    module = importlib.import_module(f"mlx_lm.models.{ARCHITECTURES[name]['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(ARCHITECTURES[name])))
    awaken(model)
    model.set_dtype(dtype)
    if bits:
        model, _ = models.quantized(model, {}, bits=bits, group_size=GROUP[mode], mode=mode)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def awaken(model: nn.Module) -> None:
    """Give parameters that start at zero small random values, lest a branch be dead by design."""
    weights = dict(tree_flatten(model.parameters()))
    asleep = [(k, v) for k, v in weights.items() if v.dtype == mx.float32 and not mx.any(v).item()]
    model.load_weights([(k, 0.1 * mx.random.normal(v.shape)) for k, v in asleep], strict=False)
