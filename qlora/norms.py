"""RMSNorm by torch's own kernel, in front of a frozen norm of the model.

    y = x / sqrt(mean(x^2) + eps) * w                              arXiv:1910.07467

Models write it out, in fp32: six kernels, of which autograd keeps x as fp32, twice the bytes of a
16-bit x; and y is rounded twice, before w and after. torch.nn.functional.rms_norm on a GPU is one
kernel, keeps x as it is and a number a row, and rounds once.

A norm is known by its structure, and by what it computes of a few random rows: so no class of a
model is named. On a CPU torch has no such kernel (there rms_norm is as slow, and keeps as much, as
what models do), and norms stay as they are. Left out: Gemma's (1 + w), which the kernel would want
in 16 bits, where it loses digits; a norm that is trained.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter_module import Wrapper, base_modules, put_module
from qlora.frozen import is_watched

HAS_KERNEL = ("cuda",)
EPS = ("variance_epsilon", "eps", "epsilon")  # as models call it


class RMSNorm(Wrapper):
    """A frozen RMSNorm of a model, computed by torch's."""

    def __init__(self, base_layer: nn.Module, eps: float) -> None:
        super().__init__(base_layer)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        norm = self.base_layer
        # a wrapper below is an adapter's, that has a weight of its own
        if isinstance(norm, Wrapper) or norm.weight.requires_grad or norm.weight.dtype != x.dtype:
            y: Tensor = norm(x)
            return y
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, norm.weight.shape, norm.weight, self.eps)


def put_norms(model: nn.Module) -> None:
    """An RMSNorm in front of each frozen norm of `model` that is one, where torch has a kernel."""
    for name, module in base_modules(model).items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.device.type in HAS_KERNEL:
            eps = rms_norm_eps(module)
            if eps is not None:
                put_module(model, name, RMSNorm(module, eps).train(module.training))


@torch.no_grad()
def rms_norm_eps(module: nn.Module) -> float | None:
    """The eps of an RMSNorm that nobody trains, watches or stands in front of; None of any other
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
    wanted = F.rms_norm(x.double(), weight.shape, weight.double(), eps)
    got = module(x).double()
    # two roundings, and those of some operations in fp32
    close = 2 * max(torch.finfo(weight.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    is_one = got.shape == wanted.shape and (got - wanted).norm() <= close * wanted.norm()
    return eps if is_one else None
