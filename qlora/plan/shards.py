"""The plan of a rank that holds a shard of the frozen base, by torch's `fully_shard` (FSDP2).

Of N ranks each has 1 / N of every frozen matrix: 4-bit codes, embedding, head, 16-bit layers. Whole
are adapters, quantization constants, and vectors such as norms and biases. Gathered at a time:

    embedding, head      from the first layer on to the end of the backward pass; until the first
                         layer is there also the buffer in which they came
    layer i              its weights, and two buffers: the one in which they came, and that of the
                         layer before or after. In the backward pass one is empty, but its memory
                         belongs to the stream of the transfers

Each micro-batch gathers the layers twice, forward and backward, and the rest once. With the shards
of the layers in host memory, each is on the GPU while it is copied into the buffer, and the host
has it in pinned memory, which torch allocates in powers of two.

Left out: what a collective itself allocates, as NCCL does.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.plan.meter import Bytes, Segment, difference

GATHERED = "gathered weights"


@dataclass(frozen=True)
class Matrix:
    """A frozen matrix that is sharded."""

    kind: str
    size: int
    """bytes"""
    layer: int | None
    """the index of its decoder layer, of those that were counted"""
    is_grouped: bool
    """whether it is in a layer, of this list or another such as an encoder's, not in the rest"""


def grouped_modules(model: nn.Module) -> set[nn.Module]:
    """The modules whose weights are gathered with a layer's."""
    layers = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    return {module for layer in layers for module in layer.modules()}


class Shards:
    """The sizes of a sharded base: `matrices` of the layers that were counted, of which `stands_in`
    has one for each layer of the model."""

    def __init__(
        self, matrices: Sequence[Matrix], stands_in: Sequence[int], *, gpus: int, offload: bool
    ) -> None:
        self.gpus, self.offload = gpus, offload
        own = [[m for m in matrices if m.layer == i] for i in stands_in]
        rest = [m for m in matrices if m.layer is None]
        inner, root = ([m for m in rest if m.is_grouped is there] for there in (True, False))
        self.layers = [sum(m.size for m in layer) for layer in own]
        self.inner, self.root = (sum(m.size for m in part) for part in (inner, root))
        self.in_layers = [m for layer in (*own, inner) for m in layer]
        self.in_root = root

    @property
    def gathered_bytes(self) -> int:
        """The bytes of the weights, not of shards, that a micro-batch gathers."""
        return 2 * (sum(self.layers) + self.inner) + self.root

    @property
    def sent_bytes(self) -> int:
        """What each GPU sends for a micro-batch: a ring passes on every shard but one."""
        return (self.gpus - 1) * self.gathered_bytes // self.gpus

    @property
    def copied_bytes(self) -> int:
        """What a micro-batch copies from host memory."""
        return 2 * (sum(self.layers) + self.inner) // self.gpus * self.offload

    @property
    def host_bytes(self) -> int:
        """The pinned memory of a rank."""
        shards = [-(-m.size // self.gpus) for m in self.in_layers]
        return sum(1 << (size - 1).bit_length() for size in shards) * self.offload

    def _elsewhere(self) -> Bytes:
        """By kind, the bytes of the whole base that this GPU does not hold between the passes."""
        away: Bytes = Counter()
        for m in (*self.in_layers, *self.in_root):
            stays = not (self.offload and m.is_grouped)
            away[m.kind] += m.size - stays * -(-m.size // self.gpus)
        return away

    def _of_layer(self, i: int, before: int) -> int:
        """At the peak of layer `i`: its weights, and two buffers."""
        other = self.layers[before] if 0 <= before < len(self.layers) else 0
        largest = max(self.layers[i], other)
        return self.layers[i] + 2 * largest + self._copy(largest)

    def _copy(self, size: int) -> int:
        return -(-size // self.gpus) * self.offload

    def applied(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments of a step, of a base that was counted whole, with shards."""
        away, made, now = self._elsewhere(), list[Segment](), 0
        last = max((i for i, s in enumerate(segments) if "backward" in s.name), default=-1)
        forward, backward = 0, len(self.layers)
        largest = max(self.layers, default=0)
        for place, segment in enumerate(segments):
            word, _, index = segment.name.partition(" ")
            if index.isdigit() and word == "forward":
                first = (forward == 0) * (self.root + self.layers[0])  # the buffer of the rest
                peak = max(self._of_layer(forward, forward - 1), first)
                forward += 1
            elif index.isdigit():
                backward -= 1
                peak = self._of_layer(backward, backward - 1)
            else:  # buffers alone, or the layers of an encoder
                peak = max(self.root * (place == 0), 2 * largest, 2 * self.inner)
                peak += self._copy(max(largest, self.inner))
            if place == last:
                peak = max(peak, 2 * self.inner)  # the encoder's backward pass, too
            peak = peak + self.root if place <= last else 0
            end = self.root if place < last else 0
            at: Any = [(segment.start, now), (segment.peak, peak), (segment.end, end)]
            start, peak_of, end_of = (
                difference(held, away) + Counter({GATHERED: n}) for held, n in at
            )
            made.append(Segment(segment.name, start, peak_of, end_of, segment.work))
            now = end
        return made
