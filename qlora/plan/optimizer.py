"""The memory of an optimizer's state and of its step, counted without a GPU.

Trainer's own choice of optimizer steps twice on all trained parameters, on the meta device, as
qlora.training.optimizers wraps it. Paged state counts as if it were all on the GPU: it moves to
host memory where the GPU has no more.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.config import TrainConfig
from qlora.plan.meta import as_on, empty
from qlora.plan.meter import Meter
from qlora.training.checks import training_arguments
from qlora.training.optimizers import BUNDLE, MasterWeights, keep_updates
from qlora.training.trainer import AdapterTrainer

STATE, STEP, GIVEN = "optimizer state", "optimizer step", "parameters and gradients"
Kind = tuple[torch.dtype, tuple[int, ...]]


class OptimizerBytes(NamedTuple):
    """What an optimizer keeps between steps, and what a step takes above that."""

    state: int
    step: int


def optimizer_bytes(
    config: TrainConfig, parameters: Sequence[Kind], device: str = "cuda"
) -> OptimizerBytes:
    """Of the optimizer that `config` names, for parameters of these dtypes and shapes.

    The state of a parameter depends on its dtype and shape alone. A step with master weights takes
    a bundle at a time, any other all parameters at once, and on a CPU one.
    """
    counts, few = Counter(parameters), _few(parameters)
    meter = Meter(GIVEN)
    with as_on(device), meter:
        trained = {nn.Parameter(empty(shape, dtype)): (dtype, shape) for dtype, shape in few}
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer = _optimizer(config, list(trained), device)
        optimizer.step()
        meter.begin(STEP, STEP)
        optimizer.step()
        (segment,) = meter.segments
    sizes = {kind: _state_of(optimizer, p) for p, kind in reversed(trained.items())}
    step = sum(segment.rise.values())
    is_bundled = isinstance(optimizer, MasterWeights) and torch.bfloat16 in {k[0] for k in few}
    if device == "cuda" and not is_bundled:
        step = step * _numbers(parameters) // max(1, _numbers(few))
    return OptimizerBytes(sum(sizes[kind] * count for kind, count in counts.items()), step)


def _few(parameters: Sequence[Kind]) -> list[Kind]:
    """The first parameters: some bundles, with one of each kind."""
    for end in range(1, len(parameters) + 1):
        few = parameters[:end]
        if _numbers(few) > 2 * BUNDLE and {*few} == {*parameters}:
            return list(few)
    return list(parameters)


def _numbers(parameters: Sequence[Kind]) -> int:
    return sum(math.prod(shape) for _, shape in parameters)


def _state_of(optimizer: Any, parameter: nn.Parameter) -> int:
    """The bytes of a parameter's state, its lower half included; not of tables that all share."""
    held = [t for name, t in optimizer.state[parameter].items() if not name.startswith("qmap")]
    held += [low for low, _ in [getattr(optimizer, "lower", {}).get(parameter, (None, None))]]
    return sum(t.nbytes for t in held if isinstance(t, Tensor) and t.is_meta)


def _optimizer(config: TrainConfig, parameters: list[nn.Parameter], device: str) -> Any:
    arguments = training_arguments(config, fp16=False, on_cpu=True)
    kind, settings = AdapterTrainer.get_optimizer_cls_and_kwargs(arguments)
    if settings.pop("fused", False):
        settings["foreach"] = False  # as a fused step, it allocates next to nothing
    elif kind.__module__.startswith("torch.optim"):
        settings["foreach"] = device == "cuda"  # as torch does by itself
    optimizer: Any = None
    with suppress(TypeError):
        optimizer = kind(parameters, lr=1e-4, **_without_rate(settings))
    if optimizer is None:  # one that has no lists of tensors
        settings.pop("foreach", None)
        optimizer = kind(parameters, lr=1e-4, **_without_rate(settings))
    return keep_updates(optimizer)


def _without_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "lr"}
