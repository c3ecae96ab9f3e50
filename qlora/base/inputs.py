"""Checks of a checkpoint's files from outside, before anything is allocated or computed by them.

- `read_config`: config.json, whose sizes must be those of a model.
- `read_record`: the record of a 4-bit weight. bitsandbytes' kernels trust it, and would read beyond
  the end of a tensor that is shorter.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora.config.types import require_types, shown
from qlora.errors import first_line, require
from qlora.files import read_json

# ---- config.json ----

CONFIG_TYPES: dict[str, Any] = {
    "architectures": list[str] | None,
    "dtype": str | None,
    "eos_token_id": int | list[int] | None,
    "id2label": Mapping[str, str] | None,
    "label2id": Mapping[str, Any] | None,
    "max_position_embeddings": int | None,
    "model_type": str | None,
    "n_positions": int | None,
    "pad_token_id": int | None,
    "quantization_config": Mapping[str, Any] | None,
    "text_config": Mapping[str, Any] | None,
    "torch_dtype": str | None,
    "vocab_size": int | None,
}
MOST_LAYERS, MOST_EXPERTS, MOST_LABELS = 1000, 10_000, 1_000_000
MOST_OF_A_SIZE = 2**31
LAYERS = re.compile(r"(num|n)(_hidden|_encoder|_decoder)?_layers?")  # others count from the end
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with settings of their types and sizes that a model may have.

    Raises:
        UserError: it is damaged, or describes what no memory could hold.
    """
    path = folder / "config.json"
    values = read_json(path)
    require_types(values, CONFIG_TYPES, path)
    _require_sizes(values, path)
    labels = values.get("id2label") or {}
    numbered = all(re.fullmatch(r"\d{1,9}", number) for number in labels)
    require(numbered, f"{path}: id2label must be numbers with names")
    for part in (values, values.get("text_config") or {}):
        for name in ATTENTION:  # transformers would run such a kernel of the hub
            kernel = f"{name} names a kernel of the hub, whose code would run, {part.get(name)!r}"
            require("/" not in str(part.get(name)), f"{path}: {kernel}: remove it")
    return values


def why_not(error: Exception) -> str:
    """Why transformers loads something not, in a sentence."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is not run: if you trust it, --trust-remote-code."
    return first_line(error)


def _require_sizes(values: Mapping[str, Any], path: Path) -> None:
    """Raise for whole numbers at any depth that are no sizes of a model."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _require_sizes(value, path)
        most = MOST_LAYERS if LAYERS.search(name) else MOST_OF_A_SIZE
        most = MOST_EXPERTS if "expert" in name else most
        most = MOST_LABELS if name == "num_labels" else most
        for number in value if isinstance(value, list) else [value]:
            is_size = type(number) is not int or abs(number) <= most
            require(is_size, f"{path}: {name} must be at most {most:,}, got {shown(number)}")
        is_negative = LAYERS.fullmatch(name) and type(value) is int and value < 0
        require(not is_negative, f"{path}: {name} must be 0 or more, got {shown(value)}")


# ---- records of 4-bit weights ----

BLOCKSIZES = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
FLOATS = Literal["float32", "float16", "bfloat16"]
RECORD_TYPES: dict[str, Any] = {
    "quant_type": Literal["nf4", "fp4"],
    "blocksize": BLOCKSIZES,
    "dtype": FLOATS,
    "shape": list[int],
}
NESTED_TYPES: dict[str, Any] = {
    "nested_blocksize": BLOCKSIZES,
    "nested_dtype": FLOATS,
    "nested_offset": float,
}
LONGEST_RECORD = 4096  # bytes of JSON


def read_record(name: str, headers: Mapping[str, Any], text: Tensor) -> dict[str, Any]:
    """The values of the JSON bytes of the 4-bit weight `name`, whose tensors `headers` describe.

    Raises:
        UserError: they are damaged, or a tensor is not of the size that they tell.
    """
    where = f"the 4-bit weight {name}"
    fix = "download or copy it again"
    is_text = text.dtype == torch.uint8 and text.ndim == 1 and len(text) <= LONGEST_RECORD
    try:
        values: Any = json.loads(bytes(text.tolist()).decode()) if is_text else None
    except (ValueError, RecursionError):
        values = None
    require(isinstance(values, dict), f"{where} has no record in JSON: {fix}")
    types = RECORD_TYPES | (NESTED_TYPES if f"{name}.nested_absmax" in headers else {})
    missing = sorted(types.keys() - values.keys())
    require(not missing, f"{where}: its record has no {', '.join(missing)}: {fix}")
    require_types(values, types, where)
    shape = values["shape"]
    require(len(shape) == 2 and min(shape) > 0, f"{where} has shape {shown(shape)}: {fix}")
    size = math.prod(shape)
    blocks = math.ceil(size / values["blocksize"])
    nbytes = {"": math.ceil(size / 2), ".absmax": 4 * blocks, ".quant_map": 4 * 16}
    if "nested_blocksize" in types:
        nbytes |= {
            ".absmax": blocks,
            ".nested_absmax": 4 * math.ceil(blocks / values["nested_blocksize"]),
            ".nested_quant_map": 4 * 256,
        }
    for suffix, wanted in nbytes.items():
        header = headers.get(name + suffix)
        got = math.prod(header.shape) * header.dtype.itemsize if header else 0
        fault = f"{name}{suffix} has {got:,} bytes, a weight {tuple(shape)} needs {wanted:,}"
        require(got == wanted, f"{fault}: {fix}")
    return dict(values)
