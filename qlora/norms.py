"""RMSNorms that keep less for the backward pass, in front of frozen norms of the model.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.adapter_module import Wrapper, base_modules, put_module
from qlora.frozen import is_watched

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
