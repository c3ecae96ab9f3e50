"""What is dropped, and that a seed is enough to know it again."""

import pytest
import torch
from conftest import DEVICES

from qlora.ops.lora import Dropout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_its_share_is_dropped_and_the_rest_makes_up_for_it(p, device):
    torch.manual_seed(0)
    x = torch.full((400, 500), 3.0, device=device)
    y = Dropout.drawn(p)(x)
    dropped = y == 0
    # 200,000 draws: a standard deviation of 0.001
    assert abs(dropped.float().mean() - p) < 0.005
    assert torch.allclose(y[~dropped], torch.tensor(3 / (1 - p)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_the_same_again_in_any_shape_and_nothing_else_moves(device):
    dropout = Dropout.drawn(0.5)
    x = torch.randn(6, 5, 4, device=device)
    state = torch.get_rng_state()
    kept = dropout.mask(x)
    assert torch.equal(kept, dropout.mask(x))
    assert torch.equal(kept.view(30, 4), dropout.mask(x.view(30, 4).half()))
    assert not torch.equal(kept, dropout._replace(seed=dropout.seed + 1).mask(x))
    assert torch.equal(state, torch.get_rng_state())
    assert Dropout.drawn(0.5).seed != dropout.seed


def test_torchs_seed_is_what_decides():
    torch.manual_seed(1)
    first = Dropout.drawn(0.5)
    torch.manual_seed(1)
    assert Dropout.drawn(0.5) == first
