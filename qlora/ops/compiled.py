"""Loops of the search for codes, compiled for the CPU by numba.

They run column by column, each step depending on the ones before, on vectors of one value a row of
the weight. Of torch's operations each such step takes ten; here a strip of rows stays in the cache
for all columns. One thread runs them: numba's own threads would change the number of torch's, and
a process that is forked afterwards would hang; Python's gained nothing beside torch's, which wait
for their next task in a loop. The plain equivalents are `descend` and `round_panel` in
qlora.merge.loops. All tensors are fp32, on the CPU, contiguous if changed.

Importing this module imports numba.
"""

import numpy as np
from numba import njit
from torch import Tensor

TINY = np.finfo(np.float32).tiny
STRIP = 64  # rows of the weight at a time: 128 columns of them are 32 KB


def descend(*tensors: Tensor, integers: bool) -> None:
    """As `descend` in qlora.ops.kernels."""
    _descend(*_arrays(*tensors), integers)


def round_panel(*tensors: Tensor) -> None:
    """As `round_panel` in qlora.merge.loops."""
    _round(*_arrays(*tensors))


def _arrays(*tensors: Tensor) -> list["np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]:
    return [tensor.contiguous().numpy() for tensor in tensors]


@njit(fastmath={"contract"})
def _descend(weight, gradient, hessian, scale, shift, codebook, integers):
    columns, out = weight.shape
    middles = np.float32(0.5) * (codebook[:-1] + codebook[1:])
    value, slope = np.zeros((2, columns, STRIP), np.float32)
    unit, zero, levels_per, ideal, level, moved = np.zeros((6, STRIP), np.float32)
    index = np.empty(STRIP, np.int32)
    for first in range(0, out, STRIP):
        count, rows = min(out - first, STRIP), slice(first, first + STRIP)
        value[:, :count], slope[:, :count] = weight[:, rows], gradient[:, rows]
        unit[:count], zero[:count] = scale[rows], shift[rows]
        for r in range(STRIP):
            levels_per[r] = np.float32(1) / unit[r] if abs(unit[r]) >= TINY else np.float32(0)
        for j in range(columns):
            inverse = np.float32(1) / max(hessian[j, j], TINY)
            for r in range(STRIP):
                ideal[r] = (value[j, r] - slope[j, r] * inverse - zero[r]) * levels_per[r]
            if integers:
                for r in range(STRIP):
                    level[r] = min(max(np.rint(ideal[r]), codebook[0]), codebook[-1])
            else:
                index[:] = 0
                for middle in middles:
                    for r in range(STRIP):
                        index[r] += ideal[r] > middle
                for r in range(STRIP):
                    level[r] = codebook[index[r]]
            for r in range(STRIP):
                best = level[r] * unit[r] + zero[r]
                moved[r] = best - value[j, r]
                value[j, r] = best
            for i in range(columns):
                for r in range(STRIP):
                    slope[i, r] += hessian[i, j] * moved[r]
        weight[:, rows], gradient[:, rows] = value[:, :count], slope[:, :count]


@njit(fastmath={"contract"})
def _round(ideal, target, among, scale, shift, levels, values):
    columns, out = ideal.shape
    low, high = levels[0], levels[-1]
    for first in range(0, out, STRIP):
        last = min(out, first + STRIP)
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
