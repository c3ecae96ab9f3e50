"""Linear + cross-entropy in chunks of tokens: the loss of a language model without its logits.

    z_i  = softcap * tanh(scale * (W x_i + b) / softcap)      without a softcap: scale * (W x_i + b)
    loss = sum_i [logsumexp(z_i) - (1 - e) z_i[y_i] - e mean(z_i)]           e: label_smoothing

over all tokens i with a label. Logits (tokens, vocab) are the largest tensor of a training step:
4096 tokens over 128k take 2.1 GB in fp32, and the plain path holds several copies. Here one chunk
exists at a time, and the gradient of x is computed from it at once:

    dz_i = softmax(z_i) - (1 - e) onehot(y_i) - e / vocab         times the slope of the softcap
    dx_i = scale * W' dz_i

The backward pass multiplies dx by the loss's gradient, a number. The cost is the plain path's two
products, only over tokens with a label, and a chunk's logits, in fp32 and once more in x's dtype.

In 16 bits that number (one over the tokens of a step, say) must not cost a second rounding. On a
GPU dx is a product in fp32 and is rounded once, after the multiplication. A CPU has no such
product: there, and only there, dz contains the mantissa of the number of tokens, which leaves a
power of two to multiply by, unless a step has tokens of other micro-batches.

The idea is Liger's fused linear cross-entropy (arXiv:2410.10989). Left out: the gradient of W, as
the head of a 4-bit base is frozen (a trained one is trained on the plain path), and skipping small
probabilities (cut cross-entropy, arXiv:2411.09009), which changes the result.
torch.nn.functional.linear_cross_entropy (2.13) has no softcap.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.errors import UserError
from qlora.ops import computing_device, is_gpu
from qlora.ops.lora import linear

# fp32 logits of a chunk. Each reads all of W, 1 FLOP per byte and token in 16 bits; cards have 165
# (a 4090) to 206 (an H200, by data sheet) FLOP per byte of bandwidth, so that more tokens are no
# faster. For a vocabulary of 128k a chunk has 245 tokens, on a CPU 131.
CHUNK_BYTES = {"cpu": 64 << 20}
GPU_CHUNK_BYTES = 120 << 20

# Keeps probabilities of 1e-5 away from the smallest numbers of fp16; divided out at the end.
GRADIENT_SCALE = 256.0


class Head(NamedTuple):
    """From hidden states x to the logits z of the formula above."""

    product: Callable[[Tensor], Tensor]
    """x (rows, dim) -> W x + b (rows, vocab), of any layer that computes row by row"""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, dim) -> (rows, vocab), in fp32 (fp64 for fp64)."""
        product = self.product(hidden)
        z = product.to(torch.promote_types(product.dtype, torch.float32))
        _scale(z, self.scale, self.softcap)
        return z

    def gradient(self, hidden: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient in `hidden` (rows, dim) of a function of the logits; `of` computes its
        gradient in them (rows, vocab) from them."""
        x = hidden.detach().requires_grad_()
        with torch.enable_grad():
            product = self.product(x)
        dtype = torch.promote_types(product.dtype, torch.float32)
        z = product.detach().to(dtype, copy=True)
        slope = _scale(z, self.scale, self.softcap, with_slope=True)
        gradient = of(z).mul_(self.scale)
        if slope is not None:
            gradient *= slope
        return torch.autograd.grad(product, x, gradient.to(product.dtype))[0]


def chunk_rows(weight: Tensor) -> int:
    """The number of tokens in a chunk, for a head of this shape (vocab, dim), dtype and device."""
    chunk_bytes = CHUNK_BYTES.get(computing_device(weight.device).type, GPU_CHUNK_BYTES)
    itemsize = torch.promote_types(weight.dtype, torch.float32).itemsize
    return max(1, chunk_bytes // (len(weight) * itemsize))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The sum of the tokens' cross-entropy, fp32 (fp64 for fp64), differentiable in `hidden`.

    Args:
        hidden: (tokens, dim).
        weight: (vocab, dim), frozen; products are computed in its dtype.
        labels: (tokens,), `ignore_index` for tokens without one.
        bias: (vocab,), frozen; scale and softcap are those of the formula above.

    Raises:
        UserError: `weight` or `bias` requires a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise UserError(
            "no gradient for the output head, and this one is trained: freeze it, or use its logits"
        )
    kept = (labels != ignore_index).nonzero()[:, 0]
    settings = scale, softcap, label_smoothing
    with torch.autocast(hidden.device.type, enabled=False):
        inputs = hidden[kept].to(weight.dtype), labels[kept], weight, bias, settings
        return _LinearCrossEntropy.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


_Settings = tuple[float, float | None, float]  # scale, softcap and e


@torch.no_grad()
def head_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    rows: int,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_cross_entropy` of any head, in chunks of `rows` tokens; without a gradient."""
    kept = (labels != ignore_index).nonzero()[:, 0]
    losses = []
    for i in kept.split(rows):
        z = head.logits(hidden[i])  # scaled already
        losses.append(_losses(z, labels[i], (1.0, None, label_smoothing), None).sum())
    return torch.stack(losses).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of tokens that all have a label; forward computes the gradient along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        rows, factor = chunk_rows(weight), None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        losses = hidden.new_empty(len(hidden), dtype=dtype)
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(hidden, dtype=dtype)
            factor = GRADIENT_SCALE
            if not is_gpu(weight.device):
                factor /= math.frexp(max(1, len(labels)))[0]
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            z = linear(hidden[chunk], weight, bias).to(dtype)
            losses[chunk] = _losses(z, labels[chunk], settings, factor)
            if factor is not None:
                z = z.to(hidden.dtype)  # which frees the larger one
                gradient[chunk] = _input_gradient(z, weight)
            del z  # before the next chunk's is allocated
        if factor is not None:
            ctx.save_for_backward(gradient)
            ctx.factor, ctx.dtype = settings[0] / factor, hidden.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * (loss_gradient * ctx.factor)).to(ctx.dtype), None, None, None, None


def _input_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    """(rows, vocab) @ (vocab, dim) -> (rows, dim), of 16-bit factors in fp32 on a GPU."""
    if is_gpu(weight.device) and weight.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(dz, weight, out_dtype=torch.float32)
    return linear(dz, weight.T)


def _scale(
    z: Tensor, scale: float, softcap: float | None, *, with_slope: bool = False
) -> Tensor | None:
    """Apply scale and softcap to W x + b in place; returns the softcap's slope, if asked for."""
    slope = None
    if scale != 1:
        z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z * z if with_slope else None
        z *= softcap
    return slope


def _losses(z: Tensor, labels: Tensor, settings: _Settings, factor: float | None) -> Tensor:
    """Losses (rows,) of z = W x + b (rows, vocab), overwritten by their gradients in scale * z,
    times `factor`; without a factor z has no meaning afterwards."""
    scale, softcap, smoothing = settings
    slope = _scale(z, scale, softcap, with_slope=factor is not None)
    picked, mean = z.gather(1, labels[:, None]), z.mean(1, keepdim=True)
    top = z.amax(1, keepdim=True)
    p = z.sub_(top).exp_()
    total = p.sum(1, keepdim=True)
    losses = total.log() + (1 - smoothing) * (top - picked) + smoothing * (top - mean)
    if factor is not None:
        p *= factor / total
        if smoothing:
            p -= factor * smoothing / p.shape[1]
        p.scatter_add_(1, labels[:, None], torch.full_like(picked, (smoothing - 1) * factor))
        if slope is not None:
            p *= slope
    return losses[:, 0]
