"""An output head whose logits are computed on first use: the loss is computed without them.

`LanguageHead` wraps a model's frozen output head and returns LazyLogits: a tensor with the logits'
shape, dtype and device that records what the model and transformers' losses do to it:

    logits = head(x)                          W x + b
    logits / c, tanh, * c                     Gemma; * c alone Cohere, Falcon-H1; / c Granite
    .float(), .to, .view, .reshape, .flatten, .contiguous, [..., :-1, :]
    cross_entropy(logits, labels)             sum or mean, with label_smoothing and ignore_index

The cross-entropy is that of qlora.ops.loss. Every other operation materializes the logits, once, by
the recorded operations, equal bit for bit. No class or config of a model is read, and a model's
other losses (the router loss of experts) are added as before. Only the gradient *in* logits whose
loss was computed without them does not exist: autograd raises that they were not used.

Logits are computed at once by a head that is quantized or has hooks; in training by one that is
trained or adapted; under torch.compile and inference_mode; and for few tokens, up to a chunk of
qlora.ops.loss. Left out: a loss per token, class weights, logits times a tensor.
"""

import math
from collections.abc import Callable
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from qlora.adapters.wrappers import Wrapper, adapter_modules, plain, put_module, wrappers
from qlora.base.modules import (
    has_hooks,
    is_quantized,
    output_head,
    product_dtype,
    shallow_copy,
    vocabulary,
)
from qlora.ops import is_gpu
from qlora.ops.loss import Head, chunk_rows, head_cross_entropy, linear_cross_entropy
from qlora.ops.nf4 import free_scratch


def put_language_head(model: nn.Module) -> None:
    """Wrap the output head of `model` in a LanguageHead, in place; print a line if training will
    compute all logits."""
    name, head = vocabulary(model)[1], output_head(model)
    if name is None or isinstance(head, LanguageHead):
        return
    is_plain = type(plain(head)) is nn.Linear
    if is_plain:
        put_module(model, name, LanguageHead(head).train(head.training))
    if not is_plain or is_trained(head):
        kind = "quantized" if is_quantized(head) else "trained, adapted or no plain linear layer"
        print(f"the loss is computed from all logits: the output head, {name}, is {kind}")


class LanguageHead(Wrapper):
    """A linear layer from hidden states to logits, with or without adapters, lazy where that saves
    memory: a frozen one always, another without gradients."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab)."""
        layer = self.base_layer
        if (
            not torch.compiler.is_compiling()
            and not torch.is_inference_mode_enabled()
            and type(hidden) is Tensor
            and product_dtype(hidden) == product_dtype(layer.weight)
            and hidden.shape[:-1].numel() > chunk_rows(layer.weight)
            and not any(map(has_hooks, (*wrappers(layer), plain(layer))))
        ):
            if type(layer) is nn.Linear and not is_trained(layer):
                return lazy_logits(hidden, layer.weight, layer.bias)
            mixed = any(module.adapter_of_row for module in adapter_modules(layer))
            if not torch.is_grad_enabled() and hidden.dtype == layer.weight.dtype and not mixed:
                return _lazy_logits_of(snapshot(layer), hidden)
        return layer(hidden)  # type: ignore[no-any-return]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """On the wrapped head: transformers registers a weight tied to the embedding's this way."""
        self.base_layer.register_parameter(name, param)


def is_trained(layer: nn.Module) -> bool:
    """Whether a parameter of the layer, or of an adapter on it, requires a gradient."""
    return any(parameter.requires_grad for parameter in layer.parameters())


def snapshot(layer: nn.Module) -> nn.Module:
    """The layer with its adapters as they are active now: the same parameters, other modules."""
    copy = shallow_copy(layer)
    if isinstance(copy, Wrapper):
        copy.base_layer = snapshot(copy.base_layer)
    return copy


def lazy_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> "LazyLogits":
    """Logits (..., vocab) of hidden states (..., dim) and a frozen head (vocab, dim), (vocab,)."""
    dtype = product_dtype(hidden)
    weight, bias = weight.detach(), None if bias is None else bias.detach().to(dtype)

    def product(x: Tensor) -> Tensor:
        return F.linear(x.to(dtype), weight.to(dtype), bias)

    return _lazy(hidden, product, len(weight), dtype, (weight, bias))


