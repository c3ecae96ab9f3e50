"""What an error in a layer's outputs costs: moments of its inputs and of gradients in its outputs.

To keep what was trained is to keep the model's distributions. To second order, an error e in a
layer's output at a token changes them by the mean of (g'e)^2, summed over tokens, where g is the
gradient in that output of v'z: z are the logits, p their probabilities, and v is random with

    mean of v v' = diag(p) - p p'        v = s sqrt(p) - p sum(s sqrt(p)),  s random signs

as the KL divergence has this matrix, the Fisher information, for its curvature in z. K-FAC takes p
less the one-hot vector of a sampled label for v, which is almost always near 0 where the model is
sure, and seldom large: of as many tokens the moments are less accurate. (KL divergence of merges of
SmolLM2-135M, GSM8K: 0.0108 in Q4_0 and 0.0038 in NF4 with labels, 0.0099 and 0.0034 with signs; of
E2E, whose text is less sure, 2 to 3 % higher with signs. Two backward passes for each batch lower
it by another 2 %.)

For an error E in the weight, e = E x, the sum is approximated by a product of two matrices, as
K-FAC does (arXiv:1503.05671; for rounding, arXiv:2505.22988):

    sum over tokens of (g' E x)^2  ~  tr(G E H E')        H = sum of |g| x x',   G = sum of g g'

G = 1 would leave how much each token counts (arXiv:2505.07004). Prompts, two thirds of many data,
count little in deep layers, but much in the keys and values that answers read.

H has |g|, not |g|^2: a few tokens have most of the sum of squares, and moments of those alone do
not hold for other text. (KL divergence of a merge to Q4_0 of SmolLM2-135M, E2E: 0.0144 without
weights, 0.0087 with |g|, 0.0088 with |g|^1.4; of GSM8K 0.0099 with |g|, 0.0110 with |g|^2.)

Those of all layers of a 7B model need 70 GB, so each run sums a group that fits into the memory.
It costs a forward pass, and a backward pass to the first layer of the group.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.adapters.lora import LoRALinear
from qlora.adapters.starts import moments_budget
from qlora.adapters.wrappers import base_modules, plain
from qlora.base.modules import is_linear, matrix_shape, set_checkpointing
from qlora.cli import Progress
from qlora.data.chat_template import NO_LOSS
from qlora.fast.head import put_language_head, rows_and_head
from qlora.ops.loss import chunk_rows

BLOCK = 256  # columns of moments that are summed at a time
ACTIVATIONS = 4 << 30  # bytes, roughly, of a batch in a backward pass without checkpointing

Add = Callable[[Tensor, Tensor], None]  # of an input (..., in) and the output's gradient (..., out)


class Moments(NamedTuple):
    """Of a layer, fp32, on the model's device; their scale does not matter."""

    inputs: Tensor  # H (in, in)
    outputs: Tensor | None = None  # G (out, out), where the format makes use of it
    drift: Tensor | None = None  # C (in, in), see qlora.merge.streams


