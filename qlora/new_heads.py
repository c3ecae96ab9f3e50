"""A classifier's head where the checkpoint has none, or one of other labels: made with a seed.

A pretrained checkpoint ends in another task's head, or in none. transformers fills the gap with
random values and goes on; here that is allowed for the head alone (and a pooler that the
checkpoint lacks), the values come from a seed, and whatever else is missing is an error.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from qlora.checkpoint import Checkpoint, disk_name, linear_layers
from qlora.errors import UserError
from qlora.tasks import heads, is_in, task_named


def heads_to_train(checkpoint: Checkpoint, model: nn.Module, task: str) -> list[str]:
    """The modules that a classifier trains in full: its head, and a pooler that was never trained,
    as the checkpoint lacks it."""
    if not task_named(task).trains_head:
        return []
    pooler = f"{getattr(model, 'base_model_prefix', '')}.pooler"
    below = [name for name in linear_layers(model) if is_in(name, [pooler])]
    lacks = any(disk_name(checkpoint, model, f"{name}.weight") is None for name in below)
    return [*heads(model), *([pooler] if lacks else [])]


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block transformers logs errors alone."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def complete(
    model: nn.Module,
    plan: nn.Module,
    checkpoint: Checkpoint,
    info: Mapping[str, Any],
    new: Iterable[str],
    seed: int,
) -> None:
    """Make what the checkpoint lacks of the modules `new`; refuse it where it lacks more, as
    transformers would make up random tensors."""
    misshapen = {name for name, *_ in info["mismatched_keys"]}
    # transformers 5.17 takes any shape where something is quantized
    shapes = {n: p.shape for n, p in plan.named_parameters() if is_in(n, new)}
    misshapen |= {n for n, shape in shapes.items() if model.get_parameter(n).shape != shape}
    missing = sorted({*info["missing_keys"], *misshapen})
    lacks = [name for name in missing if not is_in(name, new)]
    if lacks:
        raise UserError(
            f"{checkpoint.folder} lacks {len(lacks)} tensors of its model, or has them in "
            f"another shape: {', '.join(lacks[:4])}{', …' if len(lacks) > 4 else ''}. "
            "Download or copy it again"
        )
    if missing:
        made = sorted({head for head in new for name in missing if is_in(name, [head])})
        print(f"The checkpoint has no {', '.join(made)} of this shape: made anew, seed {seed}")
        _initialise(model, {name: shapes[name] for name in missing}, seed)


def _initialise(model: nn.Module, shapes: Mapping[str, torch.Size], seed: int) -> None:
    """New values for parameters: matrices normal with the model's initializer_range, the rest as in
    a new model. Drawn on the CPU, so a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = getattr(model, "config", None)
    std = getattr(config, "initializer_range", None) or 0.02
    for name, shape in shapes.items():
        values = torch.zeros(shape)
        if values.ndim > 1:
            values.normal_(std=std, generator=generator)
        elif name.endswith("weight"):  # of a norm
            values.fill_(1)
        parameter = model.get_parameter(name)
        parameter.data = values.to(parameter)
