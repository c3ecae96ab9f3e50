"""Parameters that a checkpoint lacks or has in another shape: refused, or initialised in a head."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora.base.checkpoint import Checkpoint, disk_name, disk_names, linear_layers
from qlora.base.modules import heads, is_in
from qlora.config.tasks import Task
from qlora.errors import require, some


def require_on_disk(checkpoint: Checkpoint, model: nn.Module, in_full: Sequence[str] = ()) -> None:
    """Raise, before memory is allocated, if the checkpoint has parameters of a skeleton in another
    shape, or lacks more values than it has; those of the modules `in_full` may be missing."""
    names, records = disk_names(checkpoint, model), checkpoint.records
    shapes = {n: p.shape for n, p in model.named_parameters() if not is_in(n, in_full)}
    places = {name: names.same.get(name) for name in shapes}
    on_disk = {
        name: records[place]["shape"] if place in records else checkpoint.tensors[place].shape
        for name, place in places.items()
        if place
    }
    lacks = [
        name
        for name, shape in on_disk.items()
        if sorted(shape) != sorted(shapes[name])
        or (places[name] not in records and shape != shapes[name])  # a Conv1D's is (out, in)
    ]
    missing = [n for n, place in places.items() if place is None and n not in names.converted]
    size = sum(math.prod(header.shape) for header in checkpoint.tensors.values())
    if sum(shapes[name].numel() for name in missing) > size:
        lacks += missing
    _refuse(checkpoint, lacks)


def _refuse(checkpoint: Checkpoint, lacks: Sequence[str]) -> None:
    fault = f"lacks {len(lacks)} tensors of its model, or has them in another shape"
    message = f"{checkpoint.folder} {fault}: {some(lacks)}. Download or copy it again"
    require(not lacks, message)


def classifier_modules(checkpoint: Checkpoint, model: nn.Module, task: Task) -> list[str]:
    """A classifier's head, and its pooler if the checkpoint has none; both are trained in full."""
    if not task.trains_head:
        return []
    pooler = f"{getattr(model, 'base_model_prefix', '')}.pooler"
    layers = [name for name in linear_layers(model) if is_in(name, [pooler])]
    lacks = any(disk_name(checkpoint, model, f"{name}.weight") is None for name in layers)
    return [*heads(model), *([pooler] if lacks else [])]


def initialise_missing(
    model: Any, empty: nn.Module, checkpoint: Checkpoint, info: Any, modules: list[str], seed: int
) -> None:
    """Initialise parameters of `modules` that the checkpoint lacks; raise if it lacks any other.

    Matrices are normal with the model's initializer_range, norm weights 1, biases 0; drawn on the
    CPU, so that a seed gives the same values on every device. `empty` is the skeleton of `model`.
    """
    shapes = {n: p.shape for n, p in empty.named_parameters() if is_in(n, modules)}
    missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    # transformers 5.17 reports no mismatch if some of the model is quantized
    missing |= {n for n, shape in shapes.items() if model.get_parameter(n).shape != shape}
    _refuse(checkpoint, sorted(name for name in missing if not is_in(name, modules)))
    if missing:
        new = sorted({module for module in modules for name in missing if is_in(name, [module])})
        print(f"The checkpoint has no {', '.join(new)} of this shape: initialised with seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", None) or 0.02
    for name in sorted(missing):
        values = torch.zeros(shapes[name])
        if values.ndim > 1:
            values.normal_(std=std, generator=generator)
        elif name.endswith("weight"):  # of a norm
            values.fill_(1)
        parameter = model.get_parameter(name)
        parameter.data = values.to(parameter)