def _lazy_logits_of(layer: nn.Module, hidden: Tensor) -> "LazyLogits":
    """The same of any layer that computes row by row; without gradients."""
    few = layer(hidden.flatten(0, -2)[:1])  # a copied head may have more rows than the base's
    return _lazy(hidden, layer, few.shape[-1], few.dtype, None)


def _lazy(
    hidden: Tensor,
    product: Callable[[Tensor], Tensor],
    vocab: int,
    dtype: torch.dtype,
    frozen: tuple[Tensor, Tensor | None] | None,
) -> "LazyLogits":
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
    like = torch.empty((*hidden.shape[:-1], vocab), dtype=dtype, device="meta")
    recipe = _Recipe(product, frozen, dtype, hidden, rows=hidden)
    return _Lazy.apply(hidden, like, recipe, None)  # type: ignore[no-any-return, no-untyped-call]


class _Recipe(NamedTuple):
    """How to compute logits: c tanh(a (W x + b)) for each x, without a softcap a (W x + b)."""

    product: Callable[[Tensor], Tensor]  # x -> W x + b
    frozen: tuple[Tensor, Tensor | None] | None  # W and b, of a head that is a plain linear layer
    dtype: torch.dtype  # of the product
    hidden: Tensor  # the head's input
    rows: Tensor  # x (..., dim) of the logits that slices have left: a view of `hidden`
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()  # after the product
    a: float = 1.0
    c: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of `hidden`, by the recorded operations."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.product(hidden)
        for step in self.steps:
            logits = step(logits)
        return logits

    def head(self) -> Head:
        """From rows x to their logits."""
        return Head(self.product, self.a if self.c is None else self.a * self.c, self.c)


def rows_and_head(logits: Tensor) -> tuple[Tensor, Head]:
    """x (..., dim) of logits (..., vocab), and the head that computes them from x; of logits that
    exist already, themselves and a head that returns a copy."""
    if isinstance(logits, LazyLogits) and logits.value is None:
        return logits._recipe.rows, logits._recipe.head()
    return torch.as_tensor(logits), Head(torch.clone)


class LazyLogits(Tensor):
    """Logits (..., vocab) without memory, until an operation materializes them."""

    _recipe: _Recipe
    _like: Tensor  # on the meta device, with the logits' shape, dtype and strides
    _source: "LazyLogits | None"  # of which the last step is a view
    value: Tensor | None  # the logits, once materialized

    def materialize(self) -> Tensor:
        """The logits as a plain tensor with a graph to `hidden`; only the first call computes."""
        if self.value is None:
            with torch.inference_mode(False), torch.set_grad_enabled(self.requires_grad):
                if self._source is None:
                    value = self._recipe.logits(self._recipe.hidden)
                else:
                    value = self._recipe.steps[-1](self._source.materialize())
                if self.requires_grad and not value.requires_grad:
                    # re-entrant checkpointing: recorded without a graph, used with one
                    with torch._C.DisableTorchFunctionSubclass():
                        value = self.clone()
            self.value = value
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, lazy = kwargs or {}, args[0] if args else None
        if isinstance(lazy, LazyLogits) and lazy.value is None:
            if func in METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            modes = torch.is_inference_mode_enabled(), torch.compiler.is_compiling()
            # they differ after re-entrant checkpointing, whose graph is not the recipe's
            if lazy.requires_grad == lazy._recipe.hidden.requires_grad and not any(modes):
                result = _without_logits(lazy, func, *args[1:], **kwargs)
                if result is not None:
                    return result
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For operations called from C++, below autograd; _Lazy computes the gradient."""
        if func._schema.is_mutable:
            raise RuntimeError(f"logits that are not materialized cannot be changed by {func}")
        args, kwargs = tree_map_only(LazyLogits, _detached_value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _detached_value(logits: LazyLogits) -> Tensor:
    if logits.value is not None:
        return logits.value.detach()
    return logits._recipe.logits(logits._recipe.hidden.detach())


class _Lazy(torch.autograd.Function):
    """Hidden states to lazy logits; the backward pass is that of the logits themselves."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, like: Tensor, recipe: _Recipe, source: Any) -> Any:
        kind: Any = {"dtype": like.dtype, "device": hidden.device}
        lazy: Any = Tensor._make_wrapper_subclass(LazyLogits, like.shape, **kind)
        lazy._recipe, lazy._like, lazy._source, lazy.value = recipe, like, source, None
        ctx.recipe = recipe
        return lazy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            hidden = ctx.recipe.hidden.detach().requires_grad_()
            logits = ctx.recipe.logits(hidden)
        return torch.autograd.grad(logits, hidden, gradient)[0], None, None, None


