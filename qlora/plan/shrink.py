"""A model's config with fewer layers, and with small widths: what a count needs of a large model.

`first_layers` keeps the widths: the first layers of a model, whose kinds repeat after them.
`narrow` keeps everything but the widths, so that the checkpoint takes no time to write, to load
and to run on a CPU. Both work on the config of any model type, by the names that most share.
"""

import copy
import math
from contextlib import suppress
from typing import Any

from transformers import PreTrainedConfig

LAYERS = "num_hidden_layers"
VOCAB = 512
# Sizes of parts of a model, under their names in configs: none is made larger.
SMALL: dict[str, int] = {
    "vocab_size": VOCAB, "intermediate_size": 128, "ffn_dim": 128, "ffn_hidden_size": 128,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 64,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64, "n_group": 1, "topk_group": 1,
    # latent attention, DeepSeek's
    "q_lora_rank": 64, "kv_lora_rank": 64,
    # encoder-decoders
    "d_ff": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
}  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def text_of(config: PreTrainedConfig) -> Any:
    """The config of the language model, which may be a part of `config`."""
    return config.get_text_config(decoder=True)


def layer_count(config: PreTrainedConfig) -> int:
    """The number of decoder layers."""
    return int(text_of(config).num_hidden_layers)


def first_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The config of the first `count` layers, in full width: lists of one value a layer are cut."""
    made, before = copy.deepcopy(config), layer_count(config)
    if count == before:
        return made
    values = text_of(made).to_dict()
    for name, value in values.items():
        if isinstance(value, list) and len(value) == before:
            values[name] = value[:count]
        elif name == "per_layer_config" and isinstance(value, dict):
            values[name] = {i: own for i, own in value.items() if int(i) < count}
    name = text_of(made).attribute_map.get(LAYERS, LAYERS)
    values[name] = count
    return _with_text(made, type(text_of(made)).from_dict(values))


def narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with small widths; heads keep their size, and whether they share keys."""
    made = copy.deepcopy(config)
    _make_narrow(made)
    if text_of(made) is not made:
        _make_narrow(text_of(made))
    return made


def _make_narrow(config: Any) -> None:
    for name, most in SMALL.items():
        size = _number(config, name)
        if size is not None and size > most:
            setattr(config, name, most)
    for name in TOKENS:
        token = getattr(config, name, None)
        if type(token) is int and token >= VOCAB:
            setattr(config, name, 0)
        elif isinstance(token, list):
            setattr(config, name, [min(id_, VOCAB - 1) for id_ in token])
    heads, keys = (_number(config, f"num_{kind}_heads") for kind in ("attention", "key_value"))
    if heads is None:
        return
    size = _number(config, "head_dim") or config.hidden_size // heads
    is_grouped = keys is not None and 1 < keys < heads
    few = max(64 // math.gcd(size, 64), 4 if is_grouped else 2)  # rows of whole blocks of 64
    config.num_attention_heads = few = min(heads, few)
    if keys is not None:
        config.num_key_value_heads = few if keys == heads else 2 if is_grouped else 1
    config.hidden_size = few * size
    if hasattr(config, "word_embed_proj_dim"):  # OPT's
        config.word_embed_proj_dim = config.hidden_size


def _number(config: Any, name: str) -> int | None:
    """A whole number of the config; None if it has none, or another for each layer."""
    with suppress(Exception):  # transformers raises for the latter
        value = getattr(config, name, None)
        return value if type(value) is int else None
    return None


def _with_text(config: Any, text: PreTrainedConfig) -> PreTrainedConfig:
    """`config` with another language model."""
    before = text_of(config)
    if before is config:
        return text
    name = next(name for name in config.sub_configs if getattr(config, name, None) is before)
    setattr(config, name, text)
    return config  # type: ignore[no-any-return]
