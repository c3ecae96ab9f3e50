"""A device with host memory, simulated on the CPU, for tests of offloading."""

import weakref
from typing import Any

import torch
from torch import Tensor


class LateCopies:
    """In place of qlora.fast.offload.CudaCopies: copies in order, only in `finish`, until when the
    target holds NaN. `log` has the first value of each copy at its start and its end."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.log: list[str] = []
        self.allocated: list[int] = []
        self.waiting: list[Any] = []
        self.sources: list[Tensor] = []

    def allocate(self, size: int) -> Tensor:
        self.allocated.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def start(self, target: Tensor, source: Tensor) -> Any:
        self.log.append(f"start {float(source.flatten()[0]):g}")
        self.sources.append(source.clone())
        target.fill_(torch.nan)
        # weak: releasing a tensor during its copy is a bug
        self.waiting.append((weakref.ref(target), weakref.ref(source)))
        return self.waiting[-1]

    def finish(self, started: Any) -> None:
        while any(started is copy for copy in self.waiting):
            target, source = (tensor() for tensor in self.waiting.pop(0))
            assert target is not None and source is not None, "released while it was copied"
            target.data.copy_(source)
            self.log.append(f"end {float(source.flatten()[0]):g}")
