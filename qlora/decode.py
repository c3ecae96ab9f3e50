"""The dense weight of a frozen layer, for the length of one matrix product.

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

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import usable, written
from qlora.nf4 import Quantized, absmax, dequantize_to

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
    from qlora.kernels import nf4

    nf4.decode(*quantized, out)
    written(out)


def _by_bitsandbytes(quantized: Quantized, out: Tensor) -> None:
    packed, state = quantized
    torch.ops.bitsandbytes.dequantize_4bit.out(
        packed, absmax(quantized), state.blocksize, state.quant_type, out.shape, out.dtype, out=out
    )


WAYS: dict[str, Callable[[Quantized, Tensor], None]] = {
    "triton": _by_triton,
    "bitsandbytes": _by_bitsandbytes,
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
