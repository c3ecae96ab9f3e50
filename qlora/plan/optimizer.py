"""The memory of an optimizer's state and of its step, counted without a GPU.

Trainer's own choice of optimizer steps twice on all trained parameters, on the meta device, as
qlora.training.optimizers wraps it. Paged state counts as if it were all on the GPU: it moves to
host memory where the GPU has no more.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from qlora.config import TrainConfig
from qlora.plan.meta import as_on_gpu, empty
from qlora.plan.meter import Meter
from qlora.training.optimizers import keep_updates
from qlora.training.trainer import AdapterTrainer, training_arguments

STATE, STEP, GIVEN = "optimizer state", "optimizer step", "parameters and gradients"
Kind = tuple[torch.dtype, tuple[int, ...]]


class OptimizerBytes(NamedTuple):
    """What an optimizer keeps between steps, and what a step takes above that."""

    state: int
    step: int


def optimizer_bytes(config: TrainConfig, parameters: Iterable[Kind]) -> OptimizerBytes:
    """Of the optimizer that `config` names, for parameters of these dtypes and shapes."""
    meter = Meter(GIVEN)
    with as_on_gpu(), meter:
        trained = [nn.Parameter(empty(shape, dtype)) for dtype, shape in parameters]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer = _optimizer(config, trained)
        given = sum(meter.now.values())
        meter.kind = STATE
        optimizer.step()
        state = sum(meter.now.values()) - given
        meter.begin(STEP, STEP)
        optimizer.step()
        (segment,) = meter.segments
    return OptimizerBytes(state, sum(segment.rise.values()))


def _optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> Any:
    arguments = training_arguments(config, fp16=False, on_cpu=True)
    kind, settings = AdapterTrainer.get_optimizer_cls_and_kwargs(arguments)
    if settings.pop("fused", False):
        settings["foreach"] = False  # as a fused step, it allocates next to nothing
    elif kind.__module__.startswith("torch.optim"):
        settings["foreach"] = True  # as on a GPU
    optimizer: Any = None
    with suppress(TypeError):
        optimizer = kind(parameters, lr=1e-4, **_without_rate(settings))
    if optimizer is None:  # one that has no lists of tensors
        settings.pop("foreach", None)
        optimizer = kind(parameters, lr=1e-4, **_without_rate(settings))
    return keep_updates(optimizer)


def _without_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "lr"}
