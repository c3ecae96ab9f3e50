"""LoRA layers, gated MLPs and RMSNorms as functions that keep less for the backward pass.

    SharedInput   LoRA layers that are called one after another with one tensor (q, k and v): one
                  qlora.ops.lora.lora_linear
    MLPBlock      a gated MLP, down(act(gate(x)) * up(x)): one qlora.ops.lora.lora_mlp
    RMSNorm       y = xhat * w, xhat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps) (arXiv:1910.07467)

Layers that share an input are found by one run of a few tokens; a gated MLP by the names of its
children, a norm by its parameters, and both must agree numerically with their function. Each
forward pass checks whether the function supports the layer's state, adapter and dtype; otherwise
the layer, or the model's own MLP or norm, computes as without this module.

Models write RMSNorm out in fp32: six kernels, of which autograd keeps x in fp32, twice the bytes of
a 16-bit x. On a GPU torch.nn.functional.rms_norm is one kernel, keeps x in its own dtype and one
number per row, and rounds once where models round twice. On a CPU it saves nothing; there
`_FromOutput` computes fp32 norms and keeps y instead of x, as apex does with `memory_efficient`:

    dx = rstd * (dy * w - xhat * mean(dy * y)),    xhat = y / w

The LoRA layers behind it keep y in any case, so that it adds one number per row. It takes 0.6 of
the models' time (1024 x 576, one thread); y is equal to the bit, dx is no less exact. Left out:
norms that are trained; 16-bit norms on a CPU, where xhat from a rounded y loses digits; Gemma's
(1 + w) in 16 bits on a GPU, whose kernel would round 1 + w.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.adapters.lora import LoRALayer, LoRALinear, lora_layers
from qlora.adapters.wrappers import Wrapper, base_modules, plain, put_module, remove_wrappers
from qlora.base.modules import (
    computes_in,
    is_quantized,
    is_watched,
    product_dtype,
    shallow_copy,
    was_conv1d,
)
from qlora.ops.agree import agrees
from qlora.ops.gated import ACTS, gated_forward
from qlora.ops.lora import LayerSpec, lora_linear, lora_mlp

# gate, up and down: Llama's names, which all gated MLPs of transformers have, and InternLM2's
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# gelu and its tanh form differ below 8; DeepSeek-V4 clamps gate and up at 10
GATE_RANGES = (8.0, 200.0)
HAS_KERNEL = ("cuda",)  # devices on which F.rms_norm is one kernel
EPS = ("variance_epsilon", "eps", "epsilon")  # names in transformers' norms


def use_fast_path(model: Any, *, recompute: bool = False) -> None:
    """Compute `model`'s LoRA layers and gated MLPs by the functions of qlora.ops.lora, in place.

    Prints one line for each reason why layers fall back. With `recompute`, for gradient
    checkpointing, an MLP keeps its input alone.
    """
    take_fast_path_off(model)
    layers = lora_layers(model)
    calls = _record_calls(model, layers.values())
    for group in _groups(layers, calls):
        shared = SharedInput(group)
        for layer in group:
            layer.fast = shared
    inputs = [call.x for call in calls.values()]
    for name, module in base_modules(model).items():
        block = _gated_mlp(module) if module in calls else None
        if block is not None:
            # an output that a norm reads, as Gemma's, is recomputed in any case: then keep more
            block.recompute = recompute and all(x is not calls[module].y for x in inputs)
            put_module(model, name, block)
    _report_fallbacks(layers, calls)


def take_fast_path_off(model: nn.Module) -> None:
    """Compute every LoRA layer, and the model's own MLPs, without the functions."""
    for layer in lora_layers(model).values():
        if isinstance(layer, LoRALinear):
            layer.fast = None
    remove_wrappers(model, lambda wrapper: isinstance(wrapper, MLPBlock))


# ---- layers and blocks


