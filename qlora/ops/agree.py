"""Whether a fast version of a function computes what the plain one does: the one check.

Every fast version has a plain equivalent. Before it is used it runs once on a few values, beside
the plain one. Callers cache the answer, by device and dtype for instance, and fall back to the
plain version if it is no, so that the numbers are the same either way.

    |fast(x) - plain(x)| / |plain(x)|  <=  tolerance          2-norms over all values, in fp64
"""

import logging
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Tensors = Tensor | Sequence[Tensor]


@torch.no_grad()
def agrees(
    fast: Callable[..., Tensors],
    plain: Callable[..., Tensors],
    *inputs: Any,
    tolerance: float,
    what: str | None = None,
) -> bool:
    """Whether `fast` gives what `plain` gives for `inputs`, each a tensor or several.

    Args:
        tolerance: the largest relative error; 0 for equal values.
        what: names the fast version, if it is expected to agree: where it differs, or raises (a
            compiler or a driver that does not work here), that is logged. Without it the question
            is open, as for a module of unknown kind: nothing is logged, and errors are raised.
    """
    expected = plain(*inputs)
    try:
        error = relative_error(fast(*inputs), expected)
    except Exception as failure:  # compilers and drivers raise many kinds
        if what is None:
            raise
        reason = f"{type(failure).__name__}: {failure}"
    else:
        if error <= tolerance:
            return True
        reason = f"its values are off by {error:.2g}, tolerance is {tolerance:.2g}"
    if what is not None:
        logging.getLogger(__name__).warning("%s is not used: %s", what, reason)
    return False


def relative_error(values: Tensors, expected: Tensors) -> float:
    """|values - expected| / |expected|, of several tensors the largest; inf if shapes differ."""
    first, second = ([x] if isinstance(x, Tensor) else list(x) for x in (values, expected))
    if [x.shape for x in first] != [x.shape for x in second]:
        return math.inf
    errors = []
    for value, exact in zip(first, second, strict=True):
        size = float(exact.double().norm())
        distance = float((value.double() - exact.double()).norm())
        error = 0.0 if distance == 0 else distance / size if size else math.inf
        errors.append(math.inf if math.isnan(error) else error)
    return max(errors, default=0.0)


def may_use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it is worth trying one of qlora.ops.kernels over such tensors.

    Triton may be missing (Windows, macOS); where it is installed, it may have no C compiler to
    build its launchers with, or not know the card: `agrees` finds that out.
    """
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return device.type == "cuda" and known and find_spec("triton") is not None
