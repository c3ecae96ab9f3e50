"""Finds the layers of a model that can compute together (qlora.fast.layers), by looking at a run.

A few tokens go through the model once, and each layer's input and output is noted. Layers of one
module that are called one after another with the same tensor share their input. A module is a gated
MLP when gate and up get what it gets, it gives what down gives, and what down gets is
act(gate(x)) * up(x) with one of the activations there are, of large values too. So it does not
matter what a class is called, or how its source reads; what is not recognised computes layer by
layer.

Layers with adapters that compute together, by qlora.ops.lora: those that are called one
after another with the same input, and the three of a gated MLP.

A layer asks, in each forward pass, whether the fast way covers what is wanted of it; if it does
not, the layer, or the model's own MLP, computes as if this room were not there.

RMSNorms that keep less for the backward pass, in front of frozen norms of the model.

    y  = xhat * w,    xhat = x * rstd,    rstd = 1 / sqrt(mean(x^2) + eps)       arXiv:1910.07467
    dx = rstd * (dy * w - xhat * mean(dy * y)),    xhat = y / w

Models write it out, in fp32: six kernels, of which autograd keeps x as fp32, twice the bytes of a
16-bit x; and y is rounded twice, before w and after. On a GPU torch.nn.functional.rms_norm is one
kernel, keeps x as it is and a number a row, and rounds once.

On a CPU torch has no such kernel (there rms_norm is as slow, and keeps as much, as what models do).
In fp32 a function of ours keeps rstd, a number a row, and y in place of x, as apex's norms do with
`memory_efficient`: the layers after it with adapters keep y anyhow, so nothing of x's size is its
own. Forward and backward take 0.6 of the time that models' take (1024 x 576, one thread); y is the
same to the bit, dx no further off. Who changes y in place gets autograd's error. 16-bit norms on a
CPU stay the model's: y is rounded there, and xhat of it would be too.

A norm is known by its structure, and by what it computes of a few random rows: so no class of a
model is named. Gemma's (1 + w) is one with an offset; a 16-bit kernel would want 1 + w in 16 bits,
where it loses digits, so there it stays the model's. Left out: a norm that is trained.
"""

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.adapters.lora import LoRALayer, LoRALinear, lora_layers
from qlora.adapters.wrappers import (
    Wrapper,
    base_modules,
    plain,
    put_module,
    take_wrappers_off,
    wrappers,
)
from qlora.base.modules import computes_in, is_quantized, is_watched, product_dtype, was_conv1d
from qlora.ops.gated import ACTS, gated_forward
from qlora.ops.lora import Frozen, lora_linear, lora_mlp

FEW_TOKENS = 8
LARGE = 200.0  # its square is a number in fp16, too


class _Call(NamedTuple):
    """A module's only call."""

    x: Tensor
    y: Tensor


def use_fast_path(model: Any, *, recompute: bool = False) -> None:
    """Let the layers of `model` with adapters compute by functions of our own; in place.

    Prints one line where some take the plain way. The numbers are the same either way.

    Args:
        recompute: activations are made again for the backward pass (gradient checkpointing), so
            that a block need not keep them.
    """
    take_fast_path_off(model)
    layers = lora_layers(model)
    seen = _seen(model, layers.values())
    read = [call.x for call in seen.values()]
    for group in _groups(layers, seen):
        shared = SharedInput(group)
        for layer in group:
            layer.fast = shared
    for name, module in base_modules(model).items():
        block = _mlp(name, module, layers, seen)
        if block is not None:
            # what a norm reads, as Gemma's does, is made again in any case, so keep what it is of
            is_read = any(x is seen[module].y for x in read)
            block.recompute = recompute and not is_read
            put_module(model, name, block)
    _say_what_is_plain(layers, seen)


def take_fast_path_off(model: nn.Module) -> None:
    """Let every layer, and the model's own MLPs, compute by themselves."""
    for layer in lora_layers(model).values():
        if isinstance(layer, LoRALinear):
            layer.fast = None
    take_wrappers_off(model, lambda wrapper: isinstance(wrapper, MLPBlock))


