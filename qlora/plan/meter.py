"""The memory of tensors on the meta device, by kind, while code runs on them.

A storage counts from the operator that allocates it until it is freed. `Meter` sees each operator;
its `kind` names what is allocated next, and `retag` renames what is kept. A part of a step is a
`Segment`: the bytes of each kind at its start, at its peak and at its end. Not counted: kernels'
own memory, the CUDA context, rounding and fragmentation of the allocator.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.plan.work import Work, work_of

# torch gives each thread a handle of cuBLAS with a workspace: 32 MiB on Hopper, 8 on other cards
WORKSPACE = 32 << 20
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
WORKSPACES = "cuBLAS workspaces"
Bytes = Counter[str]  # by kind


@dataclass
class Segment:
    """A part of a step."""

    name: str
    start: Bytes
    peak: Bytes = field(default_factory=Counter)
    end: Bytes = field(default_factory=Counter)
    work: Work = field(default_factory=Counter)

    @property
    def rise(self) -> Bytes:
        """The peak's bytes above those at the start, of each kind: may be negative."""
        return difference(self.peak, self.start)

    @property
    def change(self) -> Bytes:
        """What the segment leaves behind, minus what it frees."""
        return difference(self.end, self.start)


def difference(one: Bytes, other: Bytes) -> Bytes:
    """one - other, of each kind: Counter's own `-` drops what is not positive."""
    return Counter({kind: one[kind] - other[kind] for kind in {*one, *other}})


class Meter(TorchDispatchMode):
    """Bytes of all storages on one device that operators allocate, while they are alive."""

    def __init__(self, kind: str, *, workspace: int = WORKSPACE, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind, self.workspace, self.device = kind, workspace, device
        self.now: Bytes = Counter()
        self.segments: list[Segment] = []
        self.without = 0  # values of the logits, if these have a shape only
        self.is_host = False  # whether what is allocated is in host memory
        self._total = self._peak = 0
        self._threads: set[int] = set()  # those that have a workspace
        self._live: dict[int, tuple[str, int, int]] = {}  # kind, bytes, index of the segment

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._schema.name in PRODUCTS and threading.get_ident() not in self._threads:
            self._threads.add(threading.get_ident())
            self._add(WORKSPACES, self.workspace)
        self.add_work(work_of(func, args, made))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._note(tensor)
        return made

    def add_work(self, work: Work) -> None:
        """Of this segment."""
        if self.segments:
            self.segments[-1].work.update(work)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        is_left_out = self.is_host or tensor.numel() == self.without
        size = 0 if is_left_out else storage.nbytes()
        self._live[key] = self.kind, size, len(self.segments)
        self._add(self.kind, size)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        kind, size, _ = self._live.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self._total += size
        if self._total > self._peak and self.segments:
            self._peak, self.segments[-1].peak = self._total, self.now.copy()

    def begin(self, name: str, kind: str) -> None:
        """End the segment before this one; what is allocated from now on is of `kind`."""
        if self.segments:
            self.segments[-1].end = self.now.copy()
        self.kind, self._peak = kind, self._total
        self.segments.append(Segment(name, self.now.copy(), self.now.copy()))

    def retag(self, kind: str, tensors: Iterable[Tensor] | None = None) -> None:
        """Rename what the given tensors hold, by default what this segment allocated."""
        if tensors is None:
            keys = [key for key, (*_, i) in self._live.items() if i == len(self.segments)]
        else:
            keys = [tensor.untyped_storage()._cdata for tensor in tensors]
        for key in keys:
            if key in self._live:
                before, size, index = self._live[key]
                self._live[key] = kind, size, index
                self.now[before] -= size
                self.now[kind] += size
