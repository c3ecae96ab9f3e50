"""Other methods of rounding W + delta to 4 bits, in a few lines of plain torch each, for
comparison.

Each has the signature of `qlora.merge.codes.choose_codes` and can replace it, so that all but the
rounding is the same. None of them changes absmax.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from qlora.config import QuantConfig
from qlora.merge.codes import AdaptedWeight
from qlora.ops import nf4

Method = Callable[[AdaptedWeight, Tensor, Tensor, QuantConfig, Tensor | None], nf4.Quantized]


def on_the_adapters_space(
    adapted: AdaptedWeight, base: Tensor, delta: Tensor, quant: QuantConfig, _: Tensor | None
) -> nf4.Quantized:
    """No data: one sweep over the columns of W4 + delta that keeps error @ A.T near zero."""
    assert adapted.factors is not None
    lora_A = adapted.factors.lora_A.float()
    return descend(nf4.quantize(base + delta, quant), base + delta, lora_A.T @ lora_A, sweeps=1)


def gptq(
    adapted: AdaptedWeight, base: Tensor, delta: Tensor, quant: QuantConfig, moments: Tensor | None
) -> nf4.Quantized:
    """GPTQ (arXiv:2210.17323) toward W4 + delta, with 1 % damping, absmax as it rounds."""
    assert moments is not None
    start = nf4.quantize(base + delta, quant)
    scale, levels = scales(start), nf4.codebook(quant.quant_type)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    chol = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left, weight = base + delta, torch.empty_like(base)
    for j in range(weight.shape[1]):
        weight[:, j] = nearest(left[:, j], scale[:, j], levels)
        error = (left[:, j] - weight[:, j]) / chol[j, j]
        left[:, j:] -= error[:, None] * chol[j, j:]
    return with_levels(start, weight)


def descent(
    adapted: AdaptedWeight, base: Tensor, delta: Tensor, quant: QuantConfig, moments: Tensor | None
) -> nf4.Quantized:
    """From W4's codes two sweeps of coordinate descent toward W4 + delta, weighted by X'X."""
    assert adapted.codes is not None and moments is not None
    return descend(adapted.codes, base + delta, moments, sweeps=2)


def descent_from_original(
    adapted: AdaptedWeight, base: Tensor, delta: Tensor, quant: QuantConfig, moments: Tensor | None
) -> nf4.Quantized:
    """The same from quantize(W16 + delta)."""
    assert adapted.original is not None and moments is not None
    start = nf4.quantize(adapted.original.float() + delta, quant)
    return descend(start, base + delta, moments, sweeps=2)


def descend(start: nf4.Quantized, target: Tensor, moments: Tensor, sweeps: int) -> nf4.Quantized:
    """For each column, choose the level that lowers tr(E H E') most, with all others fixed."""
    scale, levels = scales(start), nf4.codebook(start.state.quant_type)
    weight = nf4.dequantize(start)
    felt = (weight - target) @ moments
    for _ in range(sweeps):
        for j in range(weight.shape[1]):
            curvature = moments[j, j]
            if curvature == 0:
                continue
            now = weight[:, j].clone()
            weight[:, j] = nearest(now - felt[:, j] / curvature, scale[:, j], levels)
            felt += (weight[:, j] - now)[:, None] * moments[j]
    return with_levels(start, weight)


def nearest(values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The level times `scale` nearest to each value (out,)."""
    ordered = levels.sort().values
    bounds = (ordered[1:] + ordered[:-1]) / 2
    return torch.as_tensor(ordered[torch.bucketize(values / scale, bounds)] * scale)


def scales(quantized: nf4.Quantized) -> Tensor:
    """absmax of each weight, (out, in)."""
    state = quantized.state
    each = nf4.absmax(quantized).repeat_interleave(state.blocksize)
    return each[: state.shape.numel()].view(state.shape)


def with_levels(quantized: nf4.Quantized, weight: Tensor) -> nf4.Quantized:
    """The record with the same absmax, whose levels give `weight`."""
    levels = nf4.codebook(quantized.state.quant_type)
    shares = (weight / scales(quantized)).nan_to_num().flatten()
    ordered, order = levels.sort(stable=True)
    codes = order[torch.bucketize(shares, (ordered[1:] + ordered[:-1]) / 2)].to(torch.uint8)
    return nf4.Quantized((codes[::2] << 4 | codes[1::2]).view(-1, 1), quantized.state)


def instead(method: Method) -> Any:
    """Inside the block, merges to 4 bits round with `method`."""
    return patch("qlora.merge.codes.choose_codes", method)
