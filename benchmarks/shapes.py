"""Checkpoints in the shape of well-known models, with random weights, 4-bit from the start.

Sizes are those of the published config.json files. `make` draws one matrix at a time, on the GPU if
there is one, quantizes and writes it: no more than one matrix of a 7B model is ever dense. The
output is a standard bitsandbytes checkpoint of about half a byte per weight. Matrices are normal
with a standard deviation of 0.02, norms one, biases zero: as fast and as large as a trained model,
but its loss is meaningless.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from qlora.base.checkpoint import linear_layers, quantized_layers
from qlora.base.shards import Entry, parse_size, write_shards
from qlora.config import QuantConfig
from qlora.errors import UserError, did_you_mean
from qlora.files import publishing
from qlora.ops import nf4

QUANT = QuantConfig()
SHARD = "5GB"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    positions: int, *, theta: float = 10000.0, tied: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The sizes under their names in configs."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
    }


def llama3(*numbers: int, tied: bool = False, factor: float = 8.0) -> LlamaConfig:
    """The config of a Llama 3.1 or later."""
    rope = {"rope_parameters": {**LLAMA3_ROPE, "factor": factor}}
    return LlamaConfig(**{**sizes(*numbers, 128256, 131072, tied=tied), **rope})


SHAPES: Mapping[str, PretrainedConfig] = {
    "llama2-7b": LlamaConfig(**sizes(4096, 11008, 32, 32, 32, 32000, 4096)),
    "llama3.1-8b": llama3(4096, 14336, 32, 32, 8),
    "llama3.2-1b": llama3(2048, 8192, 16, 32, 8, tied=True, factor=32.0),
    "mistral-7b": MistralConfig(
        **sizes(4096, 14336, 32, 32, 8, 32768, 32768, theta=1e6), sliding_window=None
    ),
    "qwen2.5-0.5b": Qwen2Config(**sizes(896, 4864, 24, 14, 2, 151936, 32768, theta=1e6, tied=True)),
    "qwen2.5-7b": Qwen2Config(**sizes(3584, 18944, 28, 28, 4, 152064, 32768, theta=1e6)),
    "qwen3-8b": Qwen3Config(
        **sizes(4096, 12288, 36, 32, 8, 151936, 40960, theta=1e6), head_dim=128
    ),
    "gemma2-9b": Gemma2Config(
        **sizes(3584, 14336, 42, 16, 8, 256000, 8192, tied=True),
        head_dim=256,
        query_pre_attn_scalar=256,
    ),
    "smollm2-135m": LlamaConfig(**sizes(576, 1536, 30, 9, 3, 49152, 8192, theta=1e5, tied=True)),
    "tiny": LlamaConfig(**sizes(64, 128, 2, 4, 2, 320, 128)),
}


def shape(name: str) -> PretrainedConfig:
    """The config of that shape."""
    if name not in SHAPES:
        raise UserError(
            f"--shape {name} is not known.{did_you_mean(name, SHAPES)} Known are: "
            f"{', '.join(SHAPES)}"
        )
    return SHAPES[name]


def on_meta(config: PretrainedConfig) -> nn.Module:
    """The model on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def linear_parameters(config: PretrainedConfig) -> int:
    """The number of weights in all linear layers and the output head."""
    return sum(layer.weight.numel() for layer in linear_layers(on_meta(config)).values())


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint of that shape to `folder`, unless it exists.

    Raises:
        UserError: there is no such shape, or the disk is full.
    """
    config = shape(name)
    if (folder / "config.json").exists():
        return folder
    model = on_meta(config)
    coded = {f"{layer}.weight" for layer in quantized_layers(model, QUANT)}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    with publishing(folder) as partial:
        dense = [layer for layer in linear_layers(model) if f"{layer}.weight" not in coded]
        write_config(partial, model, config, dense)
        entries = [e for n, s in shapes.items() for e in _entries(n, s, is_coded=n in coded)]
        drawn = _tensors(shapes, coded)
        write_shards(partial, entries, drawn, max_bytes=parse_size(SHARD))
    return folder


def write_config(folder: Path, model: Any, config: PretrainedConfig, dense: list[str]) -> None:
    """config.json, in which all linear layers but `dense` are 4-bit."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANT.quant_type,
        bnb_4bit_use_double_quant=QUANT.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=dense,
    )
    own = type(config).from_dict(config.to_dict())
    own.architectures = [type(model).__name__]
    own.dtype = torch.bfloat16
    own.quantization_config = settings.to_dict()
    own.save_pretrained(folder)


def _entries(name: str, size: tuple[int, ...], *, is_coded: bool) -> list[Entry]:
    """A parameter's tensors in the file."""
    if not is_coded:
        return [Entry(name, torch.bfloat16, size)]
    layout = nf4.record_layout(size, QUANT)
    return [Entry(_joined(name, suffix), *kind) for suffix, kind in layout.items()]


def _joined(name: str, suffix: str) -> str:
    return f"{name}.{suffix}".rstrip(".")


def _tensors(shapes: Mapping[str, tuple[int, ...]], coded: set[str]) -> Iterator[Tensor]:
    """The tensors that `_entries` lists, in its order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for name, size in shapes.items():
        if len(size) == 1:
            yield torch.full(size, float("norm" in name), dtype=torch.bfloat16)
            continue
        weight = torch.randn(size, generator=generator, device=device).mul_(0.02).bfloat16()
        if name not in coded:
            yield weight
            continue
        record = nf4.to_record(nf4.quantize(weight, QUANT))
        yield from (record[suffix] for suffix in nf4.record_layout(size, QUANT))
