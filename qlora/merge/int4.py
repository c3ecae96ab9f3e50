"""compressed-tensors' `pack-quantized` checkpoints in 4 bits, which vLLM and SGLang read natively.

A weight (out, in) is cut into groups of 128 columns (or 64, or 32), each with a scale and perhaps a
zero point z: (q - z) * scale, with q and z from -8 to 7. Its tensors, beside `<layer>.weight`:

    weight_packed      int32  (out, in / 8)             q + 8, eight a word
    weight_scale       bf16   (out, in / size)
    weight_zero_point  int32  (out / 8, in / size)      z + 8, eight rows a word; asymmetric only
    weight_shape       int64  (2,)                      out, in

The first of eight is in the lowest bits. 4.13 bits a value with groups of 128, asymmetric 4.16.
There is no weight_g_idx: columns keep their order.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.merge.grids import Int4, Int4ZeroPoint
from qlora.ops.nf4 import Layout

SIZES = (128, 64, 32)  # of a group, those that vLLM's kernels know
A_WORD = 8  # values in an int32


def grid_of(size: int, *, symmetric: bool) -> type[Int4]:
    """The grid with groups of `size` columns."""
    grid = Int4 if symmetric else Int4ZeroPoint
    return grid if grid.size == size else type(grid.__name__, (grid,), {"size": size})


def group_size(columns: Collection[int]) -> int | None:
    """The largest group size that divides all `columns` which a group size divides; None if none
    of them is so."""
    wide = [count for count in columns if fits(count)]
    return next((size for size in SIZES if wide and all(n % size == 0 for n in wide)), None)


def fits(columns: int) -> bool:
    """Whether a weight with so many columns can be cut into groups."""
    return columns % SIZES[-1] == 0


def layout(shape: tuple[int, ...], grid: type[Int4], dtype: torch.dtype) -> Layout:
    """dtype and shape of each tensor of a weight (out, in), by what follows its name."""
    rows, columns = shape
    groups = columns // grid.size
    tensors: Layout = {
        "_packed": (torch.int32, (rows, columns // A_WORD)),
        "_scale": (dtype, (rows, groups)),
        "_shape": (torch.int64, (2,)),
    }
    if issubclass(grid, Int4ZeroPoint):
        tensors["_zero_point"] = (torch.int32, (-(-rows // A_WORD), groups))
    return tensors


def to_record(grid: Int4, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the current choice, by what follows the weight's name."""
    columns, rows = grid.weight.shape
    record = {
        "_packed": pack(grid.level_indices().T),
        "_scale": grid.scale.T.to(dtype).contiguous(),
        "_shape": torch.tensor([rows, columns]),
    }
    if grid.shift is not None:
        zero = (-grid.shift / grid.scale).nan_to_num(0, 0, 0).round() - grid.low  # (groups, out)
        record["_zero_point"] = pack(zero).T.contiguous()
    return record


def pack(codes: Tensor) -> Tensor:
    """Integers 0 ... 15 (rows, n), of any dtype, as int32 (rows, n / 8, rounded up)."""
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % A_WORD))
    pairs = codes[:, ::2] | codes[:, 1::2] << 4  # two a byte
    return pairs.contiguous().view(torch.int32)


def settings(grid: type[Int4], ignore: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of config.json; `ignore` names the linear layers in 16 bits."""
    weights = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": grid.size,
        "symmetric": not issubclass(grid, Int4ZeroPoint), "dynamic": False, "actorder": None,
    }  # fmt: skip
    without: dict[str, Any] = {"input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights} | without},
        "ignore": list(ignore),
        # For transformers alone, which otherwise opens neither zero points nor some vision towers
        "dequantize": True,
    }
