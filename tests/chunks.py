"""Helpers for tests of the logits that the loss materializes: at most one chunk."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.fast.head import LazyLogits
from qlora.ops import loss
from qlora.ops.lora import by_onednn


def is_lazy(logits: Any) -> bool:
    """Whether no operation has materialized these logits."""
    return isinstance(logits, LazyLogits) and logits.value is None


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        by_onednn(torch.ones(1))  # tried once, on products of a fixed size
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.seen += [tensor.numel() for tensor in tensors if not tensor.is_meta]
        return result


def chunks_of(logits: int, itemsize: int = 4) -> Any:
    """A context in which the loss computes this many logits at a time."""
    size = logits * itemsize
    return patch.multiple(loss, CHUNK_BYTES={"cpu": size}, GPU_CHUNK_BYTES=size)