def _groups(
    layers: dict[str, LoRALayer], seen: dict[nn.Module, _Call]
) -> Iterator[list[LoRALinear]]:
    """Layers of one parent that were called one after another with the same tensor, or one."""
    names = {layer: name for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    called = [layer for layer in seen if layer in names]
    for _, group in groupby(called, lambda layer: (_parent(names[layer]), id(seen[layer].x))):
        yield list(group)
    yield from ([layer] for layer in names if layer not in seen)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _mlp(
    name: str, module: nn.Module, layers: dict[str, LoRALayer], seen: dict[nn.Module, _Call]
) -> "MLPBlock | None":
    """`module` as one function, if it is a gated MLP of three layers with adapters."""
    own = [layer for layer_name, layer in layers.items() if _parent(layer_name) == name]
    call = seen.get(module)
    if call is None or len(own) != 3 or any(layer not in seen for layer in own):
        return None
    inside = {part for layer in own for wrapper in wrappers(layer) for part in wrapper.modules()}
    others = [part for part in plain(module).modules() if part not in inside][1:]
    activation = _activation(others[0]) if len(others) == 1 else None
    for gate, up, down in permutations(own):
        is_shaped = seen[gate].x is call.x is seen[up].x and seen[down].y is call.y
        if activation and is_shaped:
            h = gated_forward(seen[gate].y, seen[up].y, activation)
            # theirs rounds the activation too
            close = 4 * torch.finfo(h.dtype).eps * h.norm()
            block = MLPBlock(module, (gate, up, down), activation)
            if (h - seen[down].x).norm() <= close and _is_so_of_large_values(block, call.x):
                return block
    return None


@torch.no_grad()
def _is_so_of_large_values(block: "MLPBlock", x: Tensor) -> bool:
    """Whether the module computes the same where gate and up give large values, and in training:
    some bound the former (DeepSeek-V4), or drop out."""
    module, (gate, up, down) = plain(block), block.layers
    shape = (*x.shape[:-1], gate.shape[0])
    given = torch.linspace(-LARGE, LARGE, math.prod(shape)).to(x).view(shape)
    instead = {gate: given, up: given.flip(-1)}
    calls: list[_Call] = []
    hooks = [layer.register_forward_hook(lambda layer, *_: instead[layer]) for layer in instead]
    hooks.append(down.register_forward_hook(lambda _, args, y: calls.append(_Call(args[0], y))))
    was_training, module.training = module.training, True
    try:
        y = module(x)
    finally:
        module.training = was_training
        for hook in hooks:
            hook.remove()
    if not calls or y is not calls[0].y:
        return False
    h = gated_forward(instead[gate], instead[up], block.activation)
    close = 4 * torch.finfo(h.dtype).eps * h.float().norm()  # which is too large for fp16
    return bool((h.float() - calls[0].x.float()).norm() <= close)


def _activation(module: nn.Module) -> str | None:
    """Which of the known ones it is."""
    if next(module.parameters(), None) is not None:
        return None
    grid = torch.linspace(-8, 8, 1025)
    y = module(grid)
    for name in ACTS:
        wanted = gated_forward(grid, torch.ones_like(grid), name)
        if isinstance(y, Tensor) and y.shape == grid.shape and (y - wanted).abs().max() < 1e-6:
            return name
    return None


@torch.no_grad()
def _seen(model: Any, layers: Iterable[nn.Module]) -> dict[nn.Module, _Call]:
    """The calls of `layers` and of the base's modules, in their order, of those that were called
    once with one tensor."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return {}
    calls: dict[nn.Module, list[_Call]] = {}

    def note(module: nn.Module, args: Any, y: Any) -> None:
        if len(args) == 1 and isinstance(y, Tensor):
            calls.setdefault(module, []).append(_Call(args[0], y))

    ids = torch.arange(FEW_TOKENS, device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    watched = {*layers, *base_modules(model).values()}
    hooks = [module.register_forward_hook(note) for module in watched]
    was_training = model.training
    try:
        model.eval()
        model.base_model(**inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {module: found[0] for module, found in calls.items() if len(found) == 1}


def _say_what_is_plain(layers: dict[str, LoRALayer], seen: dict[nn.Module, _Call]) -> None:
    reasons = Counter(
        reason for layer in layers.values() if (reason := why_plain(layer) or _dtypes(layer, seen))
    )
    for reason, count in reasons.items():
        print(f"{count} of {len(layers)} layers compute the plain way: {reason}")


def _dtypes(layer: LoRALayer, seen: dict[nn.Module, _Call]) -> str | None:
    """What stands against the functions about a layer's input."""
    dtype = computes_in(layer.base_layer)
    if layer in seen and seen[layer].x.dtype != dtype:
        return f"their input is {seen[layer].x.dtype}, and they compute in {dtype}"
    return None


def why_plain(layer: LoRALayer) -> str | None:
    """What about a layer and its active adapter the functions do not cover, or None."""
    base: Any = layer.base_layer
    # what is derived from nn.Linear may compute something else
    if not isinstance(layer, LoRALinear) or not (type(base) is nn.Linear or is_quantized(base)):
        return "no plain linear layer of its own"
    if was_conv1d(base) and not is_quantized(base):
        return "a Conv1D"
    if layer.merged_adapters or layer.adapter_of_row is not None:
        return "merged, or a batch of several adapters"
    if len(layer.active_adapters) != 1:
        return "not one adapter"
    name = layer.active_adapters[0]
    if name in layer.lora_magnitude_vector:
        return "DoRA"
    if name in layer.lora_bias:
        return "lora_bias"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "a base that is trained"
    if is_watched(base):
        return "a base with hooks"
    return None


def is_fast(layer: LoRALayer, x: Tensor) -> bool:
    """Whether the functions cover this call; without gradients there is nothing to be won."""
    in_dtype = x.dtype == computes_in(layer.base_layer) == product_dtype(x)
    return torch.is_grad_enabled() and in_dtype and why_plain(layer) is None


def _inputs(layers: Sequence[LoRALayer]) -> tuple[list[Frozen], list[tuple[Tensor, Tensor]]]:
    """What the functions take, of layers that are fast."""
    names = [layer.active_adapters[0] for layer in layers]
    pairs = list(zip(layers, names, strict=True))
    frozen = [
        Frozen(layer.base_layer, layer.scaling[name], layer.drawn_dropout(name))
        for layer, name in pairs
    ]
    return frozen, [(layer.lora_A[name], layer.lora_B[name]) for layer, name in pairs]


class SharedInput:
    """Layers that are called one after another with the same tensor, like q, k and v; or one alone.

    The first that is called computes for all. What the others gave waits for their calls: with the
    same tensor, unchanged. A call with another one drops it.
    """

    def __init__(self, layers: Sequence[LoRALayer]) -> None:
        self.layers = tuple(layers)
        self._seen: tuple[Tensor, int] | None = None
        self._waiting: dict[LoRALayer, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy nobody waits, if a forward pass was left half done."""
        return {"layers": self.layers, "_seen": None, "_waiting": {}}

    def __call__(self, layer: LoRALayer, x: Tensor) -> Tensor | None:
        """What `layer` gives for x (..., in), or None where it is to compute by itself."""
        is_same = self._seen is not None and self._seen[0] is x and self._seen[1] == x._version
        if not (is_same and layer in self._waiting and torch.is_grad_enabled()):
            self._seen, self._waiting = None, {}
            together = self.layers if all(is_fast(other, x) for other in self.layers) else (layer,)
            if not is_fast(layer, x):
                return None
            outputs = lora_linear(x, *_inputs(together))
            if len(together) == 1:
                return outputs[0]
            self._seen = x, x._version
            self._waiting = dict(zip(together, outputs, strict=True))
        y = self._waiting.pop(layer)
        if not self._waiting:
            self._seen = None
        return y


class MLPBlock(Wrapper):
    """A gated MLP, down(act(gate(x)) * up(x)), in front of the model's own, as one function."""

    def __init__(self, base_layer: nn.Module, layers: Sequence[LoRALayer], activation: str) -> None:
        super().__init__(base_layer)
        self.layers = tuple(layers)  # gate, up and down, which are the base layer's children
        self.activation = activation
        self.recompute = False
        """keep x alone for the backward pass, as under gradient checkpointing"""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(..., in) -> (..., in)."""
        # of the calls of what is in it, the function makes none
        is_plain = args or kwargs or any(map(is_watched, self.base_layer.modules()))
        if is_plain or not all(is_fast(layer, x) for layer in self.layers):
            return self.base_layer(x, *args, **kwargs)
        frozen, factors = _inputs(self.layers)
        return lora_mlp(x, frozen, factors, activation=self.activation, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, recompute={self.recompute}"


HAS_KERNEL = ("cuda",)
EPS = ("variance_epsilon", "eps", "epsilon")  # as models call it


class Form(NamedTuple):
    """What a norm computes, beside its weight."""

    eps: float
    offset: float = 0.0
    """added to the weight: Gemma's is 1"""


class RMSNorm(Wrapper):
    """A frozen RMSNorm of a model, computed in the way that keeps the least."""

    def __init__(self, base_layer: nn.Module, form: Form) -> None:
        super().__init__(base_layer)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        norm, (eps, offset) = self.base_layer, self.form
        # a wrapper below is an adapter's, that has a weight of its own
        is_frozen = not isinstance(norm, Wrapper) and not norm.weight.requires_grad
        if is_frozen and norm.weight.dtype == x.dtype:
            is_wide = torch.finfo(x.dtype).bits >= 32
            weight: Tensor = norm.weight + offset if offset else norm.weight
            if x.device.type in HAS_KERNEL and (is_wide or not offset):
                with torch.autocast(x.device.type, enabled=False):
                    return F.rms_norm(x, weight.shape, weight, eps)
            if is_wide and divides(weight):
                return _FromOutput.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
        y: Tensor = norm(x)
        return y

    def extra_repr(self) -> str:
        return f"eps={self.form.eps}, offset={self.form.offset}"


def divides(weight: Tensor) -> bool:
    """Whether y / w gives xhat back. A small w costs nothing, roundings are relative, until y falls
    below the normal numbers: it may then be off by the least of them, `tiny`, and y / w by
    tiny / |w|. That is to be no more than the rounding of an xhat of 1, which is a row's mean.
    """
    limits = torch.finfo(weight.dtype)
    return bool(weight.abs().min() >= limits.tiny / limits.eps)  # 1e-31 in fp32


class _FromOutput(torch.autograd.Function):
    """The norm of x (..., dim) in fp32 or more, whose backward pass wants what it gave, not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.square()
        rstd = y.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, rstd, out=y).mul_(weight)
        ctx.save_for_backward(y, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, rstd, weight = ctx.saved_tensors
        dx = dy * y
        minus = dx.mean(-1, keepdim=True).neg_()
        torch.mul(y, minus, out=dx).div_(weight)
        return dx.addcmul_(dy, weight).mul_(rstd), None, None


def put_norms(model: nn.Module) -> None:
    """An RMSNorm in front of each frozen norm of `model` that is one."""
    for name, module in base_modules(model).items():
        form = rms_norm_form(module)
        if form is not None:
            put_module(model, name, RMSNorm(module, form).train(module.training))


@torch.no_grad()
def rms_norm_form(module: nn.Module) -> Form | None:
    """The form of an RMSNorm that nobody trains, watches or stands in front of; None of any other
    module."""
    eps = next((getattr(module, name) for name in EPS if hasattr(module, name)), None)
    state = {**module._parameters, **module._buffers, **module._modules}
    weight = state.pop("weight", None)
    if state or not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.requires_grad:
        return None
    if not isinstance(eps, float) or is_watched(module) or isinstance(module, Wrapper | nn.RMSNorm):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # Mamba's have a gate
        return None
    # rows of the size of sqrt(eps) tell where eps is added
    sizes = torch.tensor([1.0, 100.0, eps**0.5])[:, None]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, len(weight), generator=generator) * sizes).to(weight)
    got = module(x).double()
    # two roundings, and those of some operations in fp32
    close = 2 * max(torch.finfo(weight.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    for form in (Form(eps), Form(eps, offset=1.0)):
        wanted = F.rms_norm(x.double(), weight.shape, weight.double() + form.offset, eps)
        if got.shape == wanted.shape and (got - wanted).norm() <= close * wanted.norm():
            return form
    return None
