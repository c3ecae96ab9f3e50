"""Several adapters read as one: for a merge, the weighted sum of their changes, exactly."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qlora.adapter_reader import AdapterFile
from qlora.errors import UserError
from qlora.lora import Factors


def combine(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> AdapterFile:
    """One adapter whose change is the weighted sum of theirs: sum of w * scaling * B A, exactly.

    A's are stacked and B's stand side by side, so the ranks add up.

    Raises:
        UserError: they were trained on different bases, or hold more than A and B.
    """
    first = adapters[0]
    if len(adapters) == 1 and tuple(weights) == (1.0,):
        return first
    for adapter in adapters:
        more = [what for what in adapter.extras if what != "embeddings"]
        if more:
            raise UserError(
                f"{adapter.folder} holds {' and '.join(more)}, of which no weighted sum is made: "
                "merge it alone, without a weight"
            )
        if adapter.taken and len(adapters) > 1:
            raise UserError(
                f"{adapter.folder} was trained over a base that was changed for it (PiSSA, OLoRA "
                "or LoftQ): merge it alone"
            )
        if (adapter.base, adapter.fan_in_fan_out) != (first.base, first.fan_in_fan_out):
            raise UserError(
                f"{adapter.folder} and {first.folder} were trained on different bases, or on one "
                "that was quantized differently: they cannot be merged together"
            )
    pairs = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        found = [
            (weight * factors.scaling, factors)
            for adapter, weight in zip(adapters, weights, strict=True)
            if (factors := adapter.pairs.get(name))
        ]
        shapes = {(f.lora_B.shape[0], f.lora_A.shape[1]) for _, f in found}
        if len(shapes) > 1:
            raise UserError(f"{name} has the shapes {shapes} in these adapters: they do not fit")
        pairs[name] = Factors(
            torch.cat([factors.lora_A.float() for _, factors in found]),
            torch.cat([scaling * factors.lora_B.float() for scaling, factors in found], dim=1),
            1.0,
        )
    embeddings = frozenset().union(*(adapter.embeddings for adapter in adapters))
    return replace(first, pairs=pairs, embeddings=embeddings, tensors={})
