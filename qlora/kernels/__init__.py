"""Triton kernels, each with a plain-torch twin that is its oracle and stands in for it.

Nothing here imports Triton until a kernel is wanted: `usable` says whether there is any point.
"""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


@cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run on `device` over tensors of `dtype`: found out by running one, once.

    Triton may be missing (Windows, macOS), have no C compiler to build its launchers with, or not
    know the card. Where it is there and fails, that is said once.
    """
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    if device.type != "cuda" or not known or find_spec("triton") is None:
        return False
    try:
        from qlora.kernels import gated

        one = torch.ones(1, device=device, dtype=dtype)
        gated.forward(one, one, torch.empty_like(one), "silu")
    except Exception as error:  # of compilers and drivers, of many kinds
        logging.getLogger(__name__).warning(
            "Triton's kernels do not run over %s on %s, so slower ways are taken: %s",
            dtype,
            device,
            error,
        )
        return False
    return True


def written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote to them, which it then reports where they were saved."""
    increment_version([t for t in tensors if not t.is_inference()])
