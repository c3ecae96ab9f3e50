"""Loops of the search for codes, compiled for the CPU by numba.

They run column by column, each step depending on the ones before, on vectors of one value a row of
the weight. Of torch's operations each such step takes ten; here a strip of rows stays in the cache
for all columns. One thread runs them: numba's own threads would change the number of torch's, and
a process that is forked afterwards would hang. The plain equivalents are `descend` in
qlora.merge.codes and `round_panel` in qlora.merge.rounding. All tensors are fp32 and on the CPU;
those that are changed are contiguous.

Importing this module imports numba.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

STRIP = 64  # rows of the weight at a time: 128 columns of them are 32 KB


def descend(
    levels: Tensor, gradient: Tensor, hessian: Tensor, codebook: Tensor, *, integers: bool
) -> None:
    """As `descend` in qlora.ops.kernels."""
    inverse = hessian.diagonal().clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    _descend(*_arrays(levels, gradient, hessian, inverse, codebook), integers)


def round_panel(*tensors: Tensor) -> None:
    """As `round_panel` in qlora.merge.rounding."""
    _round(*_arrays(*tensors))


def _arrays(*tensors: Tensor) -> list["np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]:
    return [tensor.contiguous().numpy() for tensor in tensors]


@njit(nogil=True, fastmath={"contract"})
def _descend(levels, gradient, hessian, inverse, codebook, integers):
    columns, out = levels.shape
    for strip in range((out + STRIP - 1) // STRIP):
        first, last = strip * STRIP, min(out, (strip + 1) * STRIP)
        moved = np.empty(last - first, np.float32)
        for j in range(columns):
            level, slope = levels[j, first:last], gradient[j, first:last]
            for r in range(last - first):
                ideal = level[r] - slope[r] * inverse[j]
                if integers:
                    best = min(max(np.rint(ideal), codebook[0]), codebook[-1])
                else:
                    index = 0
                    for k in range(len(codebook) - 1):
                        index += ideal > np.float32(0.5) * (codebook[k] + codebook[k + 1])
                    best = codebook[index]
                moved[r] = best - level[r]
                level[r] = best
            for i in range(j + 1, columns):
                other, h = gradient[i, first:last], hessian[i, j]
                for r in range(last - first):
                    other[r] += h * moved[r]


@njit(nogil=True, fastmath={"contract"})
def _round(ideal, target, among, scale, shift, levels, values):
    columns, out = ideal.shape
    low, high = levels[0], levels[-1]
    for strip in range((out + STRIP - 1) // STRIP):
        first, last = strip * STRIP, min(out, (strip + 1) * STRIP)
        error = np.empty(last - first, np.float32)
        for j in range(columns - 1, -1, -1):
            wanted, value = ideal[j, first:last], values[j, first:last]
            of, base = scale[j, first:last], shift[j, first:last]
            goal = target[j, first:last]
            for r in range(last - first):
                level = np.rint((wanted[r] - base[r]) / of[r]) if of[r] != 0 else np.float32(0)
                value[r] = min(max(level, low), high) * of[r] + base[r]
                error[r] = goal[r] - value[r]
            for i in range(j):
                other, a = ideal[i, first:last], among[j, i]
                for r in range(last - first):
                    other[r] += a * error[r]
