"""How long a training step takes on a GPU, by arithmetic. No GPU has checked it.

The operators of the counted step (qlora.plan.step) are added up as `Work`, and a card's data sheet
gives the time:

    products    FLOPs / (tensor cores' rate * SHARE_OF_RATE): 2 a weight and token forward, as many
                for the gradient of the input, and recomputation
    attention   the same, of FlashAttention: half of the scores are masked, backward 2.5 times
    the rest    bytes read and written / (bandwidth * SHARE_OF_BANDWIDTH): decoding of weights,
                elementwise operators, products with few FLOPs a byte such as the adapters', the
                optimizer
    host        copies over PCIe that the computation cannot hide; and no step is shorter than the
                launches of its kernels
    shards      of a sharded base, over PCIe as well, as far as the computation does not hide them

The shares are assumed. Against the arithmetic of the step of Llama-2-7B in tests/plan/test_time.py
it is within a quarter; a ratio of two steps is better than either. Not counted: waits for the data,
synchronizations, experts that get no token, and `--compute-dtype fp32`, whose products are slower.
"""

import re
from typing import NamedTuple

import torch

from qlora.config import TrainConfig
from qlora.plan.estimate import Plan, budget
from qlora.plan.optimizer import STATE
from qlora.plan.step import ADAPTERS
from qlora.plan.work import ATTENTION, DECODED, LAUNCHES, LOOKED_UP, PRODUCTS, TRAFFIC, Work

SHARE_OF_RATE = 0.9  # that large products reach
SHARE_OF_LARGE_RATE, LARGE_RATE = 0.63, 250e12  # of cards whose power limits it, such as an H100
SHARE_OF_ATTENTION = 0.5
SHARE_OF_BANDWIDTH = 0.8
PCIE = 25e9  # bytes/s of PCIe 4.0 with 16 lanes
LAUNCH = 10e-6  # seconds of the host for a kernel


class Card(NamedTuple):
    """A GPU, by its data sheet."""

    name: str
    gib: int
    rate: float
    """dense FLOP/s of 16-bit products summed in fp32"""
    bandwidth: float
    """bytes/s"""

    @property
    def products(self) -> float:
        """FLOP/s that large products reach."""
        return self.rate * (SHARE_OF_LARGE_RATE if self.rate > LARGE_RATE else SHARE_OF_RATE)


# memory in GiB, TFLOP/s, GB/s
SHEETS: dict[str, tuple[int, float, float]] = {
    "T4": (16, 65, 320), "V100": (16, 125, 900), "RTX 2080 Ti": (11, 54, 616),
    "RTX 3060": (12, 25, 360), "RTX 3070": (8, 41, 448), "RTX 3080": (10, 60, 760),
    "RTX 3090": (24, 71, 936), "RTX 4060": (8, 30, 272), "RTX 4060 Ti": (16, 44, 288),
    "RTX 4070": (12, 58, 504), "RTX 4070 Ti": (12, 80, 504), "RTX 4080": (16, 97, 717),
    "RTX 4090": (24, 165, 1008), "RTX 5070": (12, 62, 672), "RTX 5080": (16, 113, 960),
    "RTX 5090": (32, 210, 1792), "A10": (24, 125, 600), "L4": (24, 121, 300),
    "A6000": (48, 155, 768), "A40": (48, 150, 696), "L40S": (48, 362, 864),
    "RTX 6000 Ada": (48, 364, 960), "A100": (80, 312, 1935), "H100": (80, 989, 3350),
    "H200": (141, 989, 4800),
}  # fmt: skip
CARDS = {name: Card(name, gib, rate * 1e12, bandwidth * 1e9)
         for name, (gib, rate, bandwidth) in SHEETS.items()}  # fmt: skip
TYPICAL = ("RTX 4060", "RTX 3060", "RTX 4060 Ti", "RTX 3090", "RTX 5090", "A6000", "A100", "H200")
"""one of each size of memory"""


def card_named(name: str) -> Card | None:
    """The card of a name such as torch.cuda.get_device_name gives; None for an unknown one."""
    known = [own for own in CARDS if re.search(rf"\b{own}\b", name)]
    return CARDS[max(known, key=len)] if known else None


def card_of_size(memory: int) -> Card:
    """A typical card with so many bytes."""
    large = (name for name in TYPICAL if CARDS[name].gib << 30 >= memory)
    return CARDS[next(large, TYPICAL[-1])]


def card_of(config: TrainConfig) -> Card | None:
    """The card that is there, or a typical one of the size of `gpu_memory`; None without either."""
    memory = budget(config)
    if memory is None:
        return None
    name = torch.cuda.get_device_name() if config.gpu_memory is None else ""
    return card_named(name) or card_of_size(memory)


def step_seconds(plan: Plan, card: Card) -> float:
    """Of an optimizer's step with all its micro-batches."""
    bandwidth = card.bandwidth * SHARE_OF_BANDWIDTH
    moved = 2 * plan.parts[STATE] + 3 * plan.parts[ADAPTERS]  # and the gradients
    passes = plan.config.gradient_accumulation_steps
    return passes * _micro_batch(plan, card) + moved / bandwidth


def _micro_batch(plan: Plan, card: Card) -> float:
    """Of a micro-batch's forward and backward pass."""
    work, forward = Work(), Work()
    for segment in plan.segments:
        work.update(segment.work)
        if segment.name.startswith("forward"):
            forward.update(segment.work)
    seconds = max(_computing(work, card), LAUNCH * work[LAUNCHES])
    if plan.config.offload_embedding:
        seconds += work[LOOKED_UP] / PCIE
    if copied := plan.host.get("offloaded activations", 0) / PCIE:
        ahead = _computing(forward, card)
        seconds += max(0, copied - ahead) + max(0, copied - (seconds - ahead))
    if plan.shards is not None:  # in each of both passes
        moved = (plan.shards.copied_bytes + plan.shards.sent_bytes) / 2 / PCIE
        ahead = _computing(forward, card)
        seconds += max(0, moved - ahead) + max(0, moved - (seconds - ahead))
    return seconds


def _computing(work: Work, card: Card) -> float:
    moved = sum(work[kind] for kind in (TRAFFIC, DECODED, LOOKED_UP))
    seconds = work[PRODUCTS] / card.products
    seconds += work[ATTENTION] / (card.rate * SHARE_OF_ATTENTION)
    return seconds + moved / (card.bandwidth * SHARE_OF_BANDWIDTH)
