"""keep_adapter against brute force, least squares, and rounding to nearest."""

import pytest
import reference
import torch
from conftest import axis
from torch import Tensor

from qlora.adapters.lora import delta_weight
from qlora.config import QuantConfig
from qlora.merge import codes, coupling
from qlora.merge.grids import NF4Grid
from qlora.ops import nf4

PLAIN = QuantConfig(double_quant=False, blocksize=64)


def layer(
    out: int = 48, wide: int = 128, *, ratio: float = 0.01, quant: QuantConfig = PLAIN
) -> tuple[nf4.Quantized, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of keep_adapter, with moments of inputs as uneven as a model's are."""
    draw = torch.Generator().manual_seed(1)
    start = nf4.quantize(torch.randn(out, wide, generator=draw), quant)
    base = nf4.dequantize(start)
    lora_A, lora_B = (torch.randn(s, generator=draw) for s in ((4, wide), (out, 4)))
    scaling = ratio * float(base.norm() / (lora_B @ lora_A).norm())
    rotation = torch.linalg.qr(torch.randn(wide, wide, generator=draw)).Q
    x = torch.randn(1000, wide, generator=draw) * torch.logspace(0, -2.5, wide) @ rotation
    target = base + delta_weight(lora_A, lora_B, scaling)
    return start, target, lora_A, scaling * lora_B, x.T @ x


def keep_adapter(start: nf4.Quantized, *weights: Tensor) -> nf4.Quantized:
    """The 4-bit weight of the codes that are chosen from `start` on."""
    grid = NF4Grid(start)
    codes.keep_adapter(grid, *weights)
    return grid.quantized()


def product(a: Tensor, b: Tensor, moments: Tensor) -> float:
    """tr(A H B'), of the outputs of two weights (out, in)."""
    return float((a @ moments * b).sum())


@pytest.mark.parametrize(
    ("ratio", "least"), [(0.003, 0.4), (0.01, 0.85), (0.03, 0.95), (0.1, 0.99)]
)
@pytest.mark.parametrize("double_quant", axis(True, False))
def test_the_adapter_survives_where_rounding_to_nearest_loses_it(ratio, least, double_quant):
    quant = QuantConfig(double_quant=double_quant)
    start, target, lora_A, lora_B, moments = layer(256, 256, ratio=ratio, quant=quant)
    base = nf4.dequantize(start)
    delta = target - base

    def kept(quantized: nf4.Quantized) -> float:
        change = nf4.dequantize(quantized) - base
        return product(change, delta, moments) / product(delta, delta, moments)

    assert least < kept(keep_adapter(start, target, lora_A, lora_B, moments)) < 1.1
    assert kept(nf4.quantize(target, quant)) < least - 0.1


@pytest.mark.parametrize("wide", [64, 84], ids=["aligned", "blocks across rows"])
def test_a_sweep_moves_each_code_in_turn_to_the_best_of_the_sixteen_levels(wide):
    """Against the same descent by brute force: each column in turn, every level tried."""
    start, target, _, _, moments = layer(16, wide, ratio=0.3)
    moments = moments / moments.diagonal().mean()
    grid = NF4Grid(start)
    grid.moves = False  # codes alone: absmax stays
    codes._Descent(grid, target, moments, codes._factor(moments, 64)).sweep(0.0)
    levels = torch.tensor(reference.NF4).double()
    scale = nf4.absmax(start).double().repeat_interleave(64)[: 16 * wide].view(16, wide)
    for row in range(16):
        weight = nf4.dequantize(start)[row].double()
        for j in range(wide):
            tried = weight.repeat(16, 1)  # (levels, in)
            tried[:, j] = levels * scale[row, j]
            error = tried - target[row].double()
            weight = tried[(error @ moments.double() * error).sum(1).argmin()]
        torch.testing.assert_close(grid.weight[:, row], weight.float(), rtol=1e-5, atol=1e-6)


def test_absmax_moves_to_the_level_that_costs_least():
    start, target, _, _, moments = layer(8, 64, ratio=0.05, quant=QuantConfig())
    grid = NF4Grid(start)
    levels, before, state = grid.weight / grid.scale, grid.scale[0].clone(), start.state
    gradient = moments @ (grid.weight - target.T)
    codes._Panel(grid, 0, gradient, moments)._move_scales(slice(0, 64))
    moved = grid.scale[0]
    choices = state.state2.code.double() * state.state2.absmax.double() + state.offset.double()

    def cost(row: int, absmax: Tensor) -> float:
        error = (levels[:, row].double() * absmax - target[row].double())[None]
        return product(error, error, moments.double())

    for row in range(8):
        tried = [*choices, before[row].double()]
        least = min(cost(row, absmax) for absmax in tried if absmax > 0)
        assert cost(row, moved[row].double()) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize(
    "quant",
    [{}, {"quant_type": "fp4"}, {"blocksize": 128}, {"blocksize": 32, "double_quant": False}],
    ids=str,
)
@pytest.mark.parametrize("wide", [128, 80], ids=["aligned", "blocks across rows"])
def test_chosen_codes_make_a_valid_record(quant, wide):
    quant = QuantConfig(**quant)
    start, target, lora_A, lora_B, moments = layer(16, wide, ratio=0.05, quant=quant)
    again = NF4Grid(start).quantized()
    assert torch.equal(nf4.dequantize(again), nf4.dequantize(start))
    if quant.quant_type == "nf4":
        assert torch.equal(again.packed, start.packed)  # FP4 has two codes for zero
    chosen = keep_adapter(start, target, lora_A, lora_B, moments)
    record, layout = nf4.to_record(chosen), nf4.record_layout((16, wide), quant)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in record.items()} == layout
    assert torch.equal(nf4.dequantize(nf4.from_record(record)), nf4.dequantize(chosen))
    lost = [(nf4.dequantize(c) - target) @ moments @ lora_A.T for c in (start, chosen)]
    assert float(lost[1].norm()) < float(lost[0].norm()) / 2  # of what A reads


