"""The families that hetkv reads: for each, its fields with their defaults, and how it differs from Llama.

Defaults are those of `transformers`' configuration classes; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from hetkv.models.config import Norms

GEOMETRY = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Fields that a file must have: a default is of no use there."""

COMMON: dict[str, Any] = {
    **dict.fromkeys(GEOMETRY),
    "model_type": None,
    "architectures": None,
    "intermediate_size": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "quantization_config": None,
    "eos_token_id": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "use_mrope": False,
    "per_layer_config": None,
    "pruned_heads": {},
}
"""Fields of every family. The last ones describe what no family here does: only their defaults are accepted."""
FIXED = tuple(COMMON)[list(COMMON).index("is_causal") :]

_NAMES = """
transformers_version torch_dtype dtype use_cache initializer_range attention_dropout resid_pdrop embd_pdrop
residual_dropout embedding_dropout hidden_dropout attn_pdrop bos_token_id pad_token_id sep_token_id unk_token_id
pretraining_tp _model_name_or_path _name_or_path name_or_path
_commit_hash _attn_implementation _attn_implementation_autoset _source
attn_implementation auto_map tokenizer_class id2label label2id num_labels problem_type finetuning_task
output_attentions output_hidden_states return_dict torchscript use_bfloat16 is_decoder prefix
task_specific_params output_router_logits router_aux_loss_coef aux_loss_alpha aux_loss_coef seq_aux
router_jitter_noise tie_encoder_decoder cross_attention_hidden_size gradient_checkpointing
do_sample temperature top_k top_p typical_p max_length return_dict_in_generate output_scores
num_return_sequences remove_invalid_values early_stopping length_penalty ep_size unsloth_version unsloth_fixed
"""
HARMLESS = frozenset(_NAMES.split())
"""Keys that change no value that a decoder computes: training, bookkeeping, sampling, other ways to run it."""


EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
"""Names of the number of experts, of which `transformers` takes one for the other."""


class Family(NamedTuple):
    """One `model_type`."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    """Fields and defaults beyond `COMMON`, or other than there."""
    options: Mapping[str, Any] = {}
    """Fields of `ModelConfig` that the family fixes."""
    sliding_windows: Literal["none", "all", "switched", "switched_all", "alternating"] = "none"
    period: int = 0
    """`alternating`: each `period`-th layer has full attention."""
    experts: Literal["none", "flat", "sparse_step", "first_dense"] = "none"
    rope: Mapping[str, Any] = {}
    """Rotary embedding that a file without any has."""
    nested_rope: bool = False
    """Layers with a sliding window have a rotary embedding of their own."""
    partial_rotary: bool = False
    """It rotates a part of a head's channels where `partial_rotary_factor` says so."""
    fixed: Mapping[str, tuple[Any, ...]] = {}
    """Keys of which only these values are read."""
    computed: bool = True
    """The reference runtime computes it; otherwise it is read for its sizes."""


_SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_GEMMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True,
          "attention_bias": False, "use_bidirectional_attention": None, "eos_token_id": 1}  # fmt: skip
_GEMMA_2 = {**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "layer_types": None, "intermediate_size": 9216}  # fmt: skip
_SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_POST = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_GLM_POST = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_ONE_WAY = {"use_bidirectional_attention": (None, False)}
_GELU = {"hidden_act": ("gelu_pytorch_tanh", "gelu", "silu"), **_ONE_WAY}
_GLM = {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
        "attention_bias": True, "partial_rotary_factor": 0.5, "eos_token_id": [151329, 151336, 151338]}  # fmt: skip
_MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "qk_head_dim": None, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "attention_bias": False, "eos_token_id": 1,
        "topk_method": None, "scoring_func": None}  # fmt: skip
_V3 = {"topk_method": ("noaux_tc", None), "scoring_func": ("sigmoid", None), "moe_layer_freq": (1,),
       "rope_interleave": (True,)}  # fmt: skip
