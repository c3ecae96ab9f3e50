"""Groups of rows that make up for each other's errors, against the solution of the whole."""

import pytest
import torch
from torch import Tensor

from qlora.merge import codes
from qlora.merge.coupling import GROUPS, RowGroups
from qlora.merge.grids import Q4_0, Q4_1, Q4_K, Q6_K, Int4, Int4ZeroPoint, IntegerGrid
from qlora.merge.moments import Moments

OUT, WIDE = 48, 256
GRIDS = [Q4_0, Q4_1, Q4_K, Q6_K, Int4, Int4ZeroPoint]


def layer() -> tuple[Tensor, Moments]:
    """A weight, and moments of inputs and gradients with a few main directions."""
    draw = torch.Generator().manual_seed(0)

    def uneven(size: int, low: float) -> Tensor:
        turn = torch.linalg.qr(torch.randn(size, size, generator=draw)).Q
        x = torch.randn(2000, size, generator=draw) * torch.logspace(0, low, size) @ turn
        return x.T @ x

    weight = torch.randn(OUT, WIDE, generator=draw)
    return weight, Moments(uneven(WIDE, -2.5), uneven(OUT, -2.0))


def cost(error: Tensor, moments: Moments) -> float:
    assert moments.outputs is not None
    return float((moments.outputs @ error * (error @ moments.inputs)).sum())


def test_a_group_owes_what_makes_the_cost_least():
    _, moments = layer()
    assert moments.outputs is not None
    coupled = RowGroups(moments.outputs, WIDE)
    assert [len(rows) for rows in coupled.groups] == [OUT // GROUPS] * GROUPS
    energy = moments.outputs.diagonal()[torch.cat(coupled.groups)]
    assert torch.equal(energy, energy.sort(descending=True).values)
    used = (coupled.factor.T @ coupled.factor + coupled.rest.diag()).double()
    error = torch.randn(OUT, WIDE, generator=torch.Generator().manual_seed(1))
    for number, rows in enumerate(coupled.groups):
        done, left = torch.cat([rows[:0], *coupled.groups[:number]]), coupled.groups[number:]
        rest = torch.cat(left)
        best = -torch.linalg.solve(used[rest][:, rest], used[rest][:, done] @ error[done].double())
        owed = coupled.owed(number).double()
        torch.testing.assert_close(owed, best[: len(rows)], rtol=1e-3, atol=1e-3)
        coupled.add(number, error[rows])


def test_of_a_small_layer_the_moments_are_used_whole():
    _, moments = layer()
    assert moments.outputs is not None
    coupled = RowGroups(moments.outputs, WIDE)
    whole = coupled.factor.T @ coupled.factor
    torch.testing.assert_close(whole, moments.outputs, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.__name__)
def test_errors_of_rows_make_up_for_each_other(kind: type[IntegerGrid]):
    weight, moments = layer()
    alone, coupled = (kind(weight.T.contiguous()) for _ in range(2))
    codes.keep_outputs(alone, weight, Moments(moments.inputs))
    codes.keep_outputs(coupled, weight, moments)
    before, after = (cost(grid.weight.T - weight, moments) for grid in (alone, coupled))
    assert after < 0.75 * before
    again = kind(weight.T.contiguous())
    again.put(torch.arange(OUT), coupled.rows(torch.arange(OUT)))
    assert torch.equal(again.weight, coupled.weight)
    block = again.scale.repeat_interleave(again.block, 0)
    shift = 0 if again.shift is None else again.shift.repeat_interleave(again.block, 0)
    stored = again.levels[again.level_indices()] * block + shift
    torch.testing.assert_close(stored, again.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_layers_of_fewer_rows_than_groups_or_without_gradients(size):
    weight, moments = layer()
    for outputs in (torch.zeros(size, size), torch.eye(size)):
        grid = Q4_0(weight[:size].T.contiguous())
        start = grid.weight.clone()
        codes.keep_outputs(grid, weight[:size], Moments(moments.inputs, outputs))
        alone = type(grid)(weight[:size].T.contiguous())
        codes.keep_outputs(alone, weight[:size], Moments(moments.inputs))
        torch.testing.assert_close(grid.weight, alone.weight)
        assert not torch.equal(grid.weight, start)