# ---- operations that do not materialize the logits

PROPERTIES = ("device", "dtype", "layout", "ndim", "shape", "is_cuda", "requires_grad")
METADATA = {getattr(Tensor, name).__get__ for name in PROPERTIES}
METADATA |= {Tensor.dim, Tensor.is_floating_point, Tensor.numel, Tensor.size}
SCALES = {Tensor.mul: 1, torch.mul: 1, Tensor.div: -1, torch.div: -1}  # the number's exponent
SHAPES = {Tensor.contiguous, Tensor.flatten, Tensor.float, Tensor.reshape, Tensor.to, Tensor.view}


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
    """F.cross_entropy of logits (tokens, vocab), labels (tokens,); None for other arguments."""
    is_plain = (weight, size_average, reduce) == (None, None, None) and reduction in ("mean", "sum")
    if not (is_plain and isinstance(target, Tensor) and target.dtype == torch.int64):
        return None
    if target.ndim != 1 or target.shape != logits.shape[:-1] or target.device != logits.device:
        return None
    recipe = logits._recipe
    settings: Any = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    head = recipe.head()
    if recipe.frozen is None:
        rows = chunk_rows(recipe.rows.new_empty(logits.shape[-1], 0))
        loss = head_cross_entropy(recipe.rows, head, target, rows=rows, **settings)
    else:
        weight, bias = recipe.frozen
        settings |= {"bias": bias, "softcap": head.softcap, "scale": head.scale}
        if is_gpu(target.device):  # the layers have run, and their backward pass has a thread
            free_scratch()
        loss = linear_cross_entropy(recipe.rows, weight.to(recipe.dtype), target, **settings)
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum()
    dtype = logits.dtype
    if torch.is_autocast_enabled(target.device.type):  # autocast computes losses in fp32
        dtype = torch.promote_types(dtype, torch.float32)
    return loss.to(dtype)


def _without_logits(logits: LazyLogits, func: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """func(logits, ...) without materializing them; None where the loss supports no such step."""
    if func is F.cross_entropy:
        return _cross_entropy(logits, *args, **kwargs)
    recipe, like = logits._recipe, logits._like
    if kwargs:
        return None
    if func in SCALES and len(args) == 1:
        number = args[0]
        if not isinstance(number, int | float) or number == 0 or not math.isfinite(number):
            return None
        factor = number ** SCALES[func]
        if recipe.c is None:
            recipe = recipe._replace(a=recipe.a * factor)
        else:
            recipe = recipe._replace(c=recipe.c * factor)
    elif func in (Tensor.tanh, torch.tanh) and recipe.c is None:
        recipe = recipe._replace(c=1.0)
    elif func is Tensor.__getitem__ and _selects_rows(args[0], like.ndim):
        recipe = recipe._replace(rows=recipe.rows[args[0]])
    elif func not in SHAPES or not all(isinstance(x, int | torch.dtype) for x in tree_leaves(args)):
        return None
    after = func(like, *args)
    if after is like:
        return logits
    if after.shape[-1:] != like.shape[-1:] or after.dtype not in (like.dtype, torch.float32):
        return None
    rows = recipe.rows.reshape(*after.shape[:-1], -1)  # (..., dim)
    recipe = recipe._replace(rows=rows, steps=(*recipe.steps, lambda x: func(x, *args)))
    source = logits if after._is_view() else None
    return _Lazy.apply(recipe.hidden, after, recipe, source)  # type: ignore[no-any-return, no-untyped-call]


def _selects_rows(key: Any, ndim: int) -> bool:
    """Whether indexing with `key` selects rows, each with all of its logits."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, bool) or not isinstance(k, int | slice | EllipsisType) for k in keys):
        return False
    reaches_vocab = Ellipsis in keys or len(keys) >= ndim
    return not reaches_vocab or keys[-1] == slice(None)
