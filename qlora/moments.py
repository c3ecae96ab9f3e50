"""Second moments of layers' inputs, from a run of the model over data.

For each layer the sum of x x' over its input tokens, (in, in), and what centres it. For all layers
of a 7B model together these are 22 GB, so they are gathered for a group of layers at a time, as
many as `room` has space for, with one run for each group. Layers that read one input share them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qlora.adapter_module import plain
from qlora.frozen import matrix_shape

MAX_BYTES = 4 << 30


class Moments(NamedTuple):
    """Of one layer's inputs, on the model's device, fp32."""

    second: Tensor
    """the sum of x x' (in, in)"""
    first: Tensor
    """the sum of x (in,)"""
    tokens: Tensor
    """how many there were ()"""

    def covariance(self) -> Tensor:
        """The sum of (x - mean) (x - mean)', (in, in)."""
        return torch.addr(self.second, self.first, self.first / self.tokens.clamp_min(1), alpha=-1)


class SecondMoments:
    """The moments of the inputs of some layers. Ask in the model's order: it is cheap."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Any],
        layers: Mapping[str, nn.Module],
        *,
        max_bytes: int | None = None,
    ):
        self.model = model.eval()
        self.batches, self.layers = batches, layers
        self.groups = _groups(model, batches[0], layers, max_bytes or room(model.device))
        self._gathered: dict[str, Moments] = {}

    def of(self, layer: str) -> Tensor:
        """The sum of x x' over the inputs of `layer`, fp32 (in, in), on the model's device."""
        return self.all_of(layer).second

    def all_of(self, layer: str) -> Moments:
        """The same with what centres it."""
        if layer not in self._gathered:
            group = next(group for group in self.groups if layer in group)
            self._gathered = {}  # the last group's memory goes before the next is taken
            self._gathered = _gather(self.model, self.batches, self.layers, group)
        return self._gathered[layer]


def room(device: torch.device) -> int:
    """Bytes for moments: MAX_BYTES, and on a small GPU half of what the model leaves free."""
    if device.type != "cuda":
        return MAX_BYTES
    return min(MAX_BYTES, torch.cuda.mem_get_info(device)[0] // 2)


def _groups(
    model: PreTrainedModel, batch: Any, layers: Mapping[str, Any], max_bytes: int
) -> list[dict[str, str]]:
    """Layers in the model's order, in groups whose moments fit; each with the first layer that
    reads the same input, which stands for it (q, k and v read one input, gate and up another).
    """
    leaders: dict[str, str] = {}
    last: list[tuple[Any, str]] = []

    def note(name: str, x: Tensor) -> None:
        leaders[name] = last[0][1] if last and last[0][0] is x else name
        last[:] = [(x, leaders[name])]

    with _watching(layers, note):
        _run(model, batch)
    groups: list[dict[str, str]] = [{}]
    used = 0
    for name, layer in layers.items():
        leader = leaders.get(name, name)
        size = 4 * _inputs(layer) ** 2 if leader not in groups[-1].values() else 0
        if groups[-1] and used + size > max_bytes:
            groups.append({})
            leader, used, size = name, 0, 4 * _inputs(layer) ** 2
        groups[-1][name] = leader
        used += size
    return groups


def _gather(
    model: PreTrainedModel,
    batches: Sequence[Any],
    layers: Mapping[str, Any],
    group: Mapping[str, str],
) -> dict[str, Moments]:
    leaders = {name: layers[name] for name in dict.fromkeys(group.values())}
    made = {name: _no_moments(_inputs(layer), model.device) for name, layer in leaders.items()}
    real = torch.empty(0)

    def add(name: str, x: Tensor) -> None:
        tokens = x[real] if x.shape[:-1] == real.shape else x.flatten(0, -2)
        tokens = tokens.float()
        second, first, count = made[name]
        second.addmm_(tokens.T, tokens)
        first.add_(tokens.sum(0))
        count.add_(len(tokens))

    with _watching(leaders, add):
        for batch in tqdm(batches, desc="Calibrating", leave=False):
            real = batch["attention_mask"].bool().to(model.device)
            _run(model, batch)
    return {name: made[leader] for name, leader in group.items()}


def _inputs(layer: nn.Module) -> int:
    return matrix_shape(plain(layer))[1]


def _no_moments(in_features: int, device: torch.device) -> Moments:
    shapes: tuple[tuple[int, ...], ...] = ((in_features, in_features), (in_features,), ())
    return Moments(*(torch.zeros(shape, device=device) for shape in shapes))


@contextmanager
def _watching(layers: Mapping[str, Any], see: Any) -> Iterator[None]:
    """Inside the block, `see(name, x)` is called with each input of `layers`."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def _run(model: PreTrainedModel, batch: Any) -> None:
    """The model without its output head: nobody needs the logits."""
    inputs = {name: ids.to(model.device) for name, ids in batch.items() if name != "labels"}
    model.base_model(**inputs, use_cache=False)
