"""EVA: A is the main directions of a layer's inputs on the training data (arXiv:2410.07170).

    A = the first r eigenvectors of the covariance of x, B = 0

so that the model begins as its base, and the first steps of B see as much of the inputs as any A of
that rank lets through. Directions are chosen for all layers together: of as many as r gives them in
sum, the ones that explain the largest shares of their layer's variance. A layer gets up to rho * r,
or none, and then no adapter; its scaling stays.

The covariance is gathered whole (qlora.moments), where PEFT updates a truncated SVD batch by batch:
(in, in) a layer in place of (r, in), and exact whatever the order of the data. All tokens count,
prompt and answer (PEFT's use_label_mask=False). A few iterations from a random subspace find the
directions, as the values fall fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config import LoraConfig
from qlora.errors import UserError
from qlora.initialise import best_rank
from qlora.moments import Moments, SecondMoments

NITER = 8


@torch.no_grad()
def eva_start(
    model: Any,
    config: LoraConfig,
    layers: Mapping[str, LoraConfig],
    data: Sequence[Any] | None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """`config` with the rank of each of `layers`, and A (rank, in) of those that get one.

    Args:
        layers: what each would get if the ranks were not shared out.
        data: batches of input_ids and attention_mask, (rows, length) each.

    Raises:
        UserError: there is no data, or a layer sees too little of it.
    """
    if not data:
        raise UserError(
            "init_lora_weights='eva' looks at what the layers read: give apply_lora `data`, "
            "batches of input_ids and attention_mask"
        )
    modules = {name: model.get_submodule(name) for name in layers}
    was_training = model.training
    try:
        found = _directions(model, layers, modules, data)
    finally:
        model.train(was_training)
    shares = {name: share for name, (_, share) in found.items()}
    ranks = share_out(shares, sum(own.r for own in layers.values()))
    chosen = {name: found[name][0][:rank] for name, rank in ranks.items() if rank}
    config = config.with_ranks_of({name: len(lora_A) for name, lora_A in chosen.items()})
    if len(chosen) < len(layers):
        config = replace(config, target_modules=tuple(chosen))
    return config, chosen


def _directions(
    model: Any,
    layers: Mapping[str, LoraConfig],
    modules: Mapping[str, nn.Module],
    data: Sequence[Any],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer up to rho * r directions, on the CPU, and their shares of variance."""
    moments = SecondMoments(model, data, modules)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    idle: list[str] = []
    last: Moments | None = None
    directions = shares = torch.empty(0)
    for name, own in layers.items():
        seen = moments.all_of(name)
        most = min(round(own.r * own.rho), len(seen.first))
        if seen.tokens <= own.r:
            idle.append(name)
            continue
        if seen is not last or len(shares) < most:  # q, k and v read one input
            directions, shares = (t.cpu() for t in main_directions(seen.covariance(), most))
            last = seen
        found[name] = directions[:most], shares[:most]
    if idle:
        raise UserError(
            f"{', '.join(idle)} read too little of EVA's data, no more than r tokens: give more of "
            "it, or name these layers in exclude_modules"
        )
    return found


def main_directions(covariance: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r eigenvectors (r, in) of `covariance` (in, in), and each one's share of variance.

    Orthonormal, fp32; the shares are (r,).
    """
    generator = torch.Generator().manual_seed(0)
    _, roots = best_rank(covariance, r, niter=NITER, generator=generator)  # sqrt(value) * vector
    lengths = roots.norm(dim=1)
    tiny = torch.finfo(torch.float32).tiny
    shares = lengths**2 / covariance.diagonal().sum().clamp_min(tiny)
    return roots / lengths.clamp_min(tiny)[:, None], shares


def share_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each layer's directions are kept, if the `budget` largest of all of them are.

    Args:
        shares: of each layer, those of as many directions as it may have, largest first.
    """
    layers = [name for name, share in shares.items() for _ in range(len(share))]
    order = torch.cat([*shares.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for i in order[:budget].tolist():
        ranks[layers[i]] += 1
    return ranks
