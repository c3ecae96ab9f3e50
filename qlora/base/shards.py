"""Write a checkpoint as a stream: safetensors files of bounded size, whole or not at all.

A safetensors file is 8 bytes of length, a JSON table of names, dtypes, shapes and offsets, then the
tensors' bytes. The table needs no data, so it is written first and then one tensor after the
other: no more than one is ever in memory. safetensors' own `save_file` wants all of a file's
tensors at once, which is why this is not left to it.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from qlora.errors import UserError

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB' (powers of 1000) or '5GiB' (of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"size must look like 5GB or 500MB, got {text!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries in their order, in files of at most `max_bytes`, or of a single larger tensor."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def write_shards(
    folder: Path, entries: Sequence[Entry], tensors: Iterator[Tensor], *, max_bytes: int
) -> list[Path]:
    """Stream `tensors`, one for each of `entries` in order, into safetensors files in `folder`.

    Then they are read again, by safetensors' own reader, and every tensor is compared by checksum.

    Raises:
        UserError: the disk is full, or gives back something else.
        ValueError: a tensor is not what its entry says.
    """
    shards = plan_shards(entries, max_bytes)
    names = [
        SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    total = sum(entry.nbytes for entry in entries)
    sums: dict[str, int] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing", leave=False) as bar:
        for name, shard in zip(names, shards, strict=True):
            with _disk_errors(folder / name), (folder / name).open("wb") as file:
                file.write(_header(shard))
                for entry in shard:
                    data = _bytes(next(tensors), entry)
                    sums[entry.name] = zlib.crc32(data)
                    file.write(data)
                    bar.update(entry.nbytes)
                file.flush()
                os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {e.name: n for n, shard in zip(names, shards, strict=True) for e in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    files = [folder / name for name in names]
    _read_back(dict(zip(files, shards, strict=True)), sums)
    return files


def _read_back(files: Mapping[Path, Sequence[Entry]], sums: Mapping[str, int]) -> None:
    """Compare what is on the disk with what was meant to be."""
    total = sum(entry.nbytes for shard in files.values() for entry in shard)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Checking", leave=False) as bar:
        for file, shard in files.items():
            for entry in shard:
                with safe_open(file, framework="pt") as reader:  # closed, so that its pages can go
                    data = _bytes(reader.get_tensor(entry.name), entry)
                if zlib.crc32(data) != sums[entry.name]:
                    raise UserError(
                        f"{file} was written but does not read back the same ({entry.name}): the "
                        "disk is at fault. Write to another one"
                    )
                bar.update(entry.nbytes)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Inside the block, an error of the disk is one that the user can mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written to ({error.strerror or error}): make room, or give "
            "another --output-dir. What was written is removed"
        ) from error


def _header(entries: Sequence[Entry]) -> bytes:
    """8 bytes of length, then JSON padded to a multiple of 8 (the safetensors format)."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.nbytes],
        }
        start += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor, entry: Entry) -> memoryview:
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name}: planned {entry[1:]}, got {tensor.dtype, tensor.shape}")
    flat = tensor.cpu().contiguous().view(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)
