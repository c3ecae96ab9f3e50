"""Check the header of a .gguf file before transformers reads it.

    magic, version, count of tensors, count of keys    4 bytes, uint32, uint64, uint64
    keys      name, type, value
    tensors   name, count of dimensions, dimensions, type, offset in the data
    data      from the next multiple of general.alignment on

Every count is compared with the bytes that are there, and the model's sizes with its tensors: the
reader of the gguf package takes an array's length and a count of layers as they are, which may fill
the memory. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
# Sizes of an architecture that are at most the longest dimension of a tensor.
WITHIN_TENSORS = (
    "embedding_length", "feed_forward_length", "expert_count", "expert_feed_forward_length",
    "vocab_size", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "rope.dimension_count",
)  # fmt: skip


def check_header(path: Path) -> None:
    """Raise ValueError unless the header of a .gguf file is whole and describes what is in it."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def check(self) -> None:
        version, tensors, keys = self.read("I"), self.read("Q"), self.read("Q")
        if version not in (2, 3):
            raise ValueError(f"version 2 or 3 is read, got {version}")
        sizes: dict[str, int] = {}  # whole numbers, by their names after the architecture's
        for _ in range(keys):
            key, value = self.text(), self.value(self.read("I"))
            if isinstance(value, int):
                sizes[key.partition(b".")[2].decode(errors="replace")] = value
        alignment, longest, ends = sizes.get("alignment", 32), 0, [0]
        for _ in range(tensors):
            dimensions, end = self.tensor()
            longest = max(longest, *dimensions)
            ends.append(end)
        if alignment < 1 or -(-self.at // alignment) * alignment + max(ends) > len(self.data):
            raise ValueError("its tensors end after the file")
        for name in ("block_count", "embedding_length"):  # transformers has defaults of 7B models
            if name not in sizes:
                raise ValueError(f"it has no {name}")
        if sizes["block_count"] > tensors:
            raise ValueError(f"{sizes['block_count']} layers of {tensors} tensors")
        for name in WITHIN_TENSORS:
            if sizes.get(name, 0) > longest:
                raise ValueError(f"{name} is {sizes[name]}, the longest tensor has {longest}")

    def tensor(self) -> tuple[tuple[int, ...], int]:
        """The dimensions of the next tensor, and where its data end."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self.text()
        count = self.read("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {count} dimensions")
        dimensions = tuple(self.read("Q") for _ in range(count))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.read("I"))]
        values = 1
        for dimension in dimensions:
            values *= dimension
        return dimensions, self.read("Q") + values // block * size

    def read(self, kind: str) -> Any:
        """The next little-endian number."""
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.take(struct.calcsize(f"<{kind}")))
        return value

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError("it is cut short")
        return begin

    def text(self) -> bytes:
        size = self.read("Q")
        begin = self.take(size)
        return self.data[begin : begin + size]

    def value(self, kind: int) -> Any:
        """The next value, None for an array."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            if kind not in SCALARS:
                raise ValueError(f"a value of type {kind}")
            return self.read(SCALARS[kind])
        kind, count = self.read("I"), self.read("Q")
        if kind in SCALARS:
            self.take(count * struct.calcsize(f"<{SCALARS[kind]}"))
            return None
        if kind != STRING:  # the reader knows no arrays of arrays
            raise ValueError(f"an array of type {kind}")
        for _ in range(count):
            self.text()
        return None
