"""First values of A and B that are made of a layer's weight, as functions on tensors.

    pissa  scaling B A = the best rank r of W                        arXiv:2404.02948
    olora  B A = the first r of Q and R, W = Q R                     arXiv:2406.01775
    loftq  scaling B A = the best rank r of W - Q, Q the 4-bit base  arXiv:2310.08659

PiSSA and OLoRA take scaling B A out of the weight, and what is quantized is the rest,
W - scaling B A. LoftQ alternates: Q_t = q(W - scaling B_t-1 A_t-1), then B_t, A_t from W - Q_t. Its
first Q is the plain one, so one iteration leaves the base as it is. What it makes up for is the
error of that base: over the weights from before quantization its B A would be one error more.

A matrix of 7B models is 4096 x 11008, and a full SVD of one takes seconds on a GPU. The best rank r
needs none: the eigenvectors of the smaller of W W' and W' W, 4096 x 4096, are the singular vectors
of one side, and the other side is their product with W. Squaring costs digits of the small singular
values alone, and an error in a direction moves that of the approximation by its square: measured on
SmolLM2's matrices the approximation is the full SVD's to 1e-12. `niter` iterates from a random
subspace instead (arXiv:0909.4061), in a fiftieth of the time: of what the best rank 16 takes off
the error, 4 iterations lose up to 5 %, 8 under 1 % and 16 under 0.1 % there.

Left out: CorDA and LoRA-GA, which want the weights' gradients or inputs in fp32 before they are
quantized; PiSSA's own loop over quantizations, which is LoftQ with another start.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora.lora import delta_weight

OVERSAMPLING = 16  # directions beside the wanted ones, which iterate to get those right
Pair = tuple[Tensor, Tensor]


def pissa(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> Pair:
    """A (r, in) and B (out, r) whose scaling B A is the best rank r of `weight` (out, in).

    With W = U S V' these are A = sqrt(S_r / scaling) V_r' and B = U_r sqrt(S_r / scaling).

    Args:
        niter: iterations of a random subspace in place of the exact one.
    """
    left, right = best_rank(weight.float(), r, niter=niter, generator=generator)
    return _share(left, right, scaling)


def olora(weight: Tensor, r: int) -> Pair:
    """A = R_r (r, in) and B = Q_r (out, r) of `weight` = Q R (out, in); any scaling goes with them.

    The first columns of Q are those of the weight's first columns: nothing else is decomposed.
    Q_r R_r is W on r directions, so the rest, W - scaling Q_r R_r, is smallest for a scaling of 1;
    with 2 it is W mirrored, and 4 bits lose no less of it. Paper and PEFT leave that as it is.
    """
    weight = weight.float()
    basis = torch.linalg.qr(weight[:, :r])[0]
    return basis.T @ weight, basis


def loftq(
    weight: Tensor,
    r: int,
    scaling: float,
    quantize: Callable[[Tensor], Tensor],
    *,
    iterations: int = 1,
) -> tuple[Pair, Pair | None]:
    """A and B that make up for the 4-bit base's error, and the A and B taken out of that base.

    PEFT leaves `scaling` out, and so is right only where it is 1.

    Args:
        quantize: what is left of a weight after 4 bits, (out, in) -> (out, in).
        iterations: with 1 nothing is taken out of the base, and the second pair is None.
    """
    weight = weight.float()
    taken, rest = None, weight
    for i in range(iterations):
        left, right = best_rank(weight - quantize(rest), r)
        pair = _share(left, right, scaling)
        if i + 1 < iterations:
            taken, rest = pair, weight - delta_weight(*pair, scaling)
    return pair, taken


def best_rank(
    weight: Tensor, r: int, *, niter: int | None = None, generator: torch.Generator | None = None
) -> Pair:
    """(out, r) and (r, in) whose product is the best approximation of `weight` (out, in), fp32.

    The columns of the first and the rows of the second are orthogonal and of the same length each,
    the square root of a singular value, largest first.
    """
    if weight.shape[0] > weight.shape[1]:
        left, right = best_rank(weight.T, r, niter=niter, generator=generator)
        return right.T, left.T
    if niter is None:
        gram = weight @ weight.T  # (out, out)
        basis = torch.linalg.eigh(gram)[1].flip(1)[:, :r]
    else:
        basis = _subspace(weight, r, niter, generator)
    found = basis.T @ weight  # (r, in)
    root = found.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return basis * root, found / root[:, None]


def _subspace(weight: Tensor, r: int, niter: int, generator: torch.Generator | None) -> Tensor:
    """The first r left singular vectors (out, r) of `weight`, about."""
    draws = min(r + OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], draws, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ start)[0]
    for _ in range(niter):
        basis = torch.linalg.qr(weight @ (weight.T @ basis))[0]
    found = basis.T @ weight  # (draws, in)
    return torch.mm(basis, torch.linalg.eigh(found @ found.T)[1].flip(1)[:, :r])


def _share(left: Tensor, right: Tensor, scaling: float) -> Pair:
    """A and B with scaling B A = left right."""
    return right / scaling**0.5, left / scaling**0.5
