"""Rounding in order against GPTQ as its paper has it, and against scales by brute force."""

import pytest
import torch
from torch import Tensor

from qlora.merge import rounding
from qlora.merge.grids import Q4_0, Q4_1, Q4_K, Int4, IntegerGrid

KINDS = pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q4_K, Int4], ids=lambda kind: kind.__name__)


def layer(out: int = 16, wide: int = 256) -> tuple[Tensor, Tensor]:
    """A weight (out, in), and moments of uneven inputs."""
    draw = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(wide, wide, generator=draw)).Q
    x = torch.randn(1000, wide, generator=draw) * torch.logspace(0, -1.5, wide) @ rotation
    return torch.randn(out, wide, generator=draw), x.T @ x


def noise(grid: IntegerGrid, target: Tensor, moments: Tensor) -> float:
    error = grid.weight.T - target
    return float((error @ moments * error).sum())


def gptq(grid: IntegerGrid, target: Tensor, moments: Tensor) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323 with act_order, a column a block, in fp64: (in, out)."""
    order = moments.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(moments.double()[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = target.double().T[order]  # (in, out)
    rounded = torch.empty_like(left)
    for j, column in enumerate(order.tolist()):
        scale = grid.scale[column // grid.block].double()
        shift = 0 if grid.shift is None else grid.shift[column // grid.block].double()
        rounded[column] = grid.snap((left[j] - shift) / scale) * scale + shift
        error = (left[j] - rounded[column]) / upper[j, j]
        left[j + 1 :] -= torch.outer(upper[j, j + 1 :], error)
    return rounded


@KINDS
def test_values_are_those_of_gptq(kind):
    target, moments = layer()
    grid = kind(target.T.contiguous())
    rounding.round_in_order(grid, target, rounding.InputOrder(moments))  # in two panels
    wanted = gptq(grid, target, moments)
    same = torch.isclose(grid.weight.double(), wanted, rtol=1e-5, atol=1e-6)
    assert float(same.double().mean()) > 0.97  # a tie in fp32 may move what follows
    assert noise(grid, target, moments) == pytest.approx(
        float(((wanted.T - target) @ moments.double() * (wanted.T - target)).sum()), rel=0.02
    )


@KINDS
@pytest.mark.parametrize("rows", [1, 64, 150])  # of strips of 64
def test_the_compiled_loop_rounds_alike(kind, rows, monkeypatch):
    pytest.importorskip("numba")
    target, moments = layer(out=rows)
    target[:, :32] = 0  # blocks whose scale is 0
    order, chosen = rounding.InputOrder(moments), []
    for loops in rounding.compiled_loops, lambda _: None:
        monkeypatch.setattr(rounding, "compiled_loops", loops)
        grid = kind(target.T.contiguous())
        rounding.round_in_order(grid, target, order)
        chosen.append(grid)
    one, other = chosen
    assert torch.equal(one.scale, other.scale)
    assert (one.weight == other.weight).float().mean() > 0.999  # sums in another order
    assert noise(one, target, moments) == pytest.approx(noise(other, target, moments), rel=0.01)


@KINDS
def test_scales_are_chosen_for_what_the_inputs_before_do_not_tell(kind):
    """Against least squares for each scale that is tried."""
    target, moments = layer()
    order = moments.diagonal().argsort(stable=True)
    factor, left = rounding._factors(moments[order][:, order])
    ordered = moments[order][:, order]
    torch.testing.assert_close(factor * left @ factor.T, ordered, rtol=1e-4, atol=1e-3)
    importance = torch.empty_like(left)
    importance[order] = left
    grid = kind(target.T.contiguous())
    wanted = [best_scale(grid, block, target, importance) for block in range(len(grid.scale))]
    rounding._fit_blocks(grid, target.T, importance)
    same = torch.isclose(grid.scale, torch.stack(wanted), rtol=1e-5, atol=0)
    assert float(same.double().mean()) > 0.99  # two may cost the same in fp32


def best_scale(grid: IntegerGrid, block: int, target: Tensor, importance: Tensor) -> Tensor:
    """Of the scales (out,) that least squares in fp64 find, those of the least cost."""
    columns = slice(block * grid.block, (block + 1) * grid.block)
    size, found = importance[columns].double().sqrt()[:, None], []
    for part in rounding.SCALES:
        start = None if grid.shift is None else grid.shift[block] * part
        scale, shift = grid.nearest(block, grid.scale[block] * part, start)
        values = target.T[columns]
        levels = grid.snap((values if shift is None else values - shift) / scale).double()
        pair = [levels] if shift is None else [levels, torch.ones_like(levels)]
        inputs = torch.stack(pair, -1).transpose(0, 1) * size  # (out, columns, 1 or 2)
        solved = torch.linalg.lstsq(inputs, (size * values).T[..., None]).solution.float()
        low = None if shift is None else solved[:, 1, 0]
        scale, shift = grid.nearest(block, solved[:, 0, 0], low)
        error = size * (levels * scale + (0 if shift is None else shift) - values)
        found.append((error.square().sum(0), scale))
    costs, scales = (torch.stack(each) for each in zip(*found, strict=True))
    return scales.gather(0, costs.argmin(0, keepdim=True))[0]


@KINDS
def test_inputs_that_never_occur_are_rounded_to_about_the_nearest(kind):
    """An expert that no calibration token reached has moments of zero, and some inputs are idle."""
    target, moments = layer()
    target[3] = 0
    idle = moments.clone()
    idle[40:80] = idle[:, 40:80] = 0
    for case in (torch.zeros_like(moments), idle):
        grid = kind(target.T.contiguous())
        start = float((grid.weight.T - target)[:, 40:80].norm())
        rounding.round_in_order(grid, target, rounding.InputOrder(case))
        error = grid.weight.T - target
        assert float(error[:, 40:80].norm()) < 1.5 * start
        assert not error[3].any()
