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

The dense weight of a frozen layer, for the length of one matrix product.

A product of thousands of tokens takes ten times as long as decoding its 4-bit weight, so the weight
is decoded whole, in the dtype of the product.

On a GPU it is decoded into scratch memory that the next weight uses again: one buffer for each
thread, device, stream and slot, as large as the largest weight it ever held (117 MB for the MLP of
Llama-3.1-8B in bf16). Were each weight a tensor of its own, the allocator would give its block to
smaller ones in between, and ask the card for another.

What makes that safe: kernels of one stream run in order, so a weight is decoded only after the
product before has read the buffer; another stream has buffers of its own. So has another thread, of
which the backward pass is one, as two threads may use one stream by turns. Who reads the weight on
another stream than the one that was current must wait for it, as with any tensor. A graph that is
being captured gets memory of its own, as it may outlive the buffer.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora.config import QuantConfig
from qlora.ops.gated import usable, written

RECORD_MARK = ".quant_state.bitsandbytes__"
STATE_BYTES = 256
CELLS = 32
CHUNK = 1 << 20  # values at a time, a multiple of every blocksize
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as configs say


class Quantized(NamedTuple):
    """A 4-bit weight: `packed` uint8 (n/2, 1) and the bitsandbytes QuantState that undoes it."""

    packed: Tensor
    state: bnb.QuantState


def quantize(weight: Tensor, quant: QuantConfig) -> Quantized:
    """4-bit codes of `weight` (out, in), any float dtype, on its own device."""
    if weight.device.type == "cpu" and quant.quant_type == "nf4":
        return _quantize_on_cpu(weight, quant) or _by_bitsandbytes(weight, quant)
    return _by_bitsandbytes(weight, quant)


def _by_bitsandbytes(weight: Tensor, quant: QuantConfig) -> Quantized:
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=quant.blocksize,
        compress_statistics=quant.double_quant,
        quant_type=quant.quant_type,
    )
    return Quantized(packed, state)


