"""A weight with its adapter folded in, in the format it is to be kept in.

    16 or 32 bits    base + scaling * B A, in fp32, and one cast
    4 bits           codes that act like base + scaling * B A

Rounding to the nearest code loses the adapter where the base lies on the 4-bit grid itself, as the
base of QLoRA does. With the layer's input moments the codes are chosen so that it survives
(qlora.rounding). Without them, but with the weights from before quantization, those plus the
adapter are rounded: what quantization had taken off them dithers the adapter's small change.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora import nf4
from qlora.config import QuantConfig
from qlora.lora import Factors
from qlora.rounding import keep_adapter


@dataclass(frozen=True)
class Folding:
    """A weight (out, in) about to be exported, on one device."""

    base: Tensor
    """what the adapter is folded into, fp32"""
    factors: Factors | None = None
    codes: nf4.Quantized | None = None
    """what `base` is dequantized from"""
    original: Tensor | None = None
    """the weight from before quantization, where it is at hand"""

    def delta(self) -> Tensor | None:
        return self.factors.change(self.base) if self.factors else None


Facts = dict[str, float]


def in_full(folding: Folding, dtype: torch.dtype) -> tuple[Tensor, Facts]:
    """base + delta in fp32, cast once; and what is to be reported of an adapted layer."""
    delta = folding.delta()
    if delta is None:
        return folding.base.to(dtype), {}
    merged = (folding.base + delta).to(dtype)
    return merged, _facts(folding.base, delta, merged.float() - folding.base)


def in_4_bits(
    folding: Folding, quant: QuantConfig, moments: Tensor | None
) -> tuple[nf4.Quantized, Facts]:
    """4-bit codes for base + delta, of the kind that `quant` says; and what is to be reported.

    Args:
        moments: sum of x x' over the layer's inputs, fp32 (in, in), if known.
    """
    codes, delta = folding.codes, folding.delta()
    if codes is not None and not nf4.is_on_grid(codes, quant):
        codes = None
    if delta is None or folding.factors is None:
        return codes or nf4.quantize(folding.base, quant), {}
    target = folding.base + delta
    if moments is None and folding.original is not None:
        merged = nf4.quantize(folding.original.float() + delta, quant)
    else:
        if moments is None:
            moments = torch.eye(target.shape[1], device=target.device)
        start = codes or nf4.quantize(target, quant)
        lora_A, lora_B = folding.factors[:2]
        merged = keep_adapter(start, target, lora_A, lora_B, moments)
    found = _facts(folding.base, delta, nf4.dequantize(merged) - folding.base, moments)
    if codes is not None:
        found["codes_changed"] = nf4.codes_changed(codes, merged)
    return merged, found


def _facts(base: Tensor, delta: Tensor, change: Tensor, moments: Tensor | None = None) -> Facts:
    """Norms, and the share of delta in `change`: in the weights, or felt by inputs like these."""
    weight_norm, delta_norm = float(base.norm()), float(delta.norm())
    felt = delta if moments is None else delta @ moments
    wanted = _dot(felt, delta)
    return {
        "weight_norm": weight_norm,
        "delta_norm": delta_norm,
        "delta_over_weight": delta_norm / weight_norm if weight_norm else math.inf,
        "kept": _dot(felt, change) / wanted if wanted else 1.0,
    }


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of products of all values, without a tensor of them."""
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