class LossMoments:
    """Moments of layers, summed group by group on demand.

    Ask for the layers in the model's order: each group then runs once. The model is frozen, in eval
    mode, and is left so. A batch without labels is text of the model's own, whose tokens all count.
    A layer that the loss does not depend on has moments of zero. For those in `sized` the sizes of
    the gradients are kept in place of the inputs' moments.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Any],
        layers: Mapping[str, LoRALinear],
        *,
        with_outputs: bool,
        sized: Container[str] = (),
        max_bytes: int | None = None,
    ) -> None:
        put_language_head(model)
        self.model, self.batches, self.layers = model, batches, layers
        self.with_outputs, self.sized = with_outputs, sized
        self.groups = self._groups(max_bytes or moments_budget(model.device))
        tokens = max(batch["input_ids"].numel() for batch in batches)
        modules = map(plain, base_modules(model).values())
        values = 2 * tokens * sum(sum(matrix_shape(m)) for m in modules if is_linear(m))
        self.checkpoints = values * model.dtype.itemsize > ACTIVATIONS
        self._gathered: dict[str, Moments] = {}
        self._sizes: dict[str, list[Tensor | None]] = {}

    def of(self, layer: str) -> Moments:
        """The moments of `layer`; no inputs' moments where sizes are kept."""
        if layer not in self._gathered:
            self._gathered = {}  # frees the last group's memory before the next is allocated
            self._gathered = self._gather(next(g for g in self.groups if layer in g))
        return self._gathered[layer]

    def sizes_of(self, layer: str) -> list[Tensor | None] | None:
        """|g| at each token (rows, length) of each batch, where these are kept; None for a batch
        that the layer has no part in."""
        self.of(layer)
        return self._sizes.get(layer)

    def _groups(self, max_bytes: int) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        used = 0
        for name, layer in self.layers.items():
            out, wide = layer.shape
            size = 4 * ((name not in self.sized) * wide**2 + self.with_outputs * out**2)
            if groups[-1] and used + size > max_bytes:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
        return groups

    def _gather(self, group: Sequence[str]) -> dict[str, Moments]:
        """The moments of the layers of a group."""

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, size, device=self.model.device)

        sums = {}
        self._sizes = {name: [None] * len(self.batches) for name in group if name in self.sized}
        for name in group:
            out, wide = self.layers[name].shape
            inputs = zeros(0 if name in self.sized else wide)
            sums[name] = Moments(inputs, zeros(out) if self.with_outputs else None)

        number = 0

        def add(name: str, inputs: Tensor, gradient: Tensor) -> None:
            gradient = gradient.float()
            size = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)  # (rows, length, 1)
            if name in self._sizes:
                self._sizes[name][number] = size[..., 0]
            else:
                inputs = (inputs.float() * size.sqrt()).flatten(0, -2)  # (tokens, in)
                add_squares(sums[name].inputs, inputs)
            if (to_outputs := sums[name].outputs) is not None:
                add_squares(to_outputs, gradient.flatten(0, -2))  # (tokens, out)

        with ExitStack() as hooks:
            if self.checkpoints:
                hooks.enter_context(_checkpointing(self.model))
            for name in group:
                hook = self.layers[name].register_forward_hook(partial(_watch, partial(add, name)))
                hooks.callback(hook.remove)
            for number, batch in enumerate(Progress(self.batches, desc="Calibrating")):
                loss = _surrogate(self.model, batch, seed=number)
                if loss.requires_grad:
                    loss.backward()
        for each in (s for moments in sums.values() for s in moments if s is not None):
            mirror(each)
        return sums


def add_squares(sums: Tensor, rows: Tensor) -> None:
    """Add rows' rows to `sums` (n, n), of which what is above the diagonal waits for `mirror`.

    `rows` (tokens, n). Of blocks above the diagonal nothing is computed: almost half of the work.
    """
    for first in range(0, len(sums), BLOCK):
        own, below = slice(first, first + BLOCK), slice(first, None)
        sums[below, own].addmm_(rows[:, below].T, rows[:, own])


def mirror(sums: Tensor) -> None:
    """Copy what is below the diagonal of `sums` (n, n) above it, in place."""
    for first in range(0, len(sums), BLOCK):
        own, after = slice(first, first + BLOCK), slice(first + BLOCK, None)
        sums[own, own] = sums[own, own].tril() + sums[own, own].tril(-1).T
        sums[own, after] = sums[after, own].T


class _Watched(torch.autograd.Function):
    """A layer's output (..., out); its gradient is given to `add` with the layer's input."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(x)  # with checkpointing it is computed again
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.add(*ctx.saved_tensors, gradient)
        return gradient, None, None


def _watch(add: Add, _: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook of a layer; the graph of the first ones begins at their outputs."""
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    return _Watched.apply(output, args[0].detach(), add)  # type: ignore[no-any-return, no-untyped-call]


@torch.enable_grad()
def _surrogate(model: PreTrainedModel, batch: Any, seed: int) -> Tensor:
    """The sum of v'z over the tokens that have a label; v is a constant in it."""
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    given = inputs.pop("labels", None)
    if given is None:
        given = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, NO_LOSS)
    logits = model(**inputs, use_cache=False).logits[..., :-1, :]
    generator = torch.Generator(logits.device).manual_seed(seed)
    hidden, head = rows_and_head(logits)
    hidden = hidden[given[:, 1:] != NO_LOSS]  # (tokens, dim)
    chunk = chunk_rows(hidden.new_empty(logits.shape[-1], 0))
    parts = [
        head.gradient(each, partial(_random, generator=generator))
        for each in hidden.detach().split(chunk)
    ]
    return (hidden * torch.cat(parts)).sum()


def _random(z: Tensor, generator: torch.Generator) -> Tensor:
    """v (rows, vocab) for logits z."""
    kind: Any = {"dtype": torch.int8, "device": z.device}
    signs = torch.randint(2, z.shape, generator=generator, **kind).mul_(-2).add_(1)
    p = z.softmax(-1)
    v = p.sqrt().mul_(signs)
    return v.sub_(p.mul_(v.sum(-1, keepdim=True)))


@contextmanager
def _checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Gradient checkpointing of decoder layers; dropout stays off."""
    if not model.supports_gradient_checkpointing:
        yield
        return
    set_checkpointing(model, on=True)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            layer.training = True  # it asks for this; its modules stay in eval mode
        yield
    finally:
        set_checkpointing(model, on=False)
        for layer in layers:
            layer.training = False
