"""x W' in the fastest of the ways that torch has on board.

On a CPU torch gives fp32 products to MKL, which keeps its AVX-512 code to Intel's chips: on two
cores of an AMD EPYC it does 186 GFLOP/s. oneDNN, which comes with torch too, and which torch uses
for bf16, does 400 there, in the same precision (benchmarks/products.py). It is reached by the
operator that torch's compiler puts in the place of a linear layer.

Plain twin: torch.nn.functional.linear, which computes everything else, and this too with
torch.backends.mkldnn.enabled = False.
"""

from functools import cache

import torch
from torch import Tensor


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x W' + bias (..., out), which is no view, so that anybody may add to it in place.

    It has no gradient: this is for autograd functions, which make their own.

    Args:
        x: (..., in).
        weight: (out, in), in x's dtype.
        bias: (out,), in x's dtype.
        out: (..., out), contiguous, where the result is to lie.
    """
    flat, shape = x.reshape(-1, x.shape[-1]), [*x.shape[:-1], len(weight)]
    if by_onednn(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
        if out is not None:
            return out.copy_(y.view(shape))
        y = torch.ops.aten._unsafe_view(y, shape)  # a view that autograd does not take for one
        return y
    if out is None:
        out = x.new_empty(shape)
    rows = out.view(-1, len(weight))
    if bias is None:
        torch.mm(flat, weight.T, out=rows)
    else:
        torch.addmm(bias, flat, weight.T, out=rows)
    return out


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total (n, out) += x W', of x (n, in) and weight (out, in)."""
    if by_onednn(x):
        return total.add_(linear(x, weight))
    return total.addmm_(x, weight.T)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """x' y (p, q), of x (n, p) and y (n, q)."""
    if not by_onednn(x):
        return x.T @ y
    if x.shape[1] > y.shape[1]:  # a tenth as fast this way round, where y is narrow
        return inner(y, x).T.contiguous()
    return linear(x.T, y.T)


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN is what computes products of this tensor."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_onednn()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
