"""Rotary position embedding of queries and keys, as one operation with its own backward pass.

A head's vector is two halves (x1, x2); cosines and sines of a position are as long as a head, with
halves (c1, c2) and (s1, s2), which most models fill alike (arXiv:2104.09864):

    y1 = x1 c1 - x2 s1      dx1 = dy1 c1 + dy2 s2
    y2 = x2 c2 + x1 s2      dx2 = dy2 c2 - dy1 s1

Models write it as x * cos + cat(-x2, x1) * sin: five operations forward for each of q and k, and
nine backward, over tensors as large as the hidden states. On a GPU this is one kernel each way for
q and k together, which rounds once; elsewhere six operations on halves. Nothing but cosines and
sines is saved for the backward pass. The result is stored as (batch, tokens, heads, dim), the order
in which attention wants it and in which its output is read.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops import agrees, computing_device, may_use_triton

Pair = tuple[Tensor, Tensor]
Rotation = Callable[..., Pair]  # of q, k, cos, sin; keyword backward


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """q (batch, heads, tokens, dim) and k, of fewer heads or as many, rotated.

    cos and sin are (batch or 1, tokens, dim), all of one dtype and device.
    """
    return _Rotate.apply(q, k, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        ctx.save_for_backward(cos, sin)
        return implementation(computing_device(q.device), q.dtype)(q, k, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        rotation = implementation(computing_device(dq.device), dq.dtype)
        return *rotation(dq, dk, *ctx.saved_tensors, backward=True), None, None


@cache
def implementation(device: torch.device, dtype: torch.dtype) -> Rotation:
    """Triton's kernel, if it runs on `device` and agrees with torch, checked once; or torch."""
    if device.type == "meta":
        return _without_values
    if not may_use_triton(device, dtype):
        return plain
    from qlora.ops import kernels

    generator = torch.Generator(device).manual_seed(0)
    # heads of 80 values in 5 and 2 heads: neither is a power of two
    shapes = (2, 5, 7, 80), (2, 2, 7, 80), (1, 7, 80), (1, 7, 80)
    inputs = [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]

    def both(rotation: Rotation) -> list[Tensor]:
        return [y for way in (False, True) for y in rotation(*inputs, backward=way)]

    name = f"Triton's rotary embedding in {dtype} on {device}"
    tolerance = 2 * torch.finfo(dtype).eps
    right = agrees(
        lambda: both(kernels.rotate), lambda: both(plain), tolerance=tolerance, log_as=name
    )
    return kernels.rotate if right else plain


def _without_values(q: Tensor, k: Tensor, *_: Tensor, backward: bool) -> Pair:
    return empty_like_heads(q), empty_like_heads(k)


def empty_like_heads(x: Tensor) -> Tensor:
    """An empty tensor of x's shape (batch, heads, tokens, dim), stored as (batch, tokens, …)."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Pair:
    """The same by torch's operations, equal to the models' to the bit."""
    (c1, c2), (s1, s2) = cos[:, None].chunk(2, dim=-1), sin[:, None].chunk(2, dim=-1)
    if backward:
        s1, s2 = -s2, -s1
    return _plain(q, c1, c2, s1, s2), _plain(k, c1, c2, s1, s2)


def _plain(x: Tensor, c1: Tensor, c2: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    y = empty_like_heads(x)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, c1, out=y1).sub_(x2 * s1)
    torch.mul(x2, c2, out=y2).add_(x1 * s2)
    return y
