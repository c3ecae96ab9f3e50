"""Slow, plain, obviously right twins of what the package computes, in float64.

Nothing here imports the package. The 4-bit part follows the description in arXiv:2305.14314 and
the published constants; the LoRA part is equation 3 of arXiv:2106.09685.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

# The levels of 4-bit codes, as published with arXiv:2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def nf4_from_quantiles() -> list[float]:
    """NF4 made anew: 8 positive and 7 negative quantiles of N(0, 1) and zero, over the largest.

    The outermost probability lies half-way between those of 16 and of 15 equal bins.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    positive = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([negative, [0.0], positive]))
    return (levels / levels.max()).tolist()


# bitsandbytes' own, a sign and a magnitude; zero counts once
MAGNITUDES = [0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]
FP4 = sorted({sign * magnitude for magnitude in MAGNITUDES for sign in (-1, 1)})


def dynamic_levels() -> list[float]:
    """The 256 levels that absmax values are double quantized to (arXiv:1511.04561).

    Decade 10^(i-6) to 10^(i-5), i = 0 … 6, is cut into 2^i equal parts of either sign, whose
    midpoints are levels; 0 and 1 complete them.
    """
    middles = [
        10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2**i) for i in range(7) for k in range(2**i)
    ]
    return sorted([0.0, 1.0, *middles, *(-middle for middle in middles)])


class Codes(NamedTuple):
    """`indices` into the levels, one a value (n,), and `absmax`, one a block."""

    indices: np.ndarray
    absmax: np.ndarray


def quantize(values: Tensor, levels: list[float], blocksize: int) -> Codes:
    """Each block over its absmax; the nearest level's index, the lower one's when it is a tie."""
    flat = values.detach().to(torch.float64).flatten().numpy()
    indices, absmax = [], []
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        absmax.append(np.abs(block).max())
        scaled = block / absmax[-1] if absmax[-1] else block
        distance = np.abs(scaled[:, None] - np.array(levels)[None, :])
        indices.append(distance.argmin(axis=1))  # the first of equals: the lower level
    return Codes(np.concatenate(indices), np.array(absmax))


def dequantize(codes: Codes, levels: list[float], blocksize: int, shape: torch.Size) -> Tensor:
    """Level times absmax, float64."""
    scale = np.repeat(codes.absmax, blocksize)[: codes.indices.size]
    return torch.from_numpy(np.array(levels)[codes.indices] * scale).reshape(shape)


def double_quantize(absmax: np.ndarray) -> np.ndarray:
    """The absmax values that double quantization leaves: mean off, 8 bits in blocks of 256."""
    mean = absmax.mean()
    levels = dynamic_levels()
    codes = quantize(torch.from_numpy(absmax - mean), levels, 256)
    return dequantize(codes, levels, 256, torch.Size(absmax.shape)).numpy() + mean


def round_trip(
    values: Tensor, levels: list[float] = NF4, *, blocksize: int = 64, double_quant: bool = False
) -> Tensor:
    """What is left of `values` after 4 bits, float64."""
    codes = quantize(values, levels, blocksize)
    if double_quant:
        codes = codes._replace(absmax=double_quantize(codes.absmax))
    return dequantize(codes, levels, blocksize, values.shape)


def pack(indices: np.ndarray) -> Tensor:
    """Two indices a byte, the first in the high nibble; an odd one out is followed by zero's."""
    if indices.size % 2:
        indices = np.append(indices, NF4.index(0.0))
    high, low = indices[0::2], indices[1::2]
    return torch.from_numpy((high * 16 + low).astype(np.uint8))


def unpack(packed: Tensor) -> np.ndarray:
    pairs = packed.detach().cpu().flatten().numpy()
    return np.stack([pairs // 16, pairs % 16], axis=1).reshape(-1)


def near_ties(values: Tensor, levels: list[float], blocksize: int) -> np.ndarray:
    """Which values lie half-way between two levels as far as fp32 can tell, two roundings off."""
    codes = quantize(values, levels, blocksize)
    scale = np.repeat(codes.absmax, blocksize)[: values.numel()]
    scaled = values.double().flatten().numpy() / scale
    middles = (np.array(levels)[1:] + np.array(levels)[:-1]) / 2
    return np.abs(scaled[:, None] - middles[None, :]).min(axis=1) < 2 * 6e-8


def relative_rms(approximation: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the values."""
    approximation, exact = approximation.detach().double(), exact.detach().double()
    return float((approximation - exact).norm() / exact.norm())


def lora_forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """x W^T + scaling (x A^T) B^T, float64, differentiable in all of its tensors."""
    x, weight, lora_A, lora_B = (t.double() for t in (x, weight, lora_A, lora_B))
    return x @ weight.T + scaling * (x @ lora_A.T) @ lora_B.T


def delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return scaling * lora_B.detach().double() @ lora_A.detach().double()


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
    """Cross-entropy to (1 - e) onehot + e / vocab, float64, differentiable."""
    shift = 0 if bias is None else bias.double()
    logits = scale * (hidden.double() @ weight.double().T + shift)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), len(weight)).double()
    wanted = (1 - label_smoothing) * onehot + label_smoothing / len(weight)
    losses = -(wanted * torch.log_softmax(logits, 1)).sum(1)
    return losses[labels != ignore_index].sum()


def nearest_bf16(values: Tensor) -> Tensor:
    """Finite normal fp32 values with 8 significant bits, ties away from zero."""
    exact = values.detach().cpu().numpy().astype(np.float64)
    step = 2.0 ** (np.floor(np.log2(np.abs(np.where(exact == 0, 1, exact)))) - 7)
    rounded = np.trunc(exact / step + np.copysign(0.5, exact)) * step
    return torch.from_numpy(rounded).to(torch.bfloat16).to(values.device)
