"""The elementwise part of a gated MLP, W_down (act(W_gate x) * W_up x), forward and backward.

    h = act(gate) * up            dgate = dh * up * act'(gate)            dup = dh * act(gate)

act is SiLU (SwiGLU) or GELU (GeGLU, arXiv:2002.05202). The backward pass makes h anew, so that it
need not be kept for W_down's adapter. All is computed in fp32 and each result is rounded once; the
plain way rounds act(gate) to 16 bits before it multiplies.

In one pass: Triton's kernel on a GPU, and elsewhere torch over chunks that stay in the cache.

Triton kernels, each with a plain-torch twin that is its oracle and stands in for it.

Nothing here imports Triton until a kernel is wanted: `usable` says whether there is any point.
"""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

ACTS = ("silu", "gelu", "gelu_tanh")

# Values at a time where there is no kernel. On a CPU a few fp32 chunks share a core's cache: half
# the time of the whole at once. On a GPU it bounds what they take, and a chunk fills the card.
CHUNK = {"cpu": 1 << 17}
GPU_CHUNK = 1 << 24


@torch.no_grad()
def gated_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, contiguous, in the dtype that both have.

    No gradient flows through it. `act` is one of ACTS, "gelu_tanh" being GELU's approximation.

    Raises:
        ValueError: `act` is another, or the tensors differ in shape, dtype or device.
    """
    _check(act, gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    if has_kernel(gate.device, gate.dtype, act):
        from qlora.ops import kernels as gated

        gated.forward(gate, up, h, act)
    else:
        plain_forward(gate, up, h, act)
    return h


@torch.no_grad()
def gated_backward(
    gate: Tensor, up: Tensor, dh: Tensor, act: str, *, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup), contiguous, of `dh`, the gradient of h = act(gate) * up.

    With `in_place` they lie in the memory of dh, gate and up, where those are contiguous. Whoever
    saved these for another backward pass is then told by autograd that they are gone.

    Raises:
        ValueError: `act` is none of ACTS, or the tensors differ in shape, dtype or device.
    """
    _check(act, gate, up, dh)
    gate, up, dh = gate.contiguous(), up.contiguous(), dh.contiguous()
    out = (dh, gate, up) if in_place else tuple(torch.empty_like(gate) for _ in range(3))
    h, dgate, dup = out
    if has_kernel(gate.device, gate.dtype, act):
        from qlora.ops import kernels as gated

        gated.backward(gate, up, dh, h, dgate, dup, act)
        written(*out)
    else:
        plain_backward(gate, up, dh, h, dgate, dup, act)
    return h, dgate, dup


@cache
def has_kernel(device: torch.device, dtype: torch.dtype, act: str) -> bool:
    """Whether the kernel runs there, and gives what its twin gives: seen once, on a few values."""
    if not usable(device, dtype):
        return False
    from qlora.ops import kernels as gated

    grid = torch.linspace(-9, 9, 4099, device=device).to(dtype)
    gate, up, dh = grid, grid.flip(0), grid.roll(7)
    found, wanted = torch.empty(2, 4, len(grid), device=device, dtype=dtype)
    gated.forward(gate, up, found[0], act)
    gated.backward(gate, up, dh, found[1], found[2], found[3], act)
    plain_forward(gate, up, wanted[0], act)
    plain_backward(gate, up, dh, wanted[1], wanted[2], wanted[3], act)
    # one rounding, and exponentials that may differ by some of fp32's
    close = torch.finfo(dtype).eps + 1e-5
    is_right = torch.allclose(found, wanted, rtol=close, atol=1e-4)
    if not is_right:
        logging.getLogger(__name__).warning(
            "Triton's kernel of %s over %s on %s is wrong, so torch computes it", act, dtype, device
        )
    return is_right


def _check(act: str, *tensors: Tensor) -> None:
    if act not in ACTS:
        raise ValueError(f"act must be one of {', '.join(ACTS)}, got {act!r}")
    kinds = [(tuple(t.shape), t.dtype, t.device) for t in tensors]
    if len(set(kinds)) > 1:
        shown = "; ".join(f"{shape} {dtype} on {device}" for shape, dtype, device in kinds)
        raise ValueError(f"gate, up and dh must agree in shape, dtype and device, got {shown}")


def plain_forward(gate: Tensor, up: Tensor, h: Tensor, act: str) -> None:
    """The kernel's twin: act(gate) * up into h, all contiguous. fp64 in fp64."""
    for g, u, out in _chunks(gate, up, h):
        out.copy_(_activation(_wide(g), act).mul_(u))


def plain_backward(
    gate: Tensor, up: Tensor, dh: Tensor, h: Tensor, dgate: Tensor, dup: Tensor, act: str
) -> None:
    """The kernel's twin; the last three tensors may be the first three's."""
    for g, u, d, h_out, dgate_out, dup_out in _chunks(gate, up, dh, h, dgate, dup):
        wide, activated = _wide(g), _activation(_wide(g), act)
        change = _times_slope(_wide(d) * u, wide, act)
        made = activated * u
        dup_out.copy_(activated.mul_(d))
        dgate_out.copy_(change)
        h_out.copy_(made)


def _chunks(*tensors: Tensor) -> Any:
    size = CHUNK.get(tensors[0].device.type, GPU_CHUNK)
    return zip(*(t.view(-1).split(size) for t in tensors), strict=True)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _activation(x: Tensor, act: str) -> Tensor:
    """In memory of its own."""
    if act == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def _times_slope(gradient: Tensor, x: Tensor, act: str) -> Tensor:
    """gradient * act'(x)"""
    aten: Any = torch.ops.aten
    if act == "silu":
        made: Tensor = aten.silu_backward(gradient, x)
    else:
        kind = "tanh" if act == "gelu_tanh" else "none"
        made = aten.gelu_backward(gradient, x, approximate=kind)
    return made


@cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run on `device` over tensors of `dtype`: found out by running one, once.

    Triton may be missing (Windows, macOS), have no C compiler to build its launchers with, or not
    know the card. Where it is there and fails, that is said once.
    """
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    if device.type != "cuda" or not known or find_spec("triton") is None:
        return False
    try:
        from qlora.ops import kernels as gated

        one = torch.ones(1, device=device, dtype=dtype)
        gated.forward(one, one, torch.empty_like(one), "silu")
    except Exception as error:  # of compilers and drivers, of many kinds
        logging.getLogger(__name__).warning(
            "Triton's kernels do not run over %s on %s, so slower ways are taken: %s",
            dtype,
            device,
            error,
        )
        return False
    return True


def written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote to them, which it then reports where they were saved."""
    increment_version([t for t in tensors if not t.is_inference()])
