"""Calibration of layers in their order, each on what the merged layers before it hand on.

A merge that rounds all weights lets a layer read other inputs y than the x of the model as trained.
So it asks for other values, too: V that makes V y come near to W x. To second order (as in
qlora.merge.moments) the best is

    V = W + W C inverse(H)        H = sum of |g| y y',   C = sum of |g| (x - y) y'

and errors around it cost tr(G E H E'). GPTQ takes y for x (arXiv:2210.17323), GPTAQ and Qronos
take account of the difference (arXiv:2504.02692, 2505.11695). Half of the step, since C is known of
few tokens: the KL divergence of a merge to Q4_0 of SmolLM2-135M, E2E, was 0.0057 with none of it,
0.0046 with half, 0.0051 with all. It gained nothing where the layers of one decoder layer did not
read each other's merged outputs, only those of the decoder layers before. Main directions of the
inputs are enough (`qlora.merge.codes`): with 256 of them it was the same within 2 %.

Two streams of hidden states pass through the decoder layers one by one, called as the model called
them: as trained, and with the weights that are chosen so far.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.adapters.lora import LoRALinear
from qlora.merge.moments import LossMoments, Moments, add_squares, mirror


class Calibration:
    """What the search for codes knows of each adapted layer; ask in the model's order."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Any],
        layers: Mapping[str, LoRALinear],
        *,
        in_sequence: bool,
    ) -> None:
        """With `in_sequence`, of moments of outputs use is made, too, and `chose` is called."""
        self.streams = Streams(model, batches, layers) if in_sequence else None
        places = self.streams.places if self.streams else {}
        self.loss = LossMoments(model, batches, layers, with_outputs=in_sequence, sized=places)

    def of(self, layer: str) -> Moments:
        """The moments of `layer`."""
        moments, sizes = self.loss.of(layer), self.loss.sizes_of(layer)
        if self.streams is None or sizes is None:
            return moments
        width = self.loss.layers[layer].shape[1]
        device = self.loss.model.device
        inputs, drift = (torch.zeros(width, width, device=device) for _ in range(2))
        for (x, y), size in zip(self.streams.inputs(layer), sizes, strict=True):
            if size is None:
                continue
            root = size.sqrt().flatten()[:, None]  # (tokens, 1)
            plain, merged = (each.flatten(0, -2).float() * root for each in (x, y))
            add_squares(inputs, merged)
            drift.addmm_((plain - merged).T, merged)
        mirror(inputs)
        return moments._replace(inputs=inputs, drift=drift)

    def chose(self, layer: str, weight: Tensor) -> None:
        """Tell the weight (out, in) that was chosen for `layer`; later layers read its outputs."""
        if self.streams:
            self.streams.chosen[layer] = weight.to(self.streams.dtype)


