"""Linear + cross-entropy in chunks of tokens: the loss of a language model without its logits.

    z_i  = softcap * tanh(scale * (W x_i + b) / softcap)           without a softcap, scale * (…)
    loss = sum_i [logsumexp(z_i) - (1 - e) z_i[y_i] - e mean(z_i)] / divisor     e: label_smoothing

of all tokens i with a label. Logits (tokens, vocab) are the largest tensor of a training step: 4096
tokens over 128k take 2.1 GB in fp32, and the plain path holds them several times over. Here a chunk
of them exists at a time, and the gradient of x is computed while it does:

    dz_i = softmax(z_i) - (1 - e) onehot(y_i) - e / vocab          times the slope of the softcap
    dx_i = scale * W' dz_i / divisor

so that the backward pass has nothing left to do but to multiply dx with a number, and no chunk is
computed twice. It costs the plain path's two products, only over tokens with a label, and a chunk's
logits, in fp32 and once more in the dtype of x.

The idea is that of Liger's fused linear cross-entropy (arXiv:2410.10989). Left out: the gradient of
W, as the head of a 4-bit base is frozen (who trains it takes the plain path), and skipping small
probabilities (cut cross-entropy, arXiv:2411.09009), which changes the result.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.errors import UserError

NO_LABEL = -100

# fp32 logits of a chunk. Each chunk reads all of W, so it should have a few hundred tokens: fewer
# wait for memory, more are no faster. Over 128k that is 128 tokens on a CPU and 512 on a GPU, whose
# arithmetic is further ahead of its memory.
CHUNK_BYTES = {"cpu": 64 << 20}
GPU_CHUNK_BYTES = 256 << 20

# Probabilities of one token in 100,000 are near the end of what fp16 can hold. A power of two
# changes nothing else, and is taken back at the end.
GRADIENT_SCALE = 256.0


class _Head(NamedTuple):
    """What makes logits of hidden states, and a loss of logits."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    label_smoothing: float


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    divisor: Tensor | int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits that `weight` makes of `hidden`, in fp32; fp64 of fp64.

    Differentiable in `hidden` alone. Where no token has a label, it and its gradient are 0.

    Args:
        hidden: (tokens, dim).
        weight: (vocab, dim), frozen; its dtype is the one that products are computed in.
        labels: (tokens,), -100 where there is none.
        bias: (vocab,), frozen.
        scale: what logits are multiplied with.
        softcap: what they are then bounded by.
        divisor: what the sum over tokens is divided by, a count or a tensor (), of which 0 is
            taken as 1; by default how many have a label.
        chunk_bytes: fp32 logits that may exist at a time.

    Raises:
        UserError: `weight` or `bias` is to get a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise UserError(
            "linear_cross_entropy has no gradient for the output head, and this one is trained: "
            "freeze it, or compute the loss from logits"
        )
    kept = (labels != NO_LABEL).nonzero()[:, 0]
    hidden, labels = hidden[kept].to(weight.dtype), labels[kept]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    count = len(labels) if divisor is None else divisor
    divided_by = torch.as_tensor(count, dtype=dtype, device=hidden.device).clamp_min(1)
    head = _Head(weight, bias, scale, softcap, label_smoothing)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(hidden.device.type, GPU_CHUNK_BYTES)
    rows = max(1, chunk_bytes // (len(weight) * dtype.itemsize))
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, labels, divided_by, head, rows
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of tokens that all have a label; the gradient is ready when it is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, divisor: Tensor, head: _Head, rows: int
    ) -> Tensor:
        # 1 / divisor = 2^-exponent / mantissa. The mantissa goes into the gradient before it is
        # rounded, and the power of two after, which then rounds nothing: a 16-bit gradient is as
        # exact as the plain path's.
        mantissa, exponent = torch.frexp(divisor)
        losses = torch.empty(len(hidden), dtype=divisor.dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            losses[chunk], logits_gradient = _of_chunk(
                hidden[chunk], labels[chunk], head, GRADIENT_SCALE / mantissa, gradient is not None
            )
            if gradient is not None:
                gradient[chunk] = logits_gradient.to(hidden.dtype) @ head.weight
            del logits_gradient  # else the next chunk's would stand beside it
        if gradient is not None:
            power = torch.ldexp(torch.full_like(divisor, 1 / GRADIENT_SCALE), -exponent)
            ctx.save_for_backward(gradient, power)
        return losses.sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient, power = ctx.saved_tensors
        # in fp32, as a loss scaled for fp16 is multiplied with more than fp16 can hold
        scaled = (gradient.to(power.dtype) * (loss_gradient * power)).to(gradient.dtype)
        return scaled, None, None, None, None


def _of_chunk(
    hidden: Tensor, labels: Tensor, head: _Head, factor: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses (rows,), and factor times the gradient of the sum of them in W x + b (rows, vocab)."""
    z = F.linear(hidden, head.weight, head.bias).to(factor.dtype)
    slope = None
    if head.scale != 1:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = 1 - z * z if wants_gradient else None
        z *= head.softcap
    picked, mean = z.gather(1, labels[:, None]), z.mean(1, keepdim=True)
    top = z.amax(1, keepdim=True)
    p = z.sub_(top).exp_()
    total = p.sum(1, keepdim=True)
    smoothing = head.label_smoothing
    losses = total.log() + (1 - smoothing) * (top - picked) + smoothing * (top - mean)
    if wants_gradient:
        factor = factor * head.scale
        p *= factor / total
        if smoothing:
            p -= factor * (smoothing / p.shape[1])
        p.scatter_add_(1, labels[:, None], (smoothing - 1) * factor.expand_as(picked))
        if slope is not None:
            p *= slope
    return losses[:, 0], p