def _quantize_on_cpu(weight: Tensor, quant: QuantConfig) -> Quantized | None:
    """What bitsandbytes gives, bit for bit, in a third of the time and a tenth of the memory.

    Instead of a search among the 15 bounds between levels, [-1, 1] is cut into CELLS equal cells,
    each with at most one bound in it: a code is that of the cell's lower end, or the next. None
    where a block is cut short, or its absmax is not finite.
    """
    flat, blocksize = weight.contiguous().view(-1), quant.blocksize
    if len(flat) % blocksize:
        return None
    first, bound = _cells()
    packed = torch.empty((len(flat) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(len(flat) // blocksize)
    for start in range(0, len(flat), CHUNK):
        x = flat[start : start + CHUNK].float().view(-1, blocksize)
        low, high = torch.aminmax(x, dim=1)
        scale = torch.maximum(high, -low)
        if not torch.isfinite(scale).all():
            return None
        absmax[start // blocksize :][: len(scale)] = scale
        x = (x * (1 / scale.clamp_min(1e-38))[:, None]).clamp_(-1, 1).view(-1)
        cell = _cell_of(x)
        code = first[cell].add_((x > bound[cell]).view(torch.uint8))
        packed[start // 2 :, 0][: len(code) // 2] = (code[::2] << 4) | code[1::2]
    settings = {"shape": weight.shape, "dtype": weight.dtype, "blocksize": blocksize}
    settings |= {"quant_type": "nf4", "code": codebook("nf4")}
    if not quant.double_quant:
        return Quantized(packed, bnb.QuantState(absmax=absmax, **settings))
    offset = absmax.mean()
    codes, second = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return Quantized(packed, bnb.QuantState(absmax=codes, offset=offset, state2=second, **settings))


def _cell_of(x: Tensor) -> Tensor:
    """The cell of values in [-1, 1], 0 … CELLS, int64."""
    return x.add(1).mul_(CELLS / 2).to(torch.int32).long()


@cache
def _cells() -> tuple[Tensor, Tensor]:
    """For each cell the code at its lower end, and the bound in it or infinity."""
    levels = codebook("nf4")
    bounds = (levels[:-1] + levels[1:]) / 2
    cell = _cell_of(bounds)
    bound = torch.full((CELLS + 1,), math.inf)
    bound[cell] = bounds
    return torch.bucketize(torch.arange(CELLS + 1), cell).to(torch.uint8), bound


def dequantize(quantized: Quantized) -> Tensor:
    """The weight (out, in) that the codes stand for, fp32."""
    return dequantize_to(quantized, torch.float32)


def dequantize_to(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that the codes stand for, rounded once to `dtype`."""
    packed, state = quantized
    return _decode(packed, absmax(quantized), state, state.shape.numel(), dtype).view(state.shape)


def _decode(
    packed: Tensor,
    scales: Tensor,
    state: bnb.QuantState,
    values: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """So many values as one long row.

    bitsandbytes' AVX-512 kernel takes a wrong absmax where a block crosses rows.
    """
    out = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, scales, state.blocksize, state.quant_type, (1, values), dtype
    )
    return torch.as_tensor(out)


def absmax(quantized: Quantized) -> Tensor:
    """What the levels of each block are multiplied with, fp32 (blocks,)."""
    state = quantized.state
    if not state.nested:
        return torch.as_tensor(state.absmax)
    first = bnb.dequantize_blockwise(state.absmax, state.state2).float()
    return torch.as_tensor(first + state.offset)


def in_rows(quantized: Quantized, values: int) -> Iterator[tuple[slice, Tensor]]:
    """`dequantize`, at least one row and about `values` values at a time: (rows, in) each."""
    packed, state = quantized
    out_features, in_features = state.shape
    whole = state.blocksize // math.gcd(in_features, state.blocksize)  # rows that blocks fill
    step = max(1, values // (in_features * whole)) * whole
    scales = absmax(quantized)
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        start, stop = rows.start * in_features, rows.stop * in_features
        codes = packed[start // 2 : -(-stop // 2)]
        blocks = scales[start // state.blocksize : -(-stop // state.blocksize)]
        yield rows, _decode(codes, blocks, state, stop - start).view(-1, in_features)


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
    """The tensors of the on-disk record; the packed bytes under the empty suffix.

    The settings in JSON are padded with blanks to STATE_BYTES, so that a record's size is known
    before its values are.
    """
    record = {"": quantized.packed, **quantized.state.as_dict(packed=True)}
    for suffix, tensor in record.items():
        if RECORD_MARK.lstrip(".") in suffix:
            blanks = torch.full((STATE_BYTES - len(tensor),), ord(" "), dtype=torch.uint8)
            record[suffix] = torch.cat([tensor.cpu(), blanks])
    return record


def record_layout(
    shape: tuple[int, ...], quant: QuantConfig
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each tensor of the record of a weight of that shape."""
    values = math.prod(shape)
    blocks = math.ceil(values / quant.blocksize)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "": (torch.uint8, (math.ceil(values / 2), 1)),
        "absmax": (torch.uint8 if quant.double_quant else torch.float32, (blocks,)),
        "quant_map": (torch.float32, (16,)),
    }
    if quant.double_quant:
        layout["nested_absmax"] = (torch.float32, (math.ceil(blocks / 256),))
        layout["nested_quant_map"] = (torch.float32, (256,))
    layout[f"{RECORD_MARK.lstrip('.')}{quant.quant_type}"] = (torch.uint8, (STATE_BYTES,))
    return layout


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


def is_on_grid(quantized: Quantized, quant: QuantConfig) -> bool:
    """Whether the codes are of the kind that `quant` asks for."""
    state = quantized.state
    own = (state.quant_type, state.blocksize, bool(state.nested))
    return own == (quant.quant_type, quant.blocksize, quant.double_quant)


def codes_changed(before: Quantized, after: Quantized) -> float:
    """The share of 4-bit codes that differ."""
    odd = before.packed ^ after.packed
    return float(((odd >> 4 > 0).sum() + (odd & 15 > 0).sum()) / (2 * odd.numel()))


# One of WAYS, or "plain", which makes a tensor each time. benchmarks/decode.py says which one is
# fastest; until it has run on a card, this is the one that is used the most elsewhere.
GPU_WAY = "bitsandbytes"


def decoded(layer: Any, dtype: torch.dtype, slot: int = 0) -> Tensor:
    """The weight (out, in) of a Linear4bit or an nn.Linear in `dtype`, not to be written to.

    It may lie in memory that the next call with the same slot, on the same thread, uses again;
    autograd tells whoever saved it for the backward pass.
    """
    weight: Tensor = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().to(dtype)
    quantized = Quantized(weight.detach(), state)
    way = way_for(weight.device, dtype)
    if way == "plain":
        return dequantize_to(quantized, dtype)
    return into_scratch(quantized, dtype, slot, way)


def way_for(device: torch.device, dtype: torch.dtype) -> str:
    """How 4-bit weights are decoded there."""
    if device.type != "cuda":
        return "plain"
    if GPU_WAY == "triton" and not usable(device, dtype):
        return "bitsandbytes"
    return GPU_WAY


def into_scratch(quantized: Quantized, dtype: torch.dtype, slot: int, way: str) -> Tensor:
    """The weight in this thread's memory of that slot, decoded in one of WAYS."""
    out = scratch(quantized.state.shape, dtype, quantized.packed.device, slot)
    WAYS[way](quantized, out)
    return out


def _by_triton(quantized: Quantized, out: Tensor) -> None:
    from qlora.ops import kernels as nf4

    nf4.decode(*quantized, out)
    written(out)


def _decode_by_bitsandbytes(quantized: Quantized, out: Tensor) -> None:
    packed, state = quantized
    torch.ops.bitsandbytes.dequantize_4bit.out(
        packed, absmax(quantized), state.blocksize, state.quant_type, out.shape, out.dtype, out=out
    )


WAYS: dict[str, Callable[[Quantized, Tensor], None]] = {
    "triton": _by_triton,
    "bitsandbytes": _decode_by_bitsandbytes,
}


class _Held(threading.local):
    """A thread's buffers, by device, stream and slot."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, int, int], Tensor] = {}


_held = _Held()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device, slot: int) -> Tensor:
    """Memory of that shape, with anything in it, that the next call of its kind gives again."""
    wanted = shape.numel() * dtype.itemsize
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(shape, dtype=dtype, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = device, stream, slot
    with torch.inference_mode(False):  # where memory has no version, and writing is not noticed
        buffer = _held.buffers.get(key)
        if buffer is None or len(buffer) < wanted:
            _held.buffers.pop(key, None)  # never the old beside the new
            del buffer
            buffer = torch.empty(wanted, dtype=torch.uint8, device=device)
            _held.buffers[key] = buffer
        return buffer[:wanted].view(dtype).view(shape)