class _Call(NamedTuple):
    """What a decoder layer was called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Streams:
    """Inputs of layers in the model as trained, and with the weights `chosen` so far.

    `places`: decoder layer and stage of each layer that can be followed; layers of a stage read one
    tensor. Left out: layers outside of decoder layers, experts that read some tokens only, and
    models that do more between decoder layers than to hand on hidden states.
    """

    at: int  # the decoder layer that both streams have come to
    stage: int  # in it, that `merged_inputs` are of

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Any], layers: Mapping[str, LoRALinear]
    ) -> None:
        self.layers, self.dtype = layers, model.dtype
        self.calls: dict[GradientCheckpointingLayer, list[_Call]] = {}
        self.first: list[Tensor] = []  # the hidden states of each batch before the first of them
        self.chosen: dict[str, Tensor] = {}
        self.places: dict[str, tuple[int, int]] = {}
        if all(self._record(model, batch) for batch in batches):
            self._find_stages(batches[0]["input_ids"].shape)
        self._restart()

    @torch.no_grad()
    def inputs(self, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each batch the inputs (rows, length, in) of `layer` in both streams."""
        number, stage = self.places[layer]
        if number < self.at:  # a second merge
            self._restart()
        while self.at < number:
            self._enter_next()
        if self.stage != stage:
            self.merged_inputs = self._merged_inputs(stage)
            self.stage = stage
        return zip(self.plain_inputs[stage], self.merged_inputs, strict=True)

    # ---- the model's own run ----

    @torch.no_grad()
    def _record(self, model: PreTrainedModel, batch: Any) -> bool:
        """Record the calls of decoder layers for `batch`; whether they are a chain."""
        handed_on: list[Tensor] = []
        is_chain = True

        def before(layer: Any, args: Any, kwargs: Any) -> None:
            nonlocal is_chain
            if not args or (handed_on and args[0] is not handed_on[-1]):
                is_chain = False
                return
            if not handed_on:
                self.first.append(args[0])
            self.calls.setdefault(layer, []).append(_Call(args[1:], kwargs))

        def after(layer: Any, args: Any, output: Any) -> None:
            handed_on[:] = [_hidden(output)]

        with ExitStack() as hooks:
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    hooks.callback(
                        module.register_forward_pre_hook(before, with_kwargs=True).remove
                    )
                    hooks.callback(module.register_forward_hook(after).remove)
            inputs = {key: x.to(model.device) for key, x in batch.items() if key != "labels"}
            model.base_model(**inputs, use_cache=False)
        count = len(self.first)
        return is_chain and all(len(calls) == count for calls in self.calls.values())

    @torch.no_grad()
    def _find_stages(self, shape: torch.Size) -> None:
        """Fill `places` by a run of each decoder layer on the first batch."""
        hidden = self.first[0]
        for number, (decoder, (call, *_)) in enumerate(self.calls.items()):
            read: list[tuple[str, Tensor]] = []
            with _visiting(self._within(decoder), lambda name, x: read.append((name, x))):  # noqa: B023
                hidden = _hidden(decoder(hidden, *call.args, **call.kwargs))
            stage, names = -1, [name for name, _ in read]
            for i, (name, x) in enumerate(read):
                stage += i == 0 or x is not read[i - 1][1]
                if x.shape[:-1] == shape and names.count(name) == 1:
                    self.places[name] = number, stage

    def _within(self, decoder: nn.Module) -> dict[str, LoRALinear]:
        inside = set(decoder.modules())
        return {name: layer for name, layer in self.layers.items() if layer in inside}

    # ---- one decoder layer after the other ----

    def _restart(self) -> None:
        self.at = self.stage = -1
        self.plain = self.merged = self.after = self.first
        self.chosen.clear()

    def _enter_next(self) -> None:
        """Take both streams to the next decoder layer."""
        if self.at >= 0:
            self.merged = self._through(self.merged)
            self.plain = self.after
        self.chosen.clear()
        self.at += 1
        self.stage = -1
        self.plain_inputs: dict[int, list[Tensor]] = {}
        readers = {stage: name for name, (i, stage) in self.places.items() if i == self.at}

        def keep(name: str, x: Tensor) -> None:
            self.plain_inputs.setdefault(self.places[name][1], []).append(x)

        with _visiting({name: self.layers[name] for name in readers.values()}, keep):
            self.after = self._through(self.plain)

    def _merged_inputs(self, stage: int) -> list[Tensor]:
        """Of each batch what the layers of `stage` read."""
        found: list[Tensor] = []

        def keep(_: str, x: Tensor) -> None:
            found.append(x)
            raise _Found

        name = next(name for name, place in self.places.items() if place == (self.at, stage))
        with _visiting({name: self.layers[name]}, keep):
            self._through(self.merged)
        return found

    def _through(self, states: list[Tensor]) -> list[Tensor]:
        """The decoder layer's outputs with the weights that are chosen."""
        decoder, calls = list(self.calls.items())[self.at]
        outputs = []
        with self._merged():
            for hidden, call in zip(states, calls, strict=True):
                try:
                    outputs.append(_hidden(decoder(hidden, *call.args, **call.kwargs)))
                except _Found:
                    continue
        return outputs

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """Layers compute with the weights that are chosen for them."""
        changed = [self.layers[name] for name in self.chosen]
        for layer, weight in zip(changed, self.chosen.values(), strict=True):
            bias = layer(weight.new_zeros(1, weight.shape[1]))[0]
            layer.forward = partial(F.linear, weight=weight, bias=bias)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in changed:
                del layer.forward


class _Found(Exception):  # no error
    """Ends a decoder layer's run where what was looked for is known."""


@contextmanager
def _visiting(layers: Mapping[str, nn.Module], visit: Any) -> Iterator[None]:
    """`visit(name, input)` is called before each of `layers`."""
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: visit(name, args[0]))
            hooks.callback(hook.remove)
        yield


def _hidden(output: Any) -> Tensor:
    """The hidden states among a decoder layer's outputs."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
