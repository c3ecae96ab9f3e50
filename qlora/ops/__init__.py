"""Pure tensor functions and Triton kernels: no model, no module tree.

- `nf4`: the 4-bit codec, and its decoding inside a forward pass
- `lora`: forward and backward of W x + scaling * B A x, and of a gated MLP of such layers
- `gated`: the elementwise part of a gated MLP, act(gate) * up
- `rotary`: rotary position embedding of queries and keys
- `loss`: cross-entropy from hidden states, without logits
- `kernels`: the Triton kernels; imported only where one is used

Every fast version of a function has a plain equivalent. `agrees` is the one check of the two:

    |fast(x) - plain(x)| / |plain(x)|  <=  tolerance          2-norms over all values, in fp64

Callers check a fast version once, on a few values, and use the plain one where the two differ.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    log_as: str | None = None,
) -> bool:
    """Whether `fast(*inputs)` is within `tolerance` of `plain(*inputs)`: one tensor or several.

    A `tolerance` of 0 asks for equal values. `log_as` names a version that is expected to agree: a
    difference or an exception (of a compiler or driver) is logged. Without it exceptions propagate.
    """
    expected = plain(*inputs)
    try:
        error = relative_error(fast(*inputs), expected)
        reason = f"its values are off by {error:.2g}, tolerance is {tolerance:.2g}"
    except Exception as failure:  # compilers and drivers raise many kinds
        if log_as is None:
            raise
        error, reason = math.inf, f"{type(failure).__name__}: {failure}"
    if error > tolerance and log_as is not None:
        logging.getLogger(__name__).warning("%s is not used: %s", log_as, reason)
    return error <= tolerance


def relative_error(values: Tensors, expected: Tensors) -> float:
    """|values - expected| / |expected|, the largest of several tensors; inf if shapes differ."""
    got, wanted = ([x] if isinstance(x, Tensor) else list(x) for x in (values, expected))
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return math.inf
    errors = [0.0]
    for value, exact in zip(got, wanted, strict=True):
        distance, size = (value.double() - exact.double()).norm(), exact.double().norm()
        if distance != 0:
            errors.append(float((distance / size).nan_to_num(nan=math.inf, posinf=math.inf)))
    return max(errors)


_meta_stands_for = torch.device("meta")


@contextmanager
def meta_as_cpu() -> Iterator[None]:
    """Within the block, meta tensors take the steps that a CPU's take, not a GPU's."""
    global _meta_stands_for
    before, _meta_stands_for = _meta_stands_for, torch.device("cpu")
    try:
        yield
    finally:
        _meta_stands_for = before


def computing_device(device: torch.device) -> torch.device:
    """The device whose functions are chosen for tensors on `device`. Of meta tensors sizes alone
    matter (qlora.plan): they count as a GPU's, and as the CPU's within `meta_as_cpu`."""
    return _meta_stands_for if device.type == "meta" else device


def is_gpu(device: torch.device) -> bool:
    """Whether a step on `device` is computed as on a GPU: also on meta tensors."""
    return computing_device(device).type in ("cuda", "meta")


def may_use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to try qlora.ops.kernels on such tensors; Triton is missing on Windows and macOS."""
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return device.type == "cuda" and known and find_spec("triton") is not None
