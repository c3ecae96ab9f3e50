"""Whether a fast version of a function computes what the plain one does: the one check.

Every fast version of this package has a plain equivalent. Before a fast version is used, it runs
once on a few values, next to the plain one. Callers cache the answer, by device and dtype for
instance; where it is no, they fall back to the plain version, and the numbers are the same.

    |fast(x) - plain(x)| / |plain(x)|  <=  tolerance          2-norms over all values, in fp64

A relative norm, since roundings of single values that are near zero say nothing.
"""

import logging
import math
from collections.abc import Callable, Sequence
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
