"""Grids against gguf's own bytes; the search on each of them."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.merge import codes, grids
from qlora.merge.ggml import PACKERS, to_bytes
from qlora.merge.grids import IntegerGrid
from qlora.merge.moments import Moments

GRIDS = [*PACKERS, grids.Int4, grids.Int4ZeroPoint]
by_name = pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.__name__)


def layer(out: int = 64, wide: int = 512, ratio: float = 0.02) -> tuple[Tensor, ...]:
    """base, delta (out, in), A, B and moments of inputs as uneven as a model's are."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(out, wide, generator=draw)
    base[:, :3] *= 8  # outliers
    lora_A, lora_B = (torch.randn(s, generator=draw) for s in ((4, wide), (out, 4)))
    lora_B *= ratio * float(base.norm() / (lora_B @ lora_A).norm())
    rotation = torch.linalg.qr(torch.randn(wide, wide, generator=draw)).Q
    x = torch.randn(2000, wide, generator=draw) * torch.logspace(0, -2.5, wide) @ rotation
    return base, lora_B @ lora_A, lora_A, lora_B, x.T @ x


@pytest.mark.parametrize("kind", PACKERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("searched", [False, True], ids=["to nearest", "searched"])
def test_gguf_reads_the_bytes_as_the_same_values(kind, searched):
    base, delta, *_, moments = layer()
    target = base + delta
    target[5] = 0  # blocks of zeros
    grid = kind(target.T.contiguous())
    if searched:
        codes.keep_outputs(grid, target, Moments(moments))
    number = gguf.GGMLQuantizationType[kind.__name__]
    read = gguf.dequantize(to_bytes(grid).numpy(), number)
    np.testing.assert_array_equal(read, grid.weight.T.numpy())
    if not searched and kind.__name__[-1] != "K":  # for which gguf has no quantize
        assert (gguf.quantize(target.numpy(), number) == to_bytes(grid).numpy()).mean() > 0.98
    error = float((kind(target.T.contiguous()).weight.T - target).norm() / target.norm())
    assert error < {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_0": 0.06}.get(kind.__name__, 0.15)


@by_name
def test_the_nearest_values_are_computed_in_parts(kind: type[IntegerGrid]):
    base, delta, lora_A, lora_B, _ = layer(out=4100)  # 2 million values, in three parts
    adapted = codes.AdaptedWeight(base, Factors(lora_A, lora_B, 1.0))
    found, facts = codes.fold_to_grid(adapted, kind, None)
    whole = kind((base + delta).T.contiguous())
    torch.testing.assert_close(found.weight, whole.weight, rtol=0, atol=1e-3 * base.std())
    assert torch.equal(found.level_indices(), whole.level_indices())
    change = found.weight.T - base
    assert facts["weight_norm"] == pytest.approx(float(base.double().norm()), rel=1e-4)
    assert facts["kept"] == pytest.approx(
        float((change * delta).sum() / delta.square().sum()), rel=1e-3
    )


@by_name
def test_the_search_keeps_the_adapter_on_every_grid(kind: type[IntegerGrid]):
    base, delta, lora_A, lora_B, moments = layer()
    target = base + delta

    def lost(grid: IntegerGrid) -> float:
        """Of the adapter's change in the outputs, along its own directions."""
        error = grid.weight.T - target
        return float(
            (lora_B.T @ error @ moments @ lora_A.T).norm()
            / (lora_B.T @ delta @ moments @ lora_A.T).norm()
        )

    def noise(grid: IntegerGrid) -> float:
        error = grid.weight.T - target
        return float((error @ moments * error).sum())

    start, grid = kind(target.T.contiguous()), kind(target.T.contiguous())
    codes.keep_outputs(grid, target, Moments(moments))
    assert lost(grid) < lost(start) / 3 and noise(grid) < noise(start) / 6
    for block in range(len(grid.scale)):  # what is there can be stored
        shift = None if grid.shift is None else grid.shift[block]
        scale, low = grid.nearest(block, grid.scale[block], shift)
        torch.testing.assert_close(scale, grid.scale[block], rtol=1e-6, atol=0)
        if shift is not None:
            torch.testing.assert_close(low, shift, rtol=1e-6, atol=1e-9)
