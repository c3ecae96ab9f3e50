"""Dropout that keeps no mask: of one, the seed alone, from which it is made again.

Each number of x is zero with probability p, and else x / (1 - p) (arXiv:1207.0580). LoRA drops on
its way to A, in each layer for itself. The masks of a layer's seven projections, a byte a number,
would be as much as three and a half inputs in 16 bits, all of which there is but one of.

Seeds come from torch's generator on the CPU: gradient checkpointing puts that one's state back, so
that a layer computed again drops the same, and no GPU is waited for.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """One draw of it."""

    p: float
    """the share that is dropped, at least 0 and below 1"""
    seed: int

    @classmethod
    def drawn(cls, p: float) -> "Dropout":
        return cls(p, int(torch.randint(2**62, ())))

    @property
    def gain(self) -> float:
        """What the numbers that are kept are multiplied with."""
        return 1 / (1 - self.p)

    def kept(self, x: Tensor, part: int = 0) -> Tensor:
        """Which numbers of x are kept, bool in x's shape; another draw for each part of an x."""
        generator = torch.Generator(x.device).manual_seed(self.seed + part)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(1 - self.p, generator=generator)

    def __call__(self, x: Tensor) -> Tensor:
        """x with the rest dropped."""
        return x * self.kept(x) * self.gain
