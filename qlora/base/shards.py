"""Write a checkpoint as a stream: safetensors files of bounded size, checked by reading them back.

A safetensors file is 8 bytes of length, a JSON table of names, dtypes, shapes and offsets, then the
bytes of the tensors. The table needs no data, so it is written first and then one tensor after the
other: only one is in memory. safetensors' `save_file` needs all tensors of a file at once, and
huggingface_hub's shard planning changes their order.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from qlora.cli import Progress
from qlora.errors import UserError

DTYPE_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB' (powers of 1000), '5GiB' (of 1024) or '5000B'."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    number, unit, binary = match.groups() if match else ("0", "", "")
    factor = (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
    size = int(float(number) * factor)
    if not size or text.strip() == number:
        raise UserError(f"size must look like 5GB or 500MB, with its unit, got {text!r}")
    return size


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries in their order, in files of at most `max_bytes` or of one larger tensor."""
    shards: list[list[Entry]] = []
    left = 0
    for entry in entries:
        if not shards or entry.nbytes > left:
            shards.append([])
            left = max_bytes
        shards[-1].append(entry)
        left -= entry.nbytes
    return shards


def write_shards(
    folder: Path, entries: Sequence[Entry], tensors: Iterator[Tensor], *, max_bytes: int
) -> list[Path]:
    """Stream `tensors`, one for each of `entries` in order, into safetensors files in `folder`.

    safetensors then reads every tensor, which is compared by checksum. Raises UserError if the disk
    is full or returns other data, ValueError if a tensor is not of its entry's dtype and shape.
    """
    plan = plan_shards(entries, max_bytes)
    count = len(plan)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    paths = [folder / name for name in (names if count > 1 else [SINGLE])]
    shards = dict(zip(paths, plan, strict=True))
    total = sum(entry.nbytes for entry in entries)
    checksums: dict[str, int] = {}
    with Progress(total=total, unit="B", unit_scale=True, desc="Writing") as bar:
        for path, shard in shards.items():
            try:
                _write_file(path, shard, tensors, checksums, bar)
            except OSError as error:
                raise UserError(
                    f"{folder} cannot be written to ({error.strerror or error}): free disk space, "
                    "or give another --output-dir. The incomplete files are removed"
                ) from error
    if count > 1:
        weight_map = {entry.name: path.name for path in paths for entry in shards[path]}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    with Progress(total=total, unit="B", unit_scale=True, desc="Checking") as bar:
        for path, shard in shards.items():
            for entry in shard:
                with safe_open(path, framework="pt") as reader:  # closing it releases its memory
                    data = _bytes(reader.get_tensor(entry.name), entry)
                if zlib.crc32(data) != checksums[entry.name]:
                    raise UserError(
                        f"{path} does not read back as it was written ({entry.name}): the disk is "
                        "faulty, use another one"
                    )
                bar.update(entry.nbytes)
    return paths


def _write_file(
    path: Path, shard: list[Entry], tensors: Iterator[Tensor], checksums: dict[str, int], bar: Any
) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in shard:
        table[entry.name] = {
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.nbytes],
        }
        start += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors pads it to a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in shard:
            data = _bytes(next(tensors), entry)
            checksums[entry.name] = zlib.crc32(data)
            file.write(data)
            bar.update(entry.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor, entry: Entry) -> memoryview:
    """The tensor's bytes on the CPU, without a copy where they are contiguous there."""
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name}: planned {entry[1:]}, got {tensor.dtype, tensor.shape}")
    data: Any = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)
