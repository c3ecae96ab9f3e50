"""What a base in shards (qlora.base.sharding) takes from the plan of a whole one, and adds.

Each GPU holds its part of every matrix; of the decoder layers none with `offload_base`, whose
shards are in host memory. Added is what is gathered: the embedding and the head for the whole step,
and three decoder layers at a time, the one that computes and the next one twice: as it arrives,
the shards of all GPUs one after another, and in its place.
"""

from collections.abc import Iterable

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.config import TrainConfig
from qlora.plan.meter import Segment
from qlora.plan.step import EMBEDDING, HEAD, LINEAR, Sample, layer_list
from qlora.training import ranks

GATHERED = "gathered shards"
LAYERS = 3
AFTER = ("all-reduce", "optimizer step")  # segments in which nothing is gathered


def gpus_of(config: TrainConfig) -> int:
    """The GPUs of a plan, or of the run that is planned."""
    return config.gpus or ranks.count()


def shard(segments: list[Segment], sample: Sample, gpus: int, *, offload: bool) -> tuple[int, int]:
    """Change the segments of a whole base to those of its shards, in place.

    Returns the bytes gathered in a forward and backward pass, and those of the shards of the
    decoder layers of one GPU.
    """
    layers = _layers(sample)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = sum(p.nbytes for p in _matrices(sample.model) if id(p) not in inside)
    sizes = [sum(p.nbytes for p in _matrices(layer)) for layer in layers]
    own = sum(sizes) // gpus
    for segment in segments:
        for held in (segment.start, segment.peak, segment.end):
            held[LINEAR] -= sum(sizes) - (0 if offload else own)
            for kind in (EMBEDDING, HEAD):
                held[kind] = held[kind] // gpus
            if segment.name not in AFTER:
                held[GATHERED] += rest + LAYERS * max(sizes)
    return rest + 2 * sum(sizes), own


def _layers(sample: Sample) -> list[nn.Module]:
    """The decoder layers of the whole model, of which one may stand for many."""
    if sample.stands_in:
        few = list(layer_list(sample.model) or ())
        return [few[i] for i in sample.stands_in]
    return [m for m in sample.model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _matrices(module: nn.Module) -> Iterable[nn.Parameter]:
    """The frozen ones: what is sharded."""
    return (p for p in module.parameters() if p.ndim > 1 and not p.requires_grad)
