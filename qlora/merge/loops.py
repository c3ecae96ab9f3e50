"""The inner loops of the search for codes, over columns: in plain torch, and what is faster.

    descend        coordinate descent in a block (qlora.merge.codes)
    round_panel    rounding in order (qlora.merge.rounding)

Each column depends on those before it, and torch has five operations a column. numba compiles both
loops for a CPU (qlora.ops.compiled), Triton the first one for a GPU (qlora.ops.kernels), where it
is checked once.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qlora.merge.grids import Q4_0, TINY, Choice, Grid, IntegerGrid
from qlora.ops import agrees, may_use_triton, nf4

WIDEST = 256  # columns of a block: Triton's kernel has no registers for more


def descend(
    weight: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, shift: Tensor, grid: Grid
) -> None:
    """Move the values of a block (c, out) to their best levels, column by column, in place.

    `gradient` (c, out), which follows, and `hessian` (c, c): of the cost. `scale`, `shift` (out,).
    """
    inverse = hessian.diagonal().clamp_min(TINY).reciprocal().tolist()
    levels_per = torch.where(scale.abs() < TINY, 0.0, 1 / scale)
    for j, value in enumerate(weight.unbind()):
        ideal = torch.sub(value, gradient[j], alpha=inverse[j]) - shift
        best = torch.addcmul(shift, grid.snap(ideal * levels_per), scale)
        gradient.addr_(hessian[:, j], best - value)  # outer product (columns,) x (out,)
        value.copy_(best)


def descender(device: torch.device, *, columns: int) -> Callable[..., None]:
    """`descend`, or what is faster for blocks of so many columns."""
    if compiled := compiled_loops(device):
        return partial(_descend_in, compiled)
    if columns <= WIDEST and triton_descends(device):
        from qlora.ops import kernels

        return partial(_descend_in, kernels)
    return descend


def _descend_in(module: Any, *tensors_and_grid: Any) -> None:
    *tensors, grid = tensors_and_grid
    module.descend(*tensors, grid.levels, integers=isinstance(grid, IntegerGrid))


@cache
def triton_descends(device: torch.device) -> bool:
    """Whether Triton's kernel runs on `device` and chooses `descend`'s values, checked once."""
    if not may_use_triton(device, torch.float32):
        return False
    from qlora.ops import kernels

    weight = torch.linspace(-1, 1, 32 * 40, device=device).view(40, 32).T.contiguous()  # (c, out)
    hessian = torch.eye(32, device=device) + 0.3
    scale, shift = torch.linspace(0.1, 0.2, 80, device=device).split(40)
    levels = nf4.codebook("nf4").to(device)
    grids = Q4_0(weight), Grid(levels, 32, Choice(weight, scale))

    def moved(step: Callable[..., None]) -> list[Tensor]:
        given = [(weight.clone(), 0.1 * weight.flip(0), hessian, scale, shift) for _ in grids]
        for tensors, grid in zip(given, grids, strict=True):
            step(*tensors, grid)
        return [tensor for tensors in given for tensor in tensors[:2]]

    name = f"Triton's search for codes on {device}"
    fast = partial(moved, partial(_descend_in, kernels))
    return agrees(fast, partial(moved, descend), tolerance=1e-5, log_as=name)


def round_panel(
    ideal: Tensor,
    target: Tensor,
    among: Tensor,
    scale: Tensor,
    shift: Tensor,
    levels: Tensor,
    values: Tensor,
) -> None:
    """Round the columns of `ideal` (c, out), from the last to the first, to `values` (c, out).

    The error against `target` (c, out) of column j moves those before it, as `among` (c, c) says,
    the rows and columns of L. `scale`, `shift` (c, out) are those of each value; `levels` are all
    integers between two. Changes `ideal`.
    """
    for j in reversed(range(len(ideal))):
        level = ((ideal[j] - shift[j]) / scale[j]).nan_to_num_(0, 0, 0).round_()
        torch.addcmul(shift[j], level.clamp_(levels[0], levels[-1]), scale[j], out=values[j])
        ideal[:j].addr_(among[j, :j], target[j] - values[j])  # outer product (columns,) x (out,)


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def compiled_loops(device: torch.device) -> Any:
    """The module with loops that numba compiles for a CPU; None if there is none for `device`."""
    if device.type == "cpu" and _has_numba():
        from qlora.ops import compiled

        return compiled
    return None
