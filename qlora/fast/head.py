"""An output head whose logits are made when somebody looks at them: the loss needs none.

    model(input_ids=..., labels=...).loss

is what the model's own forward computes of logits: it takes them from its head, may scale and bound
them, and asks transformers for the loss. `LanguageHead`, in front of the head, gives it LazyLogits
(qlora.fast.head), of which the loss comes without them. Nothing of the model is replaced, nothing
is asked of its class or its config, and what it adds to the loss (the router loss of experts) is
added as ever.

A head that is trained, adapted, quantized or watched by hooks makes its logits at once; so do
torch.compile, inference_mode, and few tokens: up to a chunk of qlora.ops.loss there is nothing to
save, and generation wants the logits of one.

Logits that are made when somebody looks at them, and give their cross-entropy without.

A tensor of torch's protocol for such (__torch_function__). It knows shape, dtype and device, notes
what is done to it, as far as the loss knows how to do that too, and hands `cross_entropy` over to
qlora.ops.loss:

    logits = head(x)                          W x + b
    logits / c, tanh, * c                     Gemma; * c alone Cohere, Falcon-H1; / c Granite
    .float(), .view, .reshape, .flatten, .contiguous, [..., :-1, :]        what losses do
    cross_entropy(logits, labels)             sum or mean, with label_smoothing and ignore_index

Whatever else is asked of it makes the logits, once, by the very operations that were noted, and
goes on with these: generation, accuracy, distillation, another loss give what they always give, bit
for bit. Only a gradient *in* the logits is not to be had of a loss that was computed without them:
autograd says that they were not used.

Left out: a loss for each token, class weights, logits times a tensor. They make the logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from qlora.adapters.wrappers import Wrapper, put_module
from qlora.base.modules import is_quantized, is_watched, output_head, product_dtype, vocabulary
from qlora.ops.loss import chunk_rows, linear_cross_entropy


class LanguageHead(Wrapper):
    """A frozen linear layer that makes logits of hidden states, lazily where that pays."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab)."""
        layer = self.base_layer
        if torch.compiler.is_compiling() or not (is_untouched(layer) and _pays(hidden, layer)):
            logits: Tensor = layer(hidden)
            return logits
        return lazy_logits(hidden, layer.weight, layer.bias)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """The head's: transformers puts a weight there that is tied to the embedding's."""
        self.base_layer.register_parameter(name, param)


def put_language_head(model: nn.Module) -> None:
    """A LanguageHead in front of the output head of `model`, in place; or a line on the terminal
    where there is a head for which it can do nothing."""
    name, head = vocabulary(model)[1], output_head(model)
    if name is None or isinstance(head, LanguageHead):
        return
    if is_untouched(head):
        put_module(model, name, LanguageHead(head).train(head.training))
        return
    what = "quantized" if is_quantized(head) else "trained, adapted or no plain linear layer"
    print(f"the loss is computed from all logits: the output head, {name}, is {what}")


