"""The elementwise part of a gated MLP, W_down (act(W_gate x) * W_up x), forward and backward.

    h = act(gate) * up            dgate = dh * up * act'(gate)            dup = dh * act(gate)

act is SiLU (SwiGLU) or GELU (GeGLU, arXiv:2002.05202). The backward pass recomputes h, so that it
need not be saved for W_down's adapter. All is computed in fp32 and each result is rounded once;
models round act(gate) to 16 bits before they multiply.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.ops import agrees, computing_device, may_use_triton

_ATEN: Any = torch.ops.aten
_TANH: Any = {"approximate": "tanh"}
# x -> act(x), a new tensor; (dy, x) -> dy * act'(x)
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (F.silu, _ATEN.silu_backward),
    "gelu": (F.gelu, _ATEN.gelu_backward),
    "gelu_tanh": (partial(F.gelu, **_TANH), partial(_ATEN.gelu_backward, **_TANH)),
}
ACTS = tuple(_FUNCTIONS)
Implementation = tuple[Callable[..., None], Callable[..., None]]  # of forward and backward

# Values per chunk of the plain version: a few fp32 chunks fit a CPU core's cache, which halves the
# time; a GPU's chunk uses the whole card, and bounds the memory.
CHUNK = {"cpu": 1 << 17}
GPU_CHUNK = 1 << 24


@torch.no_grad()
def gated_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, contiguous, in the dtype of both, without a graph.

    Raises:
        ValueError: `act` is not in ACTS, or the tensors differ in shape, dtype or device.
    """
    gate, up = _checked(act, gate, up)
    h = torch.empty_like(gate)
    implementation(computing_device(gate.device), gate.dtype, act)[0](gate, up, h, act)
    return h


@torch.no_grad()
def gated_backward(
    gate: Tensor, up: Tensor, dh: Tensor, act: str, *, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup), contiguous, for `dh`, the gradient in h = act(gate) * up.

    With `in_place` they overwrite dh, gate and up, where those are contiguous; a later backward
    pass over a graph that saved these raises. Bad arguments raise as in gated_forward.
    """
    gate, up, dh = _checked(act, gate, up, dh)
    h, dgate, dup = (dh, gate, up) if in_place else (torch.empty_like(gate) for _ in range(3))
    implementation(computing_device(gate.device), gate.dtype, act)[1](
        gate, up, dh, h, dgate, dup, act
    )
    return h, dgate, dup


@cache
def implementation(device: torch.device, dtype: torch.dtype, act: str) -> Implementation:
    """Triton's kernels, if they run on `device` and agree with torch, checked once; or torch."""
    plain = plain_forward, plain_backward
    if device.type == "meta":  # no values: as a kernel, it allocates nothing
        return _without_values, _without_values
    if not may_use_triton(device, dtype):
        return plain
    from qlora.ops import kernels

    fast = kernels.gated_forward, kernels.gated_backward

    def outputs(functions: Implementation) -> list[Tensor]:
        parts = list[Tensor]()
        for size in 4096, 4099:  # Triton compiles another kernel for sizes that 16 divides
            gate = torch.linspace(-9, 9, size, device=device).to(dtype)
            up, dh, tensors = gate.flip(0), gate.roll(7), [torch.empty_like(gate) for _ in range(4)]
            functions[0](gate, up, tensors[0], act)
            functions[1](gate, up, dh, *tensors[1:], act)
            # the few values of the last block are compared on their own, else they hardly count
            parts += [part for tensor in tensors for part in tensor.split(4096)]
        return parts

    # one rounding, and exponentials that may differ by several roundings of fp32
    tolerance = torch.finfo(dtype).eps + 1e-5
    name = f"Triton's kernel of {act} over {dtype} on {device}"
    right = agrees(lambda: outputs(fast), lambda: outputs(plain), tolerance=tolerance, log_as=name)
    return fast if right else plain


def _without_values(*_: Any) -> None:
    pass


def _checked(act: str, *tensors: Tensor) -> list[Tensor]:
    if act not in ACTS:
        raise ValueError(f"act must be one of {', '.join(ACTS)}, got {act!r}")
    kinds = [(tuple(t.shape), t.dtype, t.device) for t in tensors]
    if len(set(kinds)) > 1:
        shown = "; ".join(f"{shape} {dtype} on {device}" for shape, dtype, device in kinds)
        raise ValueError(f"gate, up and dh must agree in shape, dtype and device, got {shown}")
    return [t.contiguous() for t in tensors]


def plain_forward(gate: Tensor, up: Tensor, h: Tensor, act: str) -> None:
    """h = act(gate) * up, all contiguous, computed in fp32, or fp64 for fp64."""
    for g, u, h_out in _chunks(gate, up, h):
        h_out.copy_(_FUNCTIONS[act][0](_wide(g)).mul_(u))


def plain_backward(
    gate: Tensor, up: Tensor, dh: Tensor, h: Tensor, dgate: Tensor, dup: Tensor, act: str
) -> None:
    """Writes h, dgate and dup, which may share memory with gate, up and dh."""
    activation, times_slope = _FUNCTIONS[act]
    for g, u, d, h_out, dgate_out, dup_out in _chunks(gate, up, dh, h, dgate, dup):
        wide = _wide(g)
        activated = activation(wide)
        g_gradient = times_slope(_wide(d) * u, wide)
        h_values = activated * u
        dup_out.copy_(activated.mul_(d))
        dgate_out.copy_(g_gradient)
        h_out.copy_(h_values)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = CHUNK.get(computing_device(tensors[0].device).type, GPU_CHUNK)
    return zip(*(t.view(-1).split(size) for t in tensors), strict=True)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
