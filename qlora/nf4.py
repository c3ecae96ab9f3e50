"""The 4-bit codec of the frozen base, as pure tensor functions over bitsandbytes.

A weight is flattened row by row and cut into blocks of `blocksize` values. Each block is divided
by its absmax and every value becomes the index of the nearest of 16 levels: NF4, the quantiles of
a normal distribution, or FP4. Two indices share a byte, the first in the high nibble. 4 + 32/64 =
4.5 bits a weight. Double quantization stores the absmax themselves as 8-bit codes in blocks of
256 after taking their mean off: 4 + 8/64 + 32/(64*256) = 4.127 bits a weight
(arXiv:2305.14314, sections 2 and 3).

On disk a weight `w` is the record that bitsandbytes writes and everybody reads: `w` (packed bytes),
`w.absmax`, `w.quant_map`, with double quantization `w.nested_absmax` and `w.nested_quant_map`, and
`w.quant_state.bitsandbytes__nf4` (shape, dtype, blocksize, offset as JSON bytes).

Codes and absmax do not depend on whether the same values came as bf16, fp16 or fp32; dequantizing
is always to fp32 here, code times absmax, so that whoever rounds to 16 bits does it once.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora.config import QuantConfig

RECORD_MARK = ".quant_state.bitsandbytes__"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as configs say


class Quantized(NamedTuple):
    """A 4-bit weight: `packed` uint8 (n/2, 1) and the bitsandbytes QuantState that undoes it."""

    packed: Tensor
    state: bnb.QuantState


def quantize(weight: Tensor, quant: QuantConfig) -> Quantized:
    """4-bit codes of `weight` (out, in), any float dtype, on its own device."""
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=quant.blocksize,
        compress_statistics=quant.double_quant,
        quant_type=quant.quant_type,
    )
    return Quantized(packed, state)


def dequantize(quantized: Quantized) -> Tensor:
    """The weight (out, in) that the codes stand for, fp32."""
    packed, state = quantized
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    # As one long row: bitsandbytes' AVX-512 kernel takes a wrong absmax where a block crosses rows.
    row = (1, state.shape.numel())
    out = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, state.blocksize, state.quant_type, row, torch.float32
    )
    return torch.as_tensor(out).view(state.shape)


@cache
def kernel_is_right(in_features: int, blocksize: int) -> bool:
    """Whether bitsandbytes' own layers compute with the right weights on this CPU.

    False where a block crosses rows of `in_features` and its AVX-512 kernel is in use (0.50).
    """
    rows = blocksize // math.gcd(in_features, blocksize)  # until blocks and rows are aligned again
    weight = torch.linspace(-1, 1, rows * in_features).view(rows, in_features)
    quant = QuantConfig(blocksize=blocksize, double_quant=False)
    packed, state = quantized = quantize(weight, quant)
    return torch.equal(bnb.dequantize_4bit(packed, state), dequantize(quantized))


def round_trip(weight: Tensor, quant: QuantConfig) -> Tensor:
    """What a model that was loaded in 4 bits computes with instead of `weight`, in fp32."""
    return dequantize(quantize(weight, quant))


def to_record(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of the on-disk record; the packed bytes under the empty suffix."""
    return {"": quantized.packed, **quantized.state.as_dict(packed=True)}


def from_record(record: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Quantized:
    """Inverse of `to_record`."""
    stats = {suffix: tensor for suffix, tensor in record.items() if suffix}
    state = bnb.QuantState.from_dict(stats, device=torch.device(device))
    return Quantized(record[""].to(device), state)


def codebook(quant_type: str) -> Tensor:
    """The 16 levels in [-1, 1], fp32, in the order of their 4-bit index."""
    return torch.as_tensor(bnb.get_4bit_type(quant_type, device="cpu"))


def storage_bytes(quantized: Quantized) -> int:
    """Bytes the weight takes in memory: codes, absmax and their statistics.

    Left out are the two code tables (16 and 256 fp32 levels), which are the same for every weight.
    """
    state = quantized.state
    tensors = [quantized.packed, state.absmax]
    if state.nested:
        tensors += [state.state2.absmax, state.offset]
    return sum(t.numel() * t.element_size() for t in tensors)
