"""Rows of a weight in groups: each makes up for the errors of those before it.

The cost of an error E in a weight is tr(G E H E') (qlora.merge.moments). The columns of E are
coupled by H, which qlora.merge.rounding takes account of, and its rows by G, the moments of the
gradients in the layer's outputs. Where rows D are chosen, the cost of what is left, R, is least
around

    W_R - inverse(G_RR) G_RD E_D

which becomes the target of the next group. The rows with the largest gradients come first, since
all that follow can make up for them. (YAQA, arXiv:2505.22988, couples rows one by one.) Four groups
lower the KL divergence of a merge to Q4_0 of SmolLM2-135M, E2E, by a fifth; eight gain no more.

G is used as V'V + diagonal, of few rows V, so that a group costs rank * (rows + in) * in.
"""

import torch
from torch import Tensor

from qlora.merge.grids import TINY

GROUPS = 4
LOOSE = 0.3  # of the mean energy of an output, added to all; from 0.05 to 1 there is little in it
RANK = 256  # of G, of which 128 are as good for 1,536 outputs
ITERATIONS = 2  # of the search for principal directions


class RowGroups:
    """The rows of a weight in groups, in their order, and what each owes to those before it."""

    def __init__(self, outputs: Tensor, width: int) -> None:
        """`outputs`: G (out, out), fp32; `width`: of a row."""
        energy = outputs.diagonal()
        self.factor = low_rank(outputs, RANK)  # (k, out)
        rest = (energy - self.factor.square().sum(0)).clamp_min(0)
        self.rest = rest + (LOOSE * energy.mean()).clamp_min(TINY)
        self.groups = energy.argsort(descending=True, stable=True).chunk(GROUPS)
        self.response = self.factor.new_zeros(len(self.factor), width)  # of V to the errors so far

    def owed(self, number: int) -> Tensor:
        """What to add to the target of a group, (rows, in)."""
        left, own = torch.cat(self.groups[number:]), self.groups[number]
        scaled = self.factor[:, left] / self.rest[left].sqrt()
        # inverse(V'V + rest) V' = 1 / rest V' inverse(1 + V 1 / rest V')
        inner = (scaled @ scaled.T).add_(torch.eye(len(scaled), device=scaled.device))
        solved = torch.cholesky_solve(self.response, torch.linalg.cholesky(inner))  # (k, in)
        return -(self.factor[:, own] / self.rest[own]).T @ solved

    def add(self, number: int, error: Tensor) -> None:
        """Take account of the error (rows, in) of a group."""
        self.response += self.factor[:, self.groups[number]] @ error


def low_rank(moments: Tensor, rank: int) -> Tensor:
    """(rank, n), at most n rows, whose transpose times itself approximates `moments` (n, n).

    These are scaled to equal diagonals first: a few of them may be 1,000 times as large as the
    others, whose eigenvalues fp32 would lose.
    """
    size = moments.diagonal().clamp_min(TINY).sqrt()
    values, vectors = principal(moments / size / size[:, None], rank)
    return values.sqrt()[:, None] * vectors * size


def principal(moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first eigenvalues of `moments` (n, n), roughly, and their eigenvectors, as rows, by
    subspace iteration; the first one first."""
    shape = (len(moments), min(count, len(moments)))
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(moments)
    for _ in range(ITERATIONS):
        vectors = torch.linalg.qr(moments @ vectors).Q  # (n, n) @ (n, count)
    values, turn = torch.linalg.eigh(vectors.T @ moments @ vectors)  # (count, count)
    return values.clamp_min(0).flip(0), (vectors @ turn).T.flip(0)
