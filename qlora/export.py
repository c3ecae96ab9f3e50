"""A weight with its adapter folded in, in the format it is to be kept in.

    16 or 32 bits    base + scaling * B A, in fp32, and one cast
    4 bits           codes that act like base + scaling * B A

Rounding to the nearest code loses the adapter where the base lies on the 4-bit grid itself, as the
base of QLoRA does. With the layer's input moments the codes are chosen so that it survives
(qlora.rounding). Without them, but with the weights from before quantization, those plus the
adapter are rounded: what quantization had taken off them dithers the adapter's small change.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora import nf4
from qlora.config import QuantConfig
from qlora.lora import Factors
from qlora.rounding import keep_adapter


@dataclass(frozen=True)
class Folding:
    """A weight (out, in) about to be exported, on one device."""

    weight: Tensor | None = None
    """what the adapter is folded into, where that is no 4-bit weight, any float dtype"""
    factors: Factors | None = None
    codes: nf4.Quantized | None = None
    """else the codes of it"""
    original: Tensor | None = None
    """the weight from before quantization, where it is at hand"""

    @property
    def shape(self) -> torch.Size:
        """(out, in)"""
        return self.codes.state.shape if self.codes else self.weight.shape  # type: ignore[union-attr]

    def base(self) -> Tensor:
        """What the adapter is folded into, fp32 (out, in)."""
        return nf4.dequantize(self.codes) if self.codes else self.weight.float()  # type: ignore[union-attr]

    def in_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """`base`, some rows at a time, so that little is held at once."""
        if self.codes:
            yield from nf4.in_rows(self.codes, _values_at_once(self.codes.packed))
            return
        assert self.weight is not None
        step = max(1, _values_at_once(self.weight) // self.weight.shape[1])
        for first in range(0, len(self.weight), step):
            rows = slice(first, first + step)
            yield rows, self.weight[rows].float()


def _values_at_once(tensor: Tensor) -> int:
    return 1 << 20 if tensor.device.type == "cpu" else 1 << 26


Facts = dict[str, float]


def in_full(folding: Folding, dtype: torch.dtype) -> tuple[Tensor, Facts]:
    """base + delta in fp32, cast once; and what is to be reported of an adapted layer."""
    merged = None
    sums = [0.0, 0.0, 0.0]  # of base^2, delta^2, and delta times the change
    for rows, base in folding.in_rows():
        if merged is None:
            merged = torch.empty(folding.shape, dtype=dtype, device=base.device)
        if folding.factors is None:
            merged[rows] = base
            continue
        delta = folding.factors.rows(rows).change(base)
        merged[rows] = base + delta
        change = merged[rows].float() - base
        for i, (a, b) in enumerate(((base, base), (delta, delta), (delta, change))):
            sums[i] += _dot(a, b)
    assert merged is not None
    if folding.factors is None:
        return merged, {}
    return merged, _facts(math.sqrt(sums[0]), math.sqrt(sums[1]), sums[2], sums[1])


def in_4_bits(
    folding: Folding, quant: QuantConfig, moments: Tensor | None
) -> tuple[nf4.Quantized, Facts]:
    """4-bit codes for base + delta, of the kind that `quant` says; and what is to be reported.

    Args:
        moments: sum of x x' over the layer's inputs, fp32 (in, in), if known.
    """
    base = folding.base()
    if folding.codes and not nf4.is_on_grid(folding.codes, quant):
        folding = replace(folding, weight=base, codes=None)
    if folding.factors is None:
        return folding.codes or nf4.quantize(base, quant), {}
    delta = folding.factors.change(base)
    merged = choose_codes(folding, base, delta, quant, moments)
    change = nf4.dequantize(merged) - base
    felt = delta if moments is None else delta @ moments
    norms = float(base.norm()), float(delta.norm())
    found = _facts(*norms, _dot(felt, change), _dot(felt, delta))
    if folding.codes:
        found["codes_changed"] = nf4.codes_changed(folding.codes, merged)
    return merged, found


def choose_codes(
    folding: Folding, base: Tensor, delta: Tensor, quant: QuantConfig, moments: Tensor | None
) -> nf4.Quantized:
    """Codes for base + delta (out, in), by what is known."""
    if moments is None and folding.original is not None:
        return nf4.quantize(folding.original.float() + delta, quant)
    target = base + delta
    if moments is None:
        moments = torch.eye(target.shape[1], device=target.device)
    assert folding.factors is not None
    lora_A, lora_B = folding.factors[:2]
    start = folding.codes or nf4.quantize(target, quant)
    return keep_adapter(start, target, lora_A, lora_B, moments)


def _facts(weight_norm: float, delta_norm: float, kept: float, wanted: float) -> Facts:
    """Norms, and the share of delta in the change: in the weights, or felt by a layer's inputs."""
    return {
        "weight_norm": weight_norm,
        "delta_norm": delta_norm,
        "delta_over_weight": delta_norm / weight_norm if weight_norm else math.inf,
        "kept": kept / wanted if wanted else 1.0,
    }


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of products of all values, without a tensor of them."""
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