def test_idle_adapters_and_unused_inputs_leave_the_codes_alone():
    """An expert that no calibration token reached has moments of zero."""
    start, target, lora_A, lora_B, moments = layer()
    idle = nf4.dequantize(start), lora_A, torch.zeros_like(lora_B), moments
    unused = target, lora_A, lora_B, torch.zeros_like(moments)
    for case in (idle, unused):
        assert torch.equal(keep_adapter(start, *case).packed, start.packed)


def test_the_systematic_error_is_corrected(monkeypatch):
    """Against least squares on inputs with these moments."""
    monkeypatch.setattr(codes, "ROUNDS", 20)  # enough to correct it
    start, target, lora_A, lora_B, moments = layer(256, 256)
    values, vectors = torch.linalg.eigh(moments.double())
    x = values.clamp_min(0).sqrt()[:, None] * vectors.T  # x' x = moments
    responses = codes._Responses(lora_A, lora_B, moments)
    seen = x @ responses.directions.double().T

    def systematic(quantized: nf4.Quantized) -> float:
        error = (nf4.dequantize(quantized) - target).double()
        y = x @ error.T @ torch.linalg.qr(lora_B).Q.double()  # (in, in) (in, out) (out, r)
        return float((seen @ torch.linalg.lstsq(seen, y).solution).square().sum())

    descent = codes._Descent(NF4Grid(start), target, moments, codes._factor(moments, 64))
    assert responses.error(descent) == pytest.approx(systematic(start), rel=1e-3)
    chosen = keep_adapter(start, target, lora_A, lora_B, moments)
    assert systematic(chosen) < 0.03 * systematic(start)


def test_principal_directions_of_the_inputs():
    *_, moments = layer(8, 256)
    values, found = (t[:32] for t in coupling.principal(moments, 64))  # more than are used
    torch.testing.assert_close(found @ found.T, torch.eye(32), rtol=0, atol=1e-5)
    largest = torch.linalg.eigvalsh(moments)[-32:].sum()
    assert float(torch.trace(found @ moments @ found.T) / largest) > 0.99
    assert float(values.sum() / largest) > 0.99


def test_moments_of_full_rank_are_kept_beside_inputs_of_a_thousand_times_their_size():
    *_, moments = layer(8, 256)
    size = torch.ones(256)
    size[7] = 1000
    moments = moments * size * size[:, None]
    factor = coupling.low_rank(moments, 256) / size
    wanted = moments / size / size[:, None]
    largest = float(wanted.diagonal().max())
    torch.testing.assert_close(factor.T @ factor, wanted, rtol=0, atol=1e-4 * largest)