def is_untouched(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear layer that nobody trains or watches."""
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return type(layer) is nn.Linear and not is_watched(layer) and not trained


def _pays(hidden: Tensor, layer: nn.Linear) -> bool:
    """Whether there is more than a chunk of logits, of which there may be a loss."""
    return (
        type(hidden) is Tensor
        and product_dtype(hidden) == product_dtype(layer.weight)
        and hidden.shape[:-1].numel() > chunk_rows(layer.weight)
        and not torch.is_inference_mode_enabled()
    )


def lazy_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> "LazyLogits":
    """Logits (..., vocab) of hidden states (..., dim) and a frozen head (vocab, dim), (vocab,)."""
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
    shape, dtype = (*hidden.shape[:-1], len(weight)), product_dtype(hidden)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    product = partial(_product, weight, bias, dtype)
    recipe = _Recipe(weight, bias, dtype, hidden, (product,), hidden)
    return _lazy(torch.empty(shape, dtype=dtype, device="meta"), recipe)


def _product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    """What a linear layer computes where product_dtype is `dtype`."""
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), weight.to(dtype), bias)


@dataclass(frozen=True)
class _Recipe:
    """How logits are made, and what that is: c tanh(a (W x + b)), or a (W x + b), of each x."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    """of the product"""
    hidden: Tensor
    steps: tuple[Callable[[Tensor], Tensor], ...]
    """that make logits of it"""
    rows: Tensor
    """x, (..., dim), a view of `hidden` or of some of it"""
    a: float = 1.0
    c: float | None = None

    def make(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        for step in self.steps:
            hidden = step(hidden)
        return hidden

    def loss(self, target: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
        """The sum over tokens."""
        return linear_cross_entropy(
            self.rows,
            self.weight.to(self.dtype),
            target,
            bias=None if self.bias is None else self.bias.to(self.dtype),
            scale=self.a if self.c is None else self.a * self.c,
            softcap=self.c,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )


class LazyLogits(Tensor):
    """Logits (..., vocab) that know their shape, dtype, device, and how to be made.

    What torch is asked to do with them and is not among the tables below is done with the one
    tensor that `made` returns.
    """

    _recipe: _Recipe
    _like: Tensor
    """of the same shape, dtype and strides, and no memory: what torch would make of them it says"""
    _source: "LazyLogits | None"
    """what they are a view of, by the last step"""
    _with_gradient: bool
    _made: Tensor | None

    def made(self) -> Tensor:
        """The logits as any tensor, made at the first call, part of the graph that they would be
        part of."""
        if self._made is None:
            with torch.inference_mode(False), torch.set_grad_enabled(self._with_gradient):
                if self._source is None:
                    made = self._recipe.make(self._recipe.hidden)
                else:
                    made = self._recipe.steps[-1](self._source.made())
            if self.requires_grad and not made.requires_grad:
                # a function of autograd had them made without a graph, and gave them one of its own
                with torch.inference_mode(False), torch.enable_grad():
                    made = _Made.apply(self)  # type: ignore[no-untyped-call]
            self._made = made
        return self._made

    def _is_current(self) -> bool:
        """Whether their recipe has the graph that they are part of, and may be added to."""
        return (
            self.requires_grad == self._recipe.hidden.requires_grad
            and not torch.is_inference_mode_enabled()
            and not torch.compiler.is_compiling()
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, lazy = kwargs or {}, args[0] if args else None
        if isinstance(lazy, LazyLogits) and lazy._made is None:
            if func in KNOWN:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in ANSWERS and lazy._is_current():
                answer = ANSWERS[func](lazy, *args[1:], **kwargs)
                if answer is not None:
                    return answer
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it so
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The same for what comes from C++, below autograd: _Promise has the gradient."""
        if func._schema.is_mutable:
            raise RuntimeError(f"logits that are not made yet cannot be changed by {func}")
        values = tree_map_only(LazyLogits, _value, (args, kwargs or {}))
        return func(*values[0], **values[1])


def _lazy(like: Tensor, recipe: _Recipe, source: LazyLogits | None = None) -> LazyLogits:
    """`source` is there if they are a view of it."""
    made: LazyLogits = _Promise.apply(recipe.hidden, like, recipe)  # type: ignore[no-untyped-call]
    made._recipe, made._like, made._source, made._made = recipe, like, source, None
    made._with_gradient = torch.is_grad_enabled()
    return made


def _value(logits: LazyLogits) -> Tensor:
    if logits._made is not None:
        return logits._made.detach()
    return logits._recipe.make(logits._recipe.hidden.detach())


class _Promise(torch.autograd.Function):
    """Hidden states to logits that are not made yet, whose gradient is that of those that will."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, like: Tensor, recipe: _Recipe) -> LazyLogits:
        ctx.recipe = recipe
        made: LazyLogits = Tensor._make_wrapper_subclass(
            LazyLogits, like.shape, dtype=like.dtype, device=hidden.device
        )
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            hidden = ctx.recipe.hidden.detach().requires_grad_()
            logits = ctx.recipe.make(hidden)
        return torch.autograd.grad(logits, hidden, gradient)[0], None, None


class _Made(torch.autograd.Function):
    """Logits that are not made yet to those that are, by the graph that the former are part of."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        return _value(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


# ---- what they answer without being made: a function of torch -> what it gives, or None ----


def _cross_entropy(
    logits: LazyLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """torch's, whose arguments these are, of logits (tokens, vocab) and labels (tokens,)."""
    plain = (weight, size_average, reduce) == (None, None, None) and reduction in ("mean", "sum")
    ids = isinstance(target, Tensor) and target.dtype == torch.int64
    if not (plain and ids and target.shape == logits.shape[:-1] and target.ndim == 1):
        return None
    if target.device != logits.device:
        return None
    loss = logits._recipe.loss(target, label_smoothing, ignore_index)
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum()
    dtype = logits.dtype
    if torch.is_autocast_enabled(target.device.type):  # which has losses in fp32
        dtype = torch.promote_types(dtype, torch.float32)
    return loss.to(dtype)


def _noted(logits: LazyLogits, func: Any, args: Any, kwargs: Any, **change: Any) -> Tensor | None:
    """The logits after `func`, which changes the recipe so; or None if that is for made ones."""
    like = func(logits._like, *args, **kwargs)
    if like is logits._like:
        return logits
    recipe, vocab = logits._recipe, logits._like.shape[-1]
    if like.shape[-1:] != (vocab,) or like.dtype not in (logits.dtype, torch.float32):
        return None
    step = partial(_call, func, args, kwargs)
    rows = change.pop("rows", recipe.rows).reshape(*like.shape[:-1], -1)
    recipe = replace(recipe, steps=(*recipe.steps, step), rows=rows, **change)
    return _lazy(like, recipe, logits if like._is_view() else None)


def _call(func: Any, args: Any, kwargs: Any, x: Tensor) -> Tensor:
    made: Tensor = func(x, *args, **kwargs)
    return made


def _scaled(func: Any, power: int, logits: LazyLogits, *args: Any, **kwargs: Any) -> Tensor | None:
    """Times a number, or its inverse."""
    if len(args) != 1 or kwargs or not isinstance(args[0], int | float):
        return None
    if args[0] == 0 or not math.isfinite(args[0]):
        return None
    factor, recipe = args[0] ** power, logits._recipe
    if recipe.c is None:
        return _noted(logits, func, args, kwargs, a=recipe.a * factor)
    return _noted(logits, func, args, kwargs, c=recipe.c * factor)


def _bounded(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Tensor | None:
    """tanh, once."""
    if args or kwargs or logits._recipe.c is not None:
        return None
    return _noted(logits, func, args, kwargs, c=1.0)


def _shaped(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Tensor | None:
    """Rows in another order of dimensions, or all in another dtype."""
    sizes = [size for arg in args for size in (arg if isinstance(arg, tuple | list) else (arg,))]
    if kwargs or not all(isinstance(size, int | torch.dtype) for size in sizes):
        return None
    return _noted(logits, func, args, kwargs)


def _sliced(func: Any, logits: LazyLogits, key: Any) -> Tensor | None:
    """Some of the rows, whole."""
    keys = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(k, int | slice | EllipsisType) and not isinstance(k, bool) for k in keys):
        return None
    reaches_vocab = Ellipsis in keys or len(keys) >= logits.ndim
    if reaches_vocab and keys[-1] != slice(None):
        return None
    return _noted(logits, func, (key,), {}, rows=logits._recipe.rows[key])


KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "layout", "ndim", "shape")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "requires_grad")),
    *(Tensor.dim, Tensor.is_floating_point, Tensor.numel, Tensor.size),
}
"""what they know of themselves"""

ANSWERS: dict[Any, Callable[..., Tensor | None]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.__getitem__: partial(_sliced, Tensor.__getitem__),
    **{f: partial(_scaled, f, 1) for f in (Tensor.mul, torch.mul)},
    **{f: partial(_scaled, f, -1) for f in (Tensor.div, torch.div)},
    **{f: partial(_bounded, f) for f in (Tensor.tanh, torch.tanh)},
    **{f: partial(_shaped, f) for f in (Tensor.contiguous, Tensor.flatten, Tensor.float)},
    **{f: partial(_shaped, f) for f in (Tensor.reshape, Tensor.to, Tensor.view)},
}