_MTP = {"num_nextn_predict_layers": None, "num_mtp_layers": None}
_DEEPSEEK_3 = {**_MLA, **_MTP, "max_position_embeddings": 4096, "rope_interleave": True}
_OLMO = {"attention_bias": False, "rms_norm_eps": 1e-5, "eos_token_id": 50279}

_ALL = (
    Family("llama", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False, "eos_token_id": 2}),
    Family(
        "mistral", "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "eos_token_id": 2},
        sliding_windows="all",
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", {**_SLIDING, "num_key_value_heads": 32, "max_position_embeddings": 32768},
        options={"qkv_bias": True}, sliding_windows="switched",
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM",
        {**_SLIDING, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768,
         "attention_bias": False},
        options={"qk_norm": "head"}, sliding_windows="switched",
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "attention_bias": False, "intermediate_size": 6144,
         "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": None, "decoder_sparse_step": 1,
         "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False,
         "mlp_only_layers": None},
        options={"qk_norm": "head"}, sliding_windows="switched_all", experts="sparse_step",
    ),
    Family(
        "mixtral", "MixtralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": None,
         "num_experts_per_tok": 2, "num_local_experts": 8, "rope_theta": 1e6, "eos_token_id": 2},
        sliding_windows="all", experts="flat",
    ),
    Family(
        "gemma", "GemmaForCausalLM",
        {**_GEMMA, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
        options={"unit_offset": True},
        fixed={**_ONE_WAY, "hidden_activation": (None, "gelu_pytorch_tanh")},
    ),
    Family(
        "gemma2", "Gemma2ForCausalLM", {**_GEMMA_2, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        options={"unit_offset": True, "norms": _SANDWICH}, sliding_windows="alternating", period=2, fixed=_GELU,
    ),
    Family(
        "gemma3_text", "Gemma3ForCausalLM",
        {**_GEMMA_2, "max_position_embeddings": 131072, "final_logit_softcapping": None,
         "attn_logit_softcapping": None, "use_bidirectional_attention": False, "rope_theta": 1e6,
         "rope_local_base_freq": 1e4, "sliding_window_pattern": 6, "_sliding_window_pattern": None,
         "vocab_size": 262208, "num_attention_heads": 8},  # its own files leave them out
        options={"unit_offset": True, "norms": _SANDWICH, "qk_norm": "head"}, sliding_windows="alternating", period=6,
        nested_rope=True,
        fixed={**_GELU, "attn_logit_softcapping": (None,), "original_max_position_embeddings": (None,)},
    ),
    Family(
        "phi3", "Phi3ForCausalLM",
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
         "sliding_window": None, "eos_token_id": 32000, "attention_bias": False},
        options={"fused_qkv": True, "fused_gate_up": True}, sliding_windows="all", partial_rotary=True,
        fixed={"attention_bias": (False,)},
    ),
    Family(
        "gpt_oss", "GptOssForCausalLM",
        {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "max_position_embeddings": 131072,
         "rms_norm_eps": 1e-5, "num_experts_per_tok": 4, "experts_per_token": None, "num_local_experts": 128,
         "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "layer_types": None, "attention_bias": True,
         "rope_theta": 10000.0, "initial_context_length": None},
        options={"sinks": True}, sliding_windows="alternating", period=2, experts="flat",
        rope={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
              "original_max_position_embeddings": 4096},
        fixed={"hidden_act": ("silu",)},
    ),
    Family("glm", "GlmForCausalLM", _GLM, options={"fused_gate_up": True}, partial_rotary=True),
    Family(
        "glm4", "Glm4ForCausalLM", _GLM, options={"fused_gate_up": True, "norms": _GLM_POST}, partial_rotary=True,
    ),
    Family("olmo2", "Olmo2ForCausalLM", _OLMO, options={"qk_norm": "all", "norms": _POST}),
    Family(
        "olmo3", "Olmo3ForCausalLM", {**_OLMO, "sliding_window": 4096, "layer_types": None},
        options={"qk_norm": "all", "norms": _POST}, sliding_windows="alternating", period=4, nested_rope=True,
        fixed={"original_max_position_embeddings": (None,)},
    ),
    Family(
        "granite", "GraniteForCausalLM",
        {"attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
         "residual_multiplier": 1.0, "attention_multiplier": 1.0, "eos_token_id": 2},
    ),
    Family(
        "deepseek_v2", "DeepseekV2ForCausalLM",
        {**_MLA, "n_shared_experts": 2, "n_routed_experts": 64, "routed_scaling_factor": 1.0, "n_group": None,
         "topk_group": None, "topk_method": "greedy", "norm_topk_prob": False, "num_experts_per_tok": None,
         "first_k_dense_replace": 0, "moe_intermediate_size": 1407, "eos_token_id": 2, "mlp_bias": False},
        experts="first_dense",
        fixed={"topk_method": ("greedy", "group_limited_greedy"), "scoring_func": ("softmax", None),
               "moe_layer_freq": (1,), "mlp_bias": (False,), "norm_topk_prob": (False, None)},
    ),
    Family(
        "deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK_3,
        experts="first_dense", fixed=_V3, computed=False,
    ),
    Family(
        "kimi_k2", "DeepseekV3ForCausalLM", _DEEPSEEK_3,
        experts="first_dense", fixed=_V3, computed=False,
    ),
    Family(
        "glm_moe_dsa", "GlmMoeDsaForCausalLM",
        {**_MLA, **_MTP, "q_lora_rank": 2048, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1,
         "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "index_topk": 2048, "index_head_dim": 128,
         "index_n_heads": 32, "rope_interleave": True, "head_dim": 64, "mlp_bias": False, "layer_types": None,
         "mlp_layer_types": None, "indexer_types": None, "indexer_rope_interleave": True},
        experts="first_dense", computed=False, fixed={**_V3, "mlp_bias": (False,)},
    ),
    Family(
        "minimax_m2", "MiniMaxM2ForCausalLM",
        {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608, "num_experts_per_tok": 8,
         "num_local_experts": 256, "rotary_dim": None, "use_qk_norm": True, "qk_norm_type": None, "scoring_func": None,
         "use_routing_bias": True, "shared_intermediate_size": 0, "attn_type_list": None, "eos_token_id": 200020},
        options={"qk_norm": "all"}, experts="flat", computed=False, partial_rotary=True,
        fixed={"shared_intermediate_size": (0, None), "attn_type_list": (None,)},
    ),
    Family(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768, "attention_bias": False,
         "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
         "linear_num_key_heads": 16, "linear_num_value_heads": 32, "moe_intermediate_size": 512,
         "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8, "num_experts": 256, "layer_types": None,
         "full_attention_interval": 4, "partial_rotary_factor": 0.25, "attn_output_gate": True, "mlp_only_layers": None,
         "norm_topk_prob": True, "decoder_sparse_step": 1, "intermediate_size": 0, "mtp_num_hidden_layers": None},
        options={"qk_norm": "head", "unit_offset": True}, experts="sparse_step", partial_rotary=True, computed=False,
        fixed={"attn_output_gate": (True,)},
    ),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


class Wrapper(NamedTuple):
    """A model that reads more than text: one of the families is its `text_config`."""

    family: str
    architecture: str
    other_parts: frozenset[str]
    """Keys about what it reads besides text, which change nothing about texts."""


_GEMMA_PARTS = "vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index"
_MISTRAL_PARTS = (
    "vision_config image_token_index projector_hidden_act vision_feature_layer multimodal_projector_bias "
    "spatial_merge_size"
)
_QWEN_PARTS = "vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id"
WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", "Gemma3ForConditionalGeneration", frozenset(_GEMMA_PARTS.split())),
    "mistral3": Wrapper("mistral", "Mistral3ForConditionalGeneration", frozenset(_MISTRAL_PARTS.split())),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration", frozenset(_QWEN_PARTS.split())),
}
"""By their `model_type`."""
