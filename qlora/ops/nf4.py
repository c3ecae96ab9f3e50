"""The 4-bit codec of the frozen base, as pure tensor functions over bitsandbytes.

A weight is flattened row by row and cut into blocks of `blocksize` values. Each block is divided
by its absmax, and each value becomes the index of the nearest of 16 levels: NF4, quantiles of a
normal distribution, or FP4. Two indices share a byte, the first in the high nibble: 4 + 32/64 = 4.5
bits per weight. Double quantization subtracts the mean of the absmax values and stores them as
8-bit codes in blocks of 256: 4 + 8/64 + 32/(64*256) = 4.127 bits (arXiv:2305.14314, sec. 2 and 3).

On disk a weight `w` is bitsandbytes' record: `w` (packed bytes), `w.absmax`, `w.quant_map`, with
double quantization `w.nested_absmax` and `w.nested_quant_map`, and
`w.quant_state.bitsandbytes__nf4` (shape, dtype, blocksize, offset as JSON bytes).

Codes and absmax are the same for the same values in bf16, fp16 and fp32. The merge dequantizes to
fp32, level times absmax, so that only the result is rounded to 16 bits.

A forward pass decodes a whole weight before each product, in its dtype (`decoded`); for thousands
of tokens the product takes ten times as long. On a GPU each weight is decoded into the same buffer
(`scratch`), 117 MB for the MLP of Llama-3.1-8B in bf16. With a new tensor for each, the allocator
would fill freed blocks with smaller tensors, and request more memory from the card.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from bitsandbytes import functional as bnb
from torch import Tensor
from torch.autograd.graph import increment_version

from qlora.config import QuantConfig
from qlora.ops import agrees, is_gpu, may_use_triton

RECORD_MARK = ".quant_state.bitsandbytes__"
STATE_BYTES = 256  # of a record's JSON, padded
CELLS = 32
CHUNK = 1 << 20  # values at a time, a multiple of every blocksize
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as configs say


class Quantized(NamedTuple):
    """A 4-bit weight: `packed` uint8 (n/2, 1), and the bitsandbytes QuantState to dequantize it."""

    packed: Tensor
    state: bnb.QuantState


def as_bytes(packed: Tensor) -> Tensor:
    """Packed codes as uint8 (n/2, 1); for FSDP the same bytes are stored as a float dtype."""
    if packed.dtype == torch.uint8 and packed.ndim == 2 and packed.shape[1] == 1:
        return packed
    return packed.reshape(-1).view(torch.uint8).view(-1, 1)


def quantize(weight: Tensor, quant: QuantConfig) -> Quantized:
    """4-bit codes of `weight` (out, in), any float dtype, on its own device."""
    weight = weight.contiguous()
    quantized = _quantize_on_cpu(weight, quant)
    if quantized is not None:
        return quantized
    settings: Any = {"blocksize": quant.blocksize, "compress_statistics": quant.double_quant}
    return Quantized(*bnb.quantize_4bit(weight, quant_type=quant.quant_type, **settings))


def _quantize_on_cpu(weight: Tensor, quant: QuantConfig) -> Quantized | None:
    """bitsandbytes' result, bit for bit, in a third of the time and a tenth of the memory.

    Instead of a search among the 15 bounds between levels: [-1, 1] is cut into CELLS equal cells,
    each with at most one bound in it, so a code is that of the cell's lower end, or the next. None
    for FP4, or where the last block is not full or an absmax not finite.
    """
    flat, blocksize = weight.view(-1), quant.blocksize
    if weight.device.type != "cpu" or quant.quant_type != "nf4" or len(flat) % blocksize:
        return None
    first, bound = _cells()
    packed = torch.empty((len(flat) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(len(flat) // blocksize)
    for start in range(0, len(flat), CHUNK):
        x = flat[start : start + CHUNK].float().view(-1, blocksize)  # (blocks, blocksize)
        low, high = torch.aminmax(x, dim=1)
        scale = torch.maximum(high, -low)
        if not torch.isfinite(scale).all():
            return None
        absmax[start // blocksize :][: len(scale)] = scale
        x = (x * (1 / scale.clamp_min(1e-38))[:, None]).clamp_(-1, 1).view(-1)
        cell = _cell_of(x)
        code = first[cell].add_((x > bound[cell]).view(torch.uint8))  # two of them -> a byte
        packed[start // 2 :, 0][: len(code) // 2] = (code[::2] << 4) | code[1::2]
    offset = second = None
    if quant.double_quant:
        offset = absmax.mean()
        absmax, second = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    settings: Any = {"shape": weight.shape, "dtype": weight.dtype, "blocksize": blocksize}
    settings |= {"quant_type": "nf4", "code": codebook("nf4"), "offset": offset, "state2": second}
    return Quantized(packed, bnb.QuantState(absmax=absmax, **settings))


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


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in) of the codes, rounded once to `dtype`."""
    state = quantized.state
    return _dequantize(quantized.packed, absmax(quantized), state, state.shape, dtype)


