"""First values of A and B against the papers' formulas with a full SVD in float64, and PEFT's."""

import peft
import pytest
import reference
import torch
from torch import nn

from qlora.adapters.starts import best_rank, loftq, olora, pissa

R, SCALING = 4, 3.0
SHAPES = [(48, 64), (64, 48), (64, 64)]
# 64 roundings of 6e-8 in a product of values around 1; a direction is off by that times its
# singular value over the gap to the next one, 10 to 30 here
FP32_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def random_weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def truncated(weight, r):
    """The best rank r (Eckart and Young), float64."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :r] * values[:r] @ right[:r]


def round_trip(weight):
    return reference.round_trip(weight, double_quant=True).float()


def of_peft(weight, init, *, lora_alpha=R * SCALING):
    """A, B and the base weight after PEFT's own initialisation."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.load_state_dict({"weight": weight})
    config = peft.LoraConfig(
        r=R, lora_alpha=lora_alpha, target_modules=["0"], init_lora_weights=init
    )
    adapted = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    lora_A, lora_B = (getattr(adapted, f"lora_{s}")["default"].weight.detach() for s in "AB")
    return lora_A, lora_B, adapted.base_layer.weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_is_the_best_rank_r_whatever_the_scaling(shape):
    weight = random_weight(*shape)
    lora_A, lora_B = pissa(weight, R, SCALING)
    assert (lora_A.shape, lora_B.shape) == ((R, shape[1]), (shape[0], R))
    delta = reference.delta(lora_A, lora_B, SCALING)
    torch.testing.assert_close(delta, truncated(weight, R), **FP32_TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_is_peft_s_but_for_the_signs_of_directions(shape):
    weight = random_weight(*shape)
    lora_A, lora_B = pissa(weight, R, SCALING)
    theirs_A, theirs_B, base = of_peft(weight, "pissa")
    signs = (lora_A * theirs_A).sum(1).sign()
    torch.testing.assert_close(lora_A * signs[:, None], theirs_A, **FP32_TOLERANCE)
    torch.testing.assert_close(lora_B * signs, theirs_B, **FP32_TOLERANCE)
    delta = reference.delta(lora_A, lora_B, SCALING)
    torch.testing.assert_close(weight - delta.float(), base, **FP32_TOLERANCE)


def test_pissa_from_a_random_subspace_nears_the_exact_one_and_is_drawn_with_the_generator():
    weight = random_weight(96, 64)

    def error(niter, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pair = pissa(weight, R, SCALING, niter=niter, generator=generator)
        return float((weight.double() - reference.delta(*pair, SCALING)).norm())

    best = float((weight.double() - truncated(weight, R)).norm())
    assert best < error(16) < best * (1 + 1e-4)
    assert error(16) < error(2) < error(0)
    assert error(0, seed=1) != error(0) == error(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_peft_s(shape):
    weight = random_weight(*shape)
    lora_A, lora_B = olora(weight, R)
    theirs_A, theirs_B, base = of_peft(weight, "olora")
    torch.testing.assert_close(lora_A, theirs_A, **FP32_TOLERANCE)
    torch.testing.assert_close(lora_B, theirs_B, **FP32_TOLERANCE)
    delta = reference.delta(lora_A, lora_B, SCALING)
    torch.testing.assert_close(weight - delta.float(), base, **FP32_TOLERANCE)


def loftq_of_the_paper(weight, r, iterations):
    """Algorithm 1 of arXiv:2310.08659, in float64; the product of the factors, and Q."""
    product = torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(iterations):
        codes = round_trip((weight.double() - product).float()).double()
        product = truncated(weight.double() - codes, r)
    return product, codes


@pytest.mark.parametrize("scaling", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_paper_s_whatever_the_scaling(iterations, scaling):
    weight = random_weight(48, 64)
    pair, taken = loftq(weight, R, scaling, round_trip, iterations=iterations)
    product, codes = loftq_of_the_paper(weight, R, iterations)
    # a value that lies between two codes to fp32 may take either: allowed are the steps of a few
    error = float((reference.delta(*pair, scaling) - product).norm() / product.norm())
    assert error < 0.02
    assert (taken is None) == (iterations == 1)
    if taken is not None:
        rest = weight.double() - reference.delta(*taken, scaling)
        own = round_trip(rest.float()).double()
        assert float((own - codes).norm() / codes.norm()) < 0.02
        assert float((weight - own - reference.delta(*pair, scaling)).norm()) < 1.01 * float(
            (weight - codes - product).norm()
        )


def test_loftq_s_error_falls_with_every_iteration_and_pissa_s_is_below_plain_nf4_s():
    weight = random_weight(96, 64) @ torch.diag(torch.linspace(0.2, 3, 64))
    errors = [float((weight - round_trip(weight)).norm())]
    for iterations in range(1, 6):
        pair, taken = loftq(weight, R, SCALING, round_trip, iterations=iterations)
        rest = weight if taken is None else weight - reference.delta(*taken, SCALING).float()
        error = weight - round_trip(rest) - reference.delta(*pair, SCALING)
        errors.append(float(error.norm()))
    assert errors == sorted(errors, reverse=True)
    rest = weight - reference.delta(*pissa(weight, R, SCALING), SCALING).float()
    assert float((rest - round_trip(rest)).norm()) < errors[0]


@pytest.mark.parametrize("r", [1, 48])
def test_the_best_rank_of_a_matrix_that_has_less_is_exact(r):
    weight = random_weight(48, 1) @ random_weight(1, 64, seed=1)
    for matrix in (weight, weight.T, torch.zeros(48, 64)):
        left, right = best_rank(matrix, r)
        assert left.isfinite().all() and right.isfinite().all()
        torch.testing.assert_close(left @ right, matrix, **FP32_TOLERANCE)