class SharedInput:
    """LoRA layers that are called one after another with one tensor, as q, k and v; or one alone.

    `LoRALinear.fast` of each. The first call computes the outputs of all; the others wait for their
    layers' calls with the same unchanged tensor. A call with another tensor drops them.
    """

    def __init__(self, layers: Sequence[LoRALayer]) -> None:
        self.layers = tuple(layers)
        self._input: tuple[Tensor, int] | None = None  # and its version
        self._waiting: dict[LoRALayer, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without outputs that wait, if the model is copied after an interrupted forward pass."""
        return {"layers": self.layers, "_input": None, "_waiting": {}}

    def __call__(self, layer: LoRALayer, x: Tensor) -> Tensor | None:
        """The output of `layer` for x (..., in), or None: the layer falls back."""
        is_same = self._input is not None and self._input[0] is x and self._input[1] == x._version
        if not (is_same and layer in self._waiting and torch.is_grad_enabled()):
            self._input, self._waiting = None, {}
            if not is_fast(layer, x):
                return None
            group = self.layers if all(is_fast(other, x) for other in self.layers) else (layer,)
            outputs = lora_linear(x, *_arguments(group))
            if len(group) == 1:
                return outputs[0]
            self._input = x, x._version
            self._waiting = dict(zip(group, outputs, strict=True))
        y = self._waiting.pop(layer)
        if not self._waiting:
            self._input = None
        return y


class MLPBlock(Wrapper):
    """A gated MLP, down(act(gate(x)) * up(x)), as one function instead of the model's own."""

    def __init__(self, base_layer: nn.Module, layers: Sequence[LoRALayer], activation: str) -> None:
        super().__init__(base_layer)
        self.layers = tuple(layers)  # gate, up and down, which are base_layer's children
        self.activation = activation
        self.recompute = False  # keep x alone for the backward pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(..., in) -> (..., in)."""
        # the function calls none of the modules inside, so that their hooks would not run
        falls_back = args or kwargs or any(map(is_watched, self.base_layer.modules()))
        if falls_back or not all(is_fast(layer, x) for layer in self.layers):
            return self.base_layer(x, *args, **kwargs)
        specs, factors = _arguments(self.layers)
        return lora_mlp(x, specs, factors, activation=self.activation, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, recompute={self.recompute}"


def _arguments(layers: Sequence[LoRALayer]) -> tuple[list[LayerSpec], list[tuple[Tensor, Tensor]]]:
    """The arguments of lora_linear and lora_mlp, for layers that are fast."""
    specs, factors = [], []
    for layer in layers:
        name = layer.active_adapters[0]
        specs.append(LayerSpec(layer.base_layer, layer.scaling[name], layer.drawn_dropout(name)))
        factors.append((layer.lora_A[name], layer.lora_B[name]))
    return specs, factors


def is_fast(layer: LoRALayer, x: Tensor) -> bool:
    """Whether the functions support this call; without gradients they save nothing."""
    in_dtype = x.dtype == computes_in(layer.base_layer) == product_dtype(x)
    return torch.is_grad_enabled() and in_dtype and why_plain(layer) is None


def why_plain(layer: LoRALayer) -> str | None:
    """What the functions do not support in a layer and its active adapter, or None."""
    base: Any = layer.base_layer
    # a subclass of nn.Linear may compute something else
    if not isinstance(layer, LoRALinear) or not (type(base) is nn.Linear or is_quantized(base)):
        return "no plain linear layer of its own"
    if was_conv1d(base) and not is_quantized(base):
        return "a Conv1D"
    if layer.fused_adapters or layer.adapter_of_row is not None:
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


# ---- how they are found


class _Call(NamedTuple):
    x: Tensor
    y: Tensor


@torch.no_grad()
def _record_calls(model: Any, layers: Iterable[nn.Module]) -> dict[nn.Module, _Call]:
    """Run a few tokens through `model`: the calls of `layers` and of the base's modules, in order,
    of those that were called once, with one tensor. None of a model that reads no token ids."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return {}
    calls: dict[nn.Module, list[_Call]] = {}

    def record(module: nn.Module, args: Any, y: Any) -> None:
        if len(args) == 1 and isinstance(y, Tensor):
            calls.setdefault(module, []).append(_Call(args[0], y))

    ids = torch.arange(8, device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    hooks = [m.register_forward_hook(record) for m in {*layers, *base_modules(model).values()}]
    was_training = model.training
    try:
        model.eval()
        model.base_model(**inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {module: own[0] for module, own in calls.items() if len(own) == 1}


def _groups(layers: dict[str, LoRALayer], calls: dict[nn.Module, _Call]) -> list[list[LoRALinear]]:
    """Layers of one parent that were called one after another with one tensor; the others alone."""
    names = {layer: name for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    called = [layer for layer in calls if layer in names]
    keys = {layer: (names[layer].rpartition(".")[0], id(calls[layer].x)) for layer in called}
    groups = [list(group) for _, group in groupby(called, keys.__getitem__)]
    return groups + [[layer] for layer in names if layer not in calls]


def _gated_mlp(module: nn.Module) -> MLPBlock | None:
    """`module` as one function, if it is a gated MLP whose three projections have adapters."""
    mlp = plain(module)
    for names in PROJECTIONS:
        layers = [
            child for name in names if isinstance(child := mlp._modules.get(name), LoRALinear)
        ]
        if len(layers) == 3 and len(mlp._modules) == 4:  # with the activation; T5Gemma's drops out
            activation = next((act for act in ACTS if _computes(mlp, names, act)), None)
            return None if activation is None else MLPBlock(module, layers, activation)
    return None


def _computes(mlp: Any, names: tuple[str, str, str], activation: str) -> bool:
    """Whether the forward pass of `mlp` is down(activation(gate(x)) * up(x)), also in training and
    where gate and up give large values: some clamp them, or drop out."""
    n, twin = 1024, shallow_copy(mlp)  # whose gate and up give one half of the features each
    halves = lambda x: x[..., :n], lambda x: x[..., n:], lambda h: h
    twin._modules.update(zip(names, halves, strict=True))  # type: ignore[arg-type]
    twin.training = True  # not train(), which is for the children too
    gate = torch.linspace(-1, 1, n, device=next(mlp.parameters()).device)
    x = torch.cat([gate, gate.roll(300)])[None, None]  # (1, 1, 2 n)

    def function(x: Tensor) -> Tensor:
        return gated_forward(x[..., :n], x[..., n:], activation)

    forward = partial(type(mlp).forward, twin)
    close = 8 * torch.finfo(torch.float32).eps  # some write their activation out
    try:
        return all(agrees(forward, function, size * x, tolerance=close) for size in GATE_RANGES)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it needs more than features
        return False


def _report_fallbacks(layers: dict[str, LoRALayer], calls: dict[nn.Module, _Call]) -> None:
    reasons: Counter[str] = Counter()
    for layer in layers.values():
        dtype, reason = computes_in(layer.base_layer), why_plain(layer)
        if reason is None and layer in calls and calls[layer].x.dtype != dtype:
            reason = f"their input is {calls[layer].x.dtype}, and they compute in {dtype}"
        if reason is not None:
            reasons[reason] += 1
    for reason, count in reasons.items():
        print(f"{count} of {len(layers)} layers compute the plain way: {reason}")


# ---- norms


def put_norms(model: nn.Module) -> None:
    """Wrap each frozen RMSNorm of `model` in an RMSNorm of ours, in place."""
    for name, module in base_modules(model).items():
        if form := rms_norm_form(module):
            put_module(model, name, RMSNorm(module, form).train(module.training))


class Form(NamedTuple):
    """What an RMSNorm computes, beside its weight."""

    eps: float
    offset: float = 0.0  # added to the weight: Gemma's is 1


class RMSNorm(Wrapper):
    """A model's frozen RMSNorm, computed in the way that keeps the least."""

    def __init__(self, base_layer: nn.Module, form: Form) -> None:
        super().__init__(base_layer)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        norm, (eps, offset) = self.base_layer, self.form
        # a wrapper below is an adapter's, with a weight of its own
        is_frozen = not isinstance(norm, Wrapper) and not norm.weight.requires_grad
        if is_frozen and norm.weight.dtype == x.dtype:
            limits = torch.finfo(x.dtype)
            is_wide = limits.bits >= 32
            weight: Tensor = norm.weight + offset if offset else norm.weight
            if x.device.type in HAS_KERNEL and (is_wide or not offset):
                with torch.autocast(x.device.type, enabled=False):
                    return F.rms_norm(x, weight.shape, weight, eps)
            # xhat = y / w: a y below the normal numbers is off by up to `tiny`, which may be no
            # more than the rounding of an xhat of 1 (|w| >= 1e-31 in fp32)
            if is_wide and bool(weight.abs().min() >= limits.tiny / limits.eps):
                return _FromOutput.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
        y: Tensor = norm(x)
        return y

    def extra_repr(self) -> str:
        return f"eps={self.form.eps}, offset={self.form.offset}"


class _FromOutput(torch.autograd.Function):
    """The norm of x (..., dim) in fp32 or fp64, whose backward pass reads y and not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.square()
        rstd = y.mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        torch.mul(x, rstd, out=y).mul_(weight)
        ctx.save_for_backward(y, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, rstd, weight = ctx.saved_tensors
        dx = dy * y
        minus = dx.mean(-1, keepdim=True).neg_()
        torch.mul(y, minus, out=dx).div_(weight)  # -xhat * mean(dy * y)
        return dx.addcmul_(dy, weight).mul_(rstd), None, None


def rms_norm_form(module: nn.Module) -> Form | None:
    """The form of a frozen, unhooked, unwrapped RMSNorm; None for any other module."""
    eps = next((getattr(module, name) for name in EPS if hasattr(module, name)), None)
    state = {**module._parameters, **module._buffers, **module._modules}
    weight = state.pop("weight", None)
    if state or not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.requires_grad:
        return None
    if not isinstance(eps, float) or is_watched(module) or isinstance(module, Wrapper | nn.RMSNorm):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # Mamba's have a gate
        return None
    # rows of the size of sqrt(eps) show where eps is added
    sizes = torch.tensor([1.0, 100.0, eps**0.5])[:, None]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, len(weight), generator=generator) * sizes).to(weight)
    # two roundings, and those of some operations in fp32
    close = 2 * max(torch.finfo(weight.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    for form in (Form(eps), Form(eps, offset=1.0)):
        exact_weight = weight.double() + form.offset
        exact = F.rms_norm(x.double(), weight.shape, exact_weight, eps)
        if agrees(module, lambda _, exact=exact: exact, x, tolerance=close):
            return form
    return None
