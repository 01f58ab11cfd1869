"""A tiny configuration of every causal language model that Transformers has.

A configuration starts from its class's defaults. Whatever counts layers, heads, widths or experts is made small by the
name of its field; layers of unlike kinds are kept, one of each. `EXCEPTIONS` holds what no rule can know.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, HIDDEN, HEADS, KV_HEADS = 64, 32, 4, 2
CONTEXT, WINDOW = 64, 6  # rows of `checks.ROWS` are shorter and longer than a window
PAD, EOS, BOS = 0, 1, 2

# The first rule whose pattern is a field's whole name gives its value; a number no larger than that stays.
RULES: list[tuple[str, int]] = [
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"type_vocab_size|task_type_vocab_size|n_langs", 2),
    (r"(decoder_|encoder_|num_decoder_|num_encoder_)?(hidden_|num_hidden_)?layers|n_layers?|num_layers", 2),
    (r"(num_)?(hidden_layers|decoder_layers|encoder_layers|blocks|layers_per_stack)", 2),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"head_dim|qk_(nope|rope)_head_dim|v_head_dim|index_head_dim|d_head|dim_head|kv_channels|attention_head_size", 8),
    (r".*(?<!qk)_head_dim", 8),
    (r".*(kv_heads|key_value_heads|query_groups)|linear_num_key_heads", KV_HEADS),
    (r"index_n_heads", 16),  # fewer would often agree on 0 for several tokens, and which of them is taken is chance
    (r".*heads?", HEADS),
    (r".*attn_layer_period|expert_layer_period", 2),
    (r".*_offset", 1),
    (
        r"(sliding_)?window(_size)?|sliding_window_size|attention_window_size|attention_chunk_size|local_attention",
        WINDOW,
    ),
    (r"(max|n)_position.*|n_ctx|max_target_positions|max_source_positions|context_length|model_max_length", CONTEXT),
    (r"rotary_dim", 4),
    (r"index_topk", 4),  # rows of `checks.ROWS` have fewer and more tokens
    (r".*(experts_per_tok(en)?|moe_topk|moe_k|top_k)", 2),
    (r".*(shared_experts|num_shared)", 1),
    (r"(n_|num_|num_local_|moe_num_|.*routed_)experts", 4),
    (r"(n|num|topk|num_expert)_groups?|topk_group|mamba_n(_)?groups", 1),
    (r".*(state_size|d_state)", 8),
    (r".*chunk_size|.*block_size|index_block_size", 4),
    (r".*moe.*intermediate_size|shared_.*intermediate_size|expert_ffn_hidden_size", 24),
    (r".*(intermediate_size.*|ffn_dim|n_inner|dff|dim_ff|d_inner|feed_forward_size|ffn_hidden_size)", 48),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embedding_dim|lru_width|mamba_d_ssm|_hidden_size)", HIDDEN),
    (r"dim|.*(_proj_dim|embed_dim|embedding_size)", HIDDEN),
    (r".*_lora_rank|.*_rank|d_rel", 8),
    (r"image_size", 32),
    (r"max_window_layers", 1),
]

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXED = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
# Fields that the rules get wrong, by model type, and by sub-configuration below it.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "o_groups": 2, "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {
        "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note.vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note.audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6, "<|visual token 000000|>": 7}},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_assistant.text_config": {
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2,
    },
    "gemma4_unified_assistant.text_config": {"num_kv_shared_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 1},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp.text_config": INDEXED,
    "qwen4_exp_text": INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8), "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "attention_head_dim": 16, "attention_hidden_size": 64,
    },
}  # fmt: skip


def model_types() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _small(name: str, value: int) -> int:
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return value


def _layer_count(config: Any) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"):
        value = vars(config).get(name)
        if isinstance(value, int) and value:
            return value
    return getattr(config, "num_hidden_layers", None)


def shrunken(config: Any, model_type: str, more: dict[str, Any] | None = None) -> Any:
    """A small configuration of the class of `config`."""
    changes: dict[str, Any] = {}
    sub_configs = set(config.sub_configs)
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    layers = _layer_count(config)
    per_layer = {
        k: v
        for k, v in fields.items()
        if isinstance(v, list) and layers and len(v) == layers > 2 and len(set(map(str, v))) < layers
    }
    if per_layer:
        kinds = list(dict.fromkeys(zip(*(map(str, v) for v in per_layer.values()), strict=True)))
        chosen = [
            next(i for i, k in enumerate(zip(*(map(str, v) for v in per_layer.values()), strict=True)) if k == kind)
            for kind in kinds
        ]
        if len(chosen) == 1:
            chosen *= 2
    for name, value in fields.items():
        if name in sub_configs:
            changes[name] = None if value is None else shrunken(value, f"{model_type}.{name}")
        elif name in per_layer:
            changes[name] = [value[i] for i in chosen]
        elif isinstance(value, bool) or name.endswith(("_token_id", "_index")):
            continue
        elif isinstance(value, int):
            small = _small(name, value)
            if name == "num_key_value_heads" and value == fields.get("num_attention_heads"):
                small = HEADS
            if per_layer and value == layers and small == 2:
                small = len(chosen)
            if small != value:
                changes[name] = small
        elif name == "rope_parameters" and isinstance(value, dict):
            changes[name] = copy.deepcopy(value)
    for name, value in {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}.items():
        if hasattr(config, name):
            changes[name] = value
    for name in ("initializer_range", "init_std"):
        if name in fields:
            changes[name] = 0.1
    if "is_decoder" in fields:
        changes["is_decoder"] = True
    changes |= copy.deepcopy({**EXCEPTIONS.get(model_type, {}), **(more or {})})
    return type(config)(**changes)


def _jittered(model_type: str) -> dict[str, float]:
    """Noise of a router, where the family has any."""
    return {name: 0.1 for name in vars(CONFIG_MAPPING[model_type]()) if name.endswith("jitter_noise")}


def _rope(kind: str) -> dict[str, Any]:
    """Positions that depend on the longest row of a batch, or do not ("yarn")."""
    common = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    if kind == "longrope":
        common |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    # Dynamic scaling begins at max_position_embeddings.
    return {"rope_parameters": common, **({"max_position_embeddings": 8} if kind == "dynamic" else {})}


# What a family can also be, as real checkpoints are: name -> (model type, fields).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama+dynamic": ("llama", _rope("dynamic")),
    "llama+longrope": ("llama", _rope("longrope")),
    "llama+yarn": ("llama", _rope("yarn")),
    # Phi's generate begins anew at this limit. Real checkpoints that go beyond it have LongRoPE; with other positions
    # some versions forget the prompt there.
    "phi3+longrope": ("phi3", {**_rope("longrope"), "original_max_position_embeddings": 8}),
    "phi4_multimodal+longrope": ("phi4_multimodal", {**_rope("longrope"), "original_max_position_embeddings": 8}),
    "falcon+alibi": ("falcon", {"alibi": True}),
    "falcon+new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode+heads": ("gpt_bigcode", {"multi_query": False}),
    "opt+projection": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "qwen2+window": ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    "mistral+window": ("mistral", {"sliding_window": WINDOW}),
    "granite+scaled": ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
}


def names() -> list[str]:
    """Every entry of the zoo: each model type, and the variants."""
    return model_types() + list(VARIANTS) + [f"{name}+jitter" for name in model_types() if _has_jitter(name)]


def _has_jitter(model_type: str) -> bool:
    try:
        return bool(_jittered(model_type))
    except Exception:
        return False


def config_of(name: str) -> Any:
    """The tiny configuration of an entry."""
    model_type, _, variant = name.partition("+")
    changes: dict[str, Any] = {}
    if variant == "jitter":
        changes = _jittered(model_type)
    elif variant:
        model_type, changes = VARIANTS[name]
    return shrunken(CONFIG_MAPPING[model_type](), model_type, changes)