def _dequantize(
    packed: Tensor, scales: Tensor, state: bnb.QuantState, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight, decoded as one row: where a block crosses rows, bitsandbytes' AVX-512 kernel
    reads a wrong absmax."""
    row = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, scales, state.blocksize, state.quant_type, (1, math.prod(shape)), dtype
    )
    return torch.as_tensor(row).view(shape)


def absmax(quantized: Quantized) -> Tensor:
    """The factor of each block's levels, fp32 (blocks,)."""
    state = quantized.state
    if not state.nested:
        return torch.as_tensor(state.absmax)
    second = state.state2
    first = torch.ops.bitsandbytes.dequantize_blockwise.default(
        state.absmax, second.absmax, second.code, second.blocksize, second.dtype
    )
    return torch.as_tensor(first.float() + state.offset)


def in_rows(quantized: Quantized, values: int) -> Iterator[tuple[slice, Tensor]]:
    """`dequantize` in parts (rows, in) of about `values` values, at least one row."""
    state = quantized.state
    (out_features, in_features), blocksize = state.shape, state.blocksize
    least = math.lcm(in_features, blocksize)  # values of whole rows and whole blocks
    size = max(1, values // least) * least
    packed, scales = quantized.packed.split(size // 2), absmax(quantized).split(size // blocksize)
    every = range(0, out_features, size // in_features)
    for first, codes, scale in zip(every, packed, scales, strict=True):
        last = min(first + every.step, out_features)
        part = _dequantize(codes, scale, state, (last - first, in_features), torch.float32)
        yield slice(first, last), part


@cache
def kernel_is_right(in_features: int, blocksize: int) -> bool:
    """Whether bitsandbytes' own layers compute with the right weights on this CPU: not its AVX-512
    kernel (0.50), where a block crosses rows of `in_features`, or holds several."""
    values = 8 * math.lcm(in_features, blocksize)  # several blocks, each with another absmax
    weight = torch.arange(1.0, values + 1).view(-1, in_features)
    quantized = quantize(weight, QuantConfig(blocksize=blocksize, double_quant=False))
    return agrees(bnb.dequantize_4bit, lambda *_: dequantize(quantized), *quantized, tolerance=0)


def round_trip(weight: Tensor, quant: QuantConfig) -> Tensor:
    """The fp32 weight with which a model loaded in 4 bits computes instead of `weight`."""
    return dequantize(quantize(weight, quant))


def to_record(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of the on-disk record, by suffix; the packed bytes have the empty suffix. Blanks
    pad the JSON bytes to STATE_BYTES, so that record_layout knows their size."""
    record = {"": quantized.packed, **quantized.state.as_dict(packed=True)}
    suffix = next(suffix for suffix in record if RECORD_MARK.lstrip(".") in suffix)
    blanks = torch.full((STATE_BYTES - len(record[suffix]),), ord(" "), dtype=torch.uint8)
    return record | {suffix: torch.cat([record[suffix].cpu(), blanks])}


def record_layout(shape: tuple[int, ...], quant: QuantConfig) -> Layout:
    """dtype and shape of each tensor of the record of a weight of that shape."""
    values = math.prod(shape)
    blocks = math.ceil(values / quant.blocksize)
    layout: Layout = {
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
    return Quantized(as_bytes(record[""]).to(device), state)


def codebook(quant_type: str) -> Tensor:
    """The 16 levels in [-1, 1], fp32, in the order of their 4-bit index."""
    return torch.as_tensor(bnb.get_4bit_type(quant_type, device="cpu"))


def codes_changed(before: Quantized, after: Quantized) -> float:
    """The share of 4-bit codes that differ."""
    bits = before.packed ^ after.packed
    return float(((bits >> 4 > 0).sum() + (bits & 15 > 0).sum()) / (2 * bits.numel()))


Decoder = Callable[[Quantized, Tensor], None]  # writes the dense weight into the tensor


def _by_bitsandbytes(quantized: Quantized, out: Tensor) -> None:
    packed, state = quantized
    torch.ops.bitsandbytes.dequantize_4bit.out(
        packed, absmax(quantized), state.blocksize, state.quant_type, out.shape, out.dtype, out=out
    )
    if not out.is_inference():
        increment_version(out)  # which that operator does not: autograd raises on stale values


def _without_values(quantized: Quantized, out: Tensor) -> None:
    absmax(quantized)  # which bitsandbytes allocates; no operator writes into meta tensors


def _by_triton(quantized: Quantized, out: Tensor) -> None:
    from qlora.ops import kernels

    kernels.decode(*quantized, out)


DECODERS: dict[str, Decoder] = {"bitsandbytes": _by_bitsandbytes, "triton": _by_triton}
KEPT_SLOTS = range(3, 7)  # of weights kept for the gradient, as of q, k, v, o; see `keep`
SPARE = 0.15  # of a GPU's memory, free in the first backward pass beside what is kept
GPU_DECODER: str | None = None  # one of DECODERS, to use on a GPU, however fast another is


def decoder(device: torch.device, dtype: torch.dtype) -> Decoder | None:
    """The function that decodes into a buffer on `device`, or None: each weight is a new tensor."""
    if not is_gpu(device):
        return None
    if device.type == "meta":
        return _without_values
    name = GPU_DECODER or fastest_decoder(device, dtype)
    is_usable = name != "triton" or triton_decodes(device, dtype)
    return DECODERS[name if is_usable else "bitsandbytes"]


@cache
def fastest_decoder(device: torch.device, dtype: torch.dtype) -> str:
    """The one of DECODERS that takes the least time on this GPU, measured once: Triton's kernel if
    it is right. The weights are larger than the GPU's caches together."""
    if not triton_decodes(device, dtype):
        return "bitsandbytes"
    shape, took = (4096, 4096), dict[str, float]()
    weights = [quantize(torch.randn(shape, device=device), QuantConfig()) for _ in range(4)]
    outs = [torch.empty(shape, dtype=dtype, device=device) for _ in weights]
    for name in [*DECODERS] * 3:  # the first time compiles; the last counts
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for weight, out in zip(weights, outs, strict=True):
            DECODERS[name](weight, out)
        end.record()
        end.synchronize()
        took[name] = start.elapsed_time(end)
    return min(took, key=took.__getitem__)


@cache
def triton_decodes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel runs on `device` and its values equal bitsandbytes', checked once."""
    if not may_use_triton(device, dtype):
        return False
    weight = torch.linspace(-1, 1, 90 * 200, device=device).view(90, 200)
    quantized = quantize(weight, QuantConfig())  # more than 256 blocks, the last is not full
    fast = partial(into_scratch, dtype=dtype, slot=-1, decode=_by_triton)  # a slot of its own
    name = f"Triton's decoding to {dtype} on {device}"
    return agrees(fast, partial(dequantize, dtype=dtype), quantized, tolerance=0, log_as=name)


def decoded(layer: Any, dtype: torch.dtype, slot: int = 0) -> Tensor:
    """The weight (out, in) of a Linear4bit or an nn.Linear in `dtype`; callers must not change it.

    The next call with this slot on this thread may overwrite it; autograd then raises if it was
    saved for the backward pass.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return torch.as_tensor(weight.detach().to(dtype))
    quantized = Quantized(as_bytes(weight.detach()), state)
    decode = decoder(quantized.packed.device, dtype)
    if decode is None:
        return dequantize(quantized, dtype)
    return into_scratch(quantized, dtype, slot, decode)


def keep(layer: Any, dtype: torch.dtype, slot: int) -> Tensor:
    """`decoded` in a forward pass that a backward pass runs again, for `kept` in the same backward
    pass: in a buffer of its own, if the GPU has memory for it."""
    state = getattr(layer.weight, "quant_state", None)
    task = torch._C._current_graph_task_id()  # -1 outside of backward passes
    if task == -1 or state is None:
        return decoded(layer, dtype)
    size, device = state.shape.numel() * dtype.itemsize, layer.weight.device
    if decoder(device, dtype) is None or not _has_room(slot, size, device):
        return decoded(layer, dtype)
    out = decoded(layer, dtype, slot)
    vars(_thread).setdefault("kept", {})[slot] = task, id(layer.weight), out, out._version
    return out


def kept(layer: Any, dtype: torch.dtype, slot: int) -> Tensor:
    """`decoded`, or what `keep` has decoded into that slot, if it is still there."""
    task, weight, out, version = vars(_thread).get("kept", {}).get(slot, (-1, 0, None, 0))
    is_same = (task, weight) == (torch._C._current_graph_task_id(), id(layer.weight))
    is_same = is_same and out is not None and out._version == version
    # and the buffer of this stream and dtype
    is_here = is_same and scratch(out.shape, dtype, out.device, slot) is out
    return torch.as_tensor(out) if is_here else decoded(layer, dtype)


def _has_room(slot: int, size: int, device: torch.device) -> bool:
    """Whether a buffer of `size` bytes leaves SPARE of the GPU's memory free, or of what
    torch may take of it: asked once. A plan on meta tensors is of a GPU that is full."""
    if device.type == "meta":
        return False
    room: dict[int, bool] = vars(_thread).setdefault("room", {})
    if slot not in room:
        free, total = torch.cuda.mem_get_info(device)
        limit = torch.cuda.get_per_process_memory_fraction(device) * total
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        room[slot] = min(free + reserved, limit) - used - size >= SPARE * limit
    return room[slot]


def into_scratch(quantized: Quantized, dtype: torch.dtype, slot: int, decode: Decoder) -> Tensor:
    """The weight (out, in), decoded into this thread's buffer of that slot."""
    out = scratch(quantized.state.shape, dtype, quantized.packed.device, slot)
    decode(quantized, out)
    return out


_thread = threading.local()  # its dictionary is the thread's own


def free_scratch() -> None:
    """Free this thread's buffers for decoded weights. Computation under way may still use them:
    their memory is reused in the order of the stream."""
    vars(_thread).pop("buffers", None)


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device, slot: int) -> Tensor:
    """Uninitialized memory of that shape, which the next call with this slot returns again.

    Kernels of one stream run in order: the previous product has then read the buffer. Each stream
    has its own, and each thread (autograd's backward thread is one), because two threads may take
    turns on one stream. A captured CUDA graph gets new memory, as it may outlive the buffer.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(shape, dtype=dtype, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    buffers: dict[Any, dict[Any, Tensor]] = vars(_thread).setdefault("buffers", {})
    views = buffers.setdefault((device, stream, slot), {})  # of one buffer, which is that of None
    view = views.get((shape, dtype))
    if view is None:
        size = shape.numel() * dtype.itemsize
        with torch.inference_mode(False):  # else autograd could not see that it was changed
            if None not in views or len(views[None]) < size:
                views.clear()  # the old one is freed before the new one is allocated
                views[None] = torch.empty(size, dtype=torch.uint8, device=device)
            view = views[shape, dtype] = views[None][:size].view(dtype).view(shape)
    return view
