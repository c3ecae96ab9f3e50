"""The type of each tensor in a GGUF file, as llama.cpp's quantize chooses it.

A mix such as Q4_K_M has one type for most matrices and more bits for some: the head, which may be
the embedding, and in some layers v and the second matrix of the MLP. A type in superblocks of 256
values falls back to one in blocks of 32 where the columns are no multiple of 256, and to fp16 where
they are none of 32. What is small or sensitive keeps its type.

Source: src/llama-quant.cpp of llama.cpp (tensor_allows_quantization, llama_tensor_get_type_impl,
tensor_type_fallback), of which the rules for these mixes are here. A tensor whose codes are chosen
on data counts as one with an importance matrix.
"""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import gguf
from gguf import GGMLQuantizationType as Type

MIXES = {  # of --format: the type of most weights, and the number that names the mix in the file
    "gguf-bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "gguf-q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "gguf-q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "gguf-q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "gguf-q4_k_m": (Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
}
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel"
    r"|per_layer_model_proj|^position_embd\.weight|^token_types\.weight|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|time_mix_first\.weight"
    r"|time_mix_(w|v|a)[012]\.weight|time_mix_g1\.weight|time_mix_g2\.weight"
    r"|time_mix_decay_w[12]\.weight|time_mix_lerp_fused\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)
LIKE_V = re.compile(r"attn_(qkv|kv_b|v)\.weight")
IS_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}  # by layers


class Stored(NamedTuple):
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # as torch has it, columns last
    kind: Type


class Types(NamedTuple):
    """The types of a mix, by the names of tensors."""

    of: dict[str, Type]
    fell_back: dict[str, Type]  # the part of them that their columns did not allow


def tensor_types(
    mix: str,
    values: Mapping[str, Any],
    tensors: Iterable[Stored],
    calibrated: Container[str] = (),
) -> Types:
    """What llama.cpp's quantize makes of a file of 16 bits with these metadata and tensors.

    `calibrated`: the names of those whose codes are chosen on data.
    """
    tensors = sorted(tensors, key=lambda tensor: (_layer(tensor.name), tensor.name))
    chooser = _Chooser(mix, values, [tensor.name for tensor in tensors])
    kinds, fell_back = {}, {}
    for name, shape, kind in tensors:
        if is_kept(name, shape):
            kinds[name] = kind
            continue
        wanted = chooser.wanted(name, shape[-1], name in calibrated)
        kinds[name] = _fitting(wanted, shape[-1])
        if kinds[name] != wanted:
            fell_back[name] = kinds[name]
    return Types(kinds, fell_back)


def is_kept(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is not quantized in any mix."""
    rows = [size for size in shape[:-1] if size > 1]  # ggml counts no dimensions of one
    return not rows or not name.endswith("weight") or bool(KEPT.search(name))


def _fitting(kind: Type, columns: int) -> Type:
    """`kind`, or what stands for it where it does not divide the columns."""
    for choice in (kind, FALLBACKS.get(kind, kind)):
        if columns % gguf.GGML_QUANT_SIZES[choice][0] == 0:
            return choice
    return Type.F16


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and each third between (use_more_bits)."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


class _Chooser:
    """Types by names, before fallbacks; asked for all tensors in the order of their layers, as v
    and down are counted: not all layers have them."""

    def __init__(self, mix: str, values: Mapping[str, Any], names: list[str]) -> None:
        self.default, self.is_k_m = MIXES[mix][0], mix == "gguf-q4_k_m"
        self.architecture = architecture = str(values["general.architecture"])

        def of_model(key: str) -> Any:
            return values.get(f"{architecture}.{key}", 0)

        self.layers, self.experts = int(of_model("block_count")), int(of_model("expert_count"))
        heads, kv_heads = of_model("attention.head_count"), of_model("attention.head_count_kv")
        self.is_70b = self.experts != 8 and IS_70B.get(architecture) == self.layers
        self.is_70b &= architecture != "llama" or heads != kv_heads
        self.is_tied = "output.weight" not in names
        self.of_v = sum(bool(LIKE_V.search(name)) for name in names)
        self.seen_v = self.seen_down = 0

    def wanted(self, name: str, columns: int, is_calibrated: bool) -> Type:
        kind, eight = self.default, self.experts == 8
        if name == "output.weight" or (self.is_tied and name in EMBEDDINGS):
            fits = columns % gguf.GGML_QUANT_SIZES[kind][0] == 0
            is_8_bit = kind == Type.Q8_0 or self.architecture == "falcon" or not fits
            return Type.Q8_0 if is_8_bit else Type.Q6_K
        if name in EMBEDDINGS:
            return kind
        if LIKE_V.search(name):
            if self.is_k_m and _more_bits(self.seen_v, self.of_v):
                kind = Type.Q6_K
            if self.is_70b and kind == Type.Q4_K:
                kind = Type.Q5_K
            self.seen_v += 1
            return Type.Q8_0 if eight else kind
        if "attn_k.weight" in name:
            return Type.Q8_0 if eight else kind
        if "attn_output.weight" in name:
            of_eight = eight and self.is_k_m and self.architecture != "falcon"
            return Type.Q5_K if of_eight else kind
        is_down = "ffn_down" in name and not re.search(r"attn_q\.weight|ffn_up|ffn_gate", name)
        return self._down(_layer(name), is_calibrated) if is_down else kind

    def _down(self, layer: int, is_calibrated: bool) -> Type:
        layer = layer if self.experts > 1 else self.seen_down
        self.seen_down += 1
        if not self.is_k_m:
            shifts = is_calibrated and self.default == Type.Q4_0 and layer < self.layers // 8
            return Type.Q4_1 if shifts else self.default
        if self.architecture == "falcon":
            more = Type.Q5_K if _more_bits(layer, self.layers) else Type.Q4_K
            return Type.Q6_K if layer < self.layers // 16 else more
        return Type.Q6_K if _more_bits(layer, self.layers) else Type.Q4_K
