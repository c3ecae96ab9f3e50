"""Tiny configs of transformers' language models, by model type.

`tiny_config` fills in the sizes that a config class has by the names that most of them share; the
rows of `OWN` are for the others. `NOT_RUN` lists the types of which no tiny model runs on text.
"""

from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 256
# Widths are multiples of 64: bitsandbytes quantizes in blocks of 64 values.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "n_group": 1,
    "topk_group": 1,
    # latent attention, DeepSeek's
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "index_head_dim": 64, "index_n_heads": 2, "index_topk": 64,
    # linear attention and state spaces
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4,
    "linear_num_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_chunk_size": 8, "chunk_size": 8,
    "attn_layer_period": 2, "attn_layer_offset": 1, "layer_group_size": 2, "rotary_dim": 16,
    # encoder-decoders and their halves
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    # parts for pictures
    "depth": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 64,
}  # fmt: skip
TEXT = {name: SIZES[name] for name in list(SIZES)[:11]}
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
START = {"decoder_start_token_id": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SMALL_SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 64},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0}
    }},
    "cpmant": {"dim_head": 16, "dim_ff": 128, "init_std": 0.02},
    "ctrl": {"dff": 128},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_top_k": 2},
    },
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "deepseek_v4": {"o_lora_rank": 64},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "fuyu": {"text_config": {"model_type": "persimmon", **TEXT}, "image_token_id": 5},
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "image_token_index": 5, "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 64,
    },
    "gemma4": {"image_token_id": 5, "video_token_id": 6, "audio_token_id": 7},
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 64,
        "num_experts": None, "moe_intermediate_size": None,
    },
    "gemma4_unified": {"image_token_id": 5, "video_token_id": 6, "audio_token_id": 7},
    "gemma4_unified_vision": {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16},
    "gemma4_vision": {"position_embedding_size": 16},
    "got_ocr2": {"text_config": {"model_type": "qwen2", **TEXT}, "image_token_index": 5},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": HYBRID,
    "inkling2_text": SMALL_SWA,
    "inkling_text": SMALL_SWA,
    "kimi_linear": HYBRID | {"linear_head_dim": 64, "linear_num_heads": 2},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 64, "ffn_hidden_size": 128},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 16},
    "minimax_m3_vl_text": {"dense_intermediate_size": 128, "shared_intermediate_size": 64},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3", **TEXT}},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"], "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
        "moe_shared_expert_intermediate_size": 64,
    },
    "phi4_multimodal_audio": {"num_blocks": 1},
    "plbart": {"num_hidden_layers": 2},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID | {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 64,
        "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "roc_bert": {
        "shape_vocab_size": 16, "shape_embed_dim": 64, "pronunciation_vocab_size": 16,
        "pronunciation_embed_dim": 64,
    },
    "t5": START,
    "mt5": START,
    "umt5": START,
    "xglm": {"ffn_dim": 128},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "adapter_reduction_factor": 1},
    "xlnet": {"d_head": 16, "d_inner": 128},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
NOT_RUN: dict[str, str] = {
    "blt": "reads bytes, in patches that a second model cuts",
    "dots3_note": "a config for each of 42 layers",
    "git": "needs a picture",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "reads hidden states of another model",
    "gemma4_unified_assistant": "reads hidden states of another model",
    "moshi": "of sounds",
    "musicgen": "of sounds",
    "musicgen_melody": "of sounds",
}
ENCODER_DECODERS = (
    "t5", "mt5", "umt5", "bart", "mbart", "pegasus", "m2m_100", "marian", "blenderbot",
)  # fmt: skip


def decoders() -> list[str]:
    """The model types of AutoModelForCausalLM, without those that run as encoder-decoders."""
    left_out = {*NOT_RUN, *ENCODER_DECODERS}
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in left_out]


def tiny_config(kind: str) -> PreTrainedConfig:
    """The tiny config of a model type."""
    return CONFIG_MAPPING[kind](**_sizes(CONFIG_MAPPING[kind], kind))


def _sizes(config_class: type[PreTrainedConfig], kind: str) -> dict[str, Any]:
    """The arguments of a config class, those of its parts included."""
    known = {field.name: field.default for field in fields(config_class)}
    sizes = {name: 0.0 for name, value in known.items() if "drop" in name and type(value) is float}
    known |= config_class.attribute_map
    sizes |= {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # each head has its own keys
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    parts = {
        name: _sizes(part, part.model_type)
        for name, part in config_class.sub_configs.items()
        if part is not AutoConfig
    }
    return {**sizes, **parts, **OWN.get(kind, {})}
