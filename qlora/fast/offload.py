"""Layer inputs that gradient checkpointing keeps, and the frozen embedding, in pinned host memory.

`offload_activations`: checkpointing keeps one tensor (tokens, dim) per layer, 2 GiB in bf16 for
8,192 tokens of Llama-3.1-8B, and grows with the length of rows. Each is copied out while the GPU
computes the next layers, and back while it computes the layer above:

    forward    x_i is saved; after `keep` more, its copy starts; after one more, x_i is released
    backward   x_i is used, and the copy of x_(i-1) starts

By saved-tensor hooks (torch.autograd.graph): a non-re-entrant checkpoint saves its inputs under the
hooks around it, and everything inside under its own. Left on the GPU: leaves and views of them (a
frozen embedding's output is one), and tensors that are small, not contiguous, or without gradient.

All copies run in order on one stream. It waits for the computing stream before each copy, and that
stream waits for a copy before its tensor is used or released: memory is released in the order of
the computation, also while Python is ahead of the GPU. All state is freed with the graph.

Cost: as much host memory, which cannot be swapped out. No time, by arithmetic: a layer of P
parameters computes 2 P FLOP per token and moves 2 dim bytes, so a copy is hidden if P / dim, 53,000
for Llama-3.1-8B, is at least FLOP/s over bytes/s: by data sheet 6,600 on a 4090 (165e12 / 25e9),
20,000 on an H200. Off by default until measured on a GPU. Left out: several GPUs, and tensors
inside checkpoints that keep more than their inputs.

`offload_embedding`: a step reads a few rows of the embedding, which is 0.98 GiB for Llama-3.1-8B.
Pinned memory has an address on the GPU, so the weight becomes a CUDA tensor over it, and the lookup
reads its rows over PCIe: 64 MiB for 8,192 tokens, 3 ms at 25 GB/s. Left out: the output head, as
each chunk of tokens reads all its rows; an embedding that is trained, adapted or tied to it.
"""

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora.adapters.wrappers import AdapterModule
from qlora.base.modules import vocabulary
from qlora.errors import require

WASTED = 10
ALIGNED = 256  # bytes, as torch aligns what it allocates


def require_gpu(setting: str) -> None:
    """Raise a UserError on a machine without a GPU, naming the setting that needs one."""
    message = f"{setting} wants a CUDA GPU, and torch finds none here: leave it out"
    require(torch.cuda.is_available(), message)


class CudaCopies:
    """Copies between a GPU and pinned memory, parallel to the GPU's computation and in order."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)

    def allocate(self, size: int) -> Tensor:
        """Host memory (size,), uint8; pinned, as copies of other memory wait for the GPU."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Start a copy after all computation so far; the result is for `finish`."""
        computing = torch.cuda.current_stream(self.device)  # which owns the memory
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return computing, self.stream.record_event()

    def finish(self, started: Any) -> None:
        """Let the GPU's later computation wait for that copy; Python does not wait."""
        computing, end = started
        computing.wait_event(end)


class offload_activations:  # named as torch's save_on_cpu
    """Keep the inputs of checkpointed layers in host memory between forward and backward pass.

    A context for the forward pass; one for a whole run, because its pinned buffers are reused.
    Values and gradients are equal to the bit. It may be nested. Without gradients it does nothing;
    without gradient checkpointing it moves every tensor that the layers save.

    Args:
        min_bytes: smaller tensors stay, as starting a copy costs more than their memory is worth.
        keep: how many of the newest tensors stay, at least 1; one more is being copied. The last
            layer's input is needed first, and the final norm saves one more.
        copies: by default of the current GPU; tests and benchmarks simulate a device.

    Raises:
        UserError: there is no GPU.
        RuntimeError: in either pass, if a tensor was changed in place after it was saved.
    """

    def __init__(
        self, *, min_bytes: int = 1 << 20, keep: int = 2, copies: CudaCopies | None = None
    ) -> None:
        if copies is None:
            require_gpu("offload_activations")
            copies = CudaCopies()
        self.min_bytes, self.keep, self.copies = min_bytes, keep, copies
        self.buffers = Buffers(copies.allocate)
        self._entered: list[saved_tensors_hooks] = []
        # weak references, as only the graph keeps saved tensors alive; _known is by memory address
        self._known: weakref.WeakValueDictionary[int, Saved] = weakref.WeakValueDictionary()
        self._last: Callable[[], Saved | None] = lambda: None
        self._newest: list[Callable[[], Saved | None]] = []

    def __enter__(self) -> "offload_activations":
        self._entered.append(saved_tensors_hooks(self._pack, self._unpack))
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(*error)

    def _pack(self, tensor: Tensor) -> "Tensor | Saved":
        if not self._may_move(tensor):
            return tensor.detach()  # with its history, the graph would be a reference cycle
        address = tensor.untyped_storage().data_ptr()
        saved = self._known.get(address)
        if saved is None or not saved.is_of(tensor):
            saved = self._known[address] = Saved(tensor, self, self._last)
            self._last = weakref.ref(saved)
        if saved.tensor is not None:
            # release the tensor whose copy was started last time, and start the copy of the next
            held = [older for ref in self._newest if (older := ref()) not in (None, saved)]
            held.append(saved)
            while len(held) > self.keep + 1:
                held.pop(0).release()
            for older in held[: -self.keep]:
                older.move()
            self._newest = [weakref.ref(one) for one in held]
        return saved

    def _unpack(self, saved: "Tensor | Saved") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        tensor = saved.restore()
        previous = saved.before()  # which the backward pass uses next
        while previous is not None and previous.host is None:  # never moved
            previous = previous.before()
        if previous is not None:
            previous.fetch()
        return tensor

    def _may_move(self, tensor: Tensor) -> bool:
        viewed = tensor._base
        return (
            tensor.device == self.copies.device
            and tensor.is_floating_point()
            and tensor.grad_fn is not None
            and (viewed is None or not viewed.is_leaf)
            and tensor.layout == torch.strided
            and tensor.is_contiguous()
            and tensor.nbytes >= self.min_bytes
        )


class Saved:
    """Held by the graph instead of a tensor, whose values are on the GPU, in host memory, or both.
    `before` is a weak reference to the one saved before it."""

    def __init__(self, tensor: Tensor, owner: offload_activations, before: Any) -> None:
        self.copies, self.buffers = owner.copies, owner.buffers
        self.before: Callable[[], Saved | None] = before
        self.tensor: Tensor | None = tensor.detach()
        self.host: Tensor | None = None
        self.started: Any = None
        self._version = tensor._version
        self._storage = weakref.ref(tensor.untyped_storage())
        self._view = _view_of(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the one saved here, and not one at the address of a released one."""
        return self._storage() is tensor.untyped_storage() and self._view == _view_of(tensor)

    def move(self) -> None:
        """Start the copy to host memory, unless it was started."""
        if self.tensor is not None and self.host is None:
            self._finish()
            self._buffer = self.buffers.acquire(self.tensor.nbytes)
            flat = self._buffer[: self.tensor.nbytes].view(self.tensor.dtype)
            self.host = flat.view(self.tensor.shape)
            self.started = self.copies.start(self.host, self.tensor)

    def release(self) -> None:
        """Free the memory on the GPU, after the copy to host memory."""
        if self.host is not None:
            self._finish()
            self.tensor = None

    def fetch(self) -> None:
        """Start the copy back to the GPU, if it is not there."""
        if self.tensor is None and self.host is not None:
            self.tensor = torch.empty_like(self.host, device=self.copies.device)
            self.started = self.copies.start(self.tensor, self.host)
            self._version = self.tensor._version

    def restore(self) -> Tensor:
        """The tensor, also for several backward passes: moved values stay in host memory."""
        self.fetch()
        self._finish()
        tensor: Any = self.tensor
        if self.host is not None:
            self.tensor = None
        return tensor  # type: ignore[no-any-return]

    def _finish(self) -> None:
        """Wait for the copy under way, and check the version, as torch does without hooks."""
        if self.started is not None:
            self.copies.finish(self.started)
            self.started = None
        if self.tensor is not None and self.tensor._version != self._version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                "place after it was saved"
            )

    def __del__(self) -> None:
        """Freed with the graph: no copy may still write to memory that is used again."""
        if self.started is not None:
            self.copies.finish(self.started)
        if self.host is not None:
            self.buffers.release(self._buffer)


def _view_of(tensor: Tensor) -> tuple[Any, ...]:
    """Which part of its storage a contiguous tensor is, and its version."""
    return tensor.storage_offset(), tensor.shape, tensor.dtype, tensor._version


def _pinned(size: int) -> int:
    """What torch pins for `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


class Buffers:
    """Host memory that is allocated once and reused, since pinning is slow. Torch pins powers of
    two: a block has as many buffers as leave at most one part in WASTED of it unused."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self.allocate = allocate
        self.free: list[Tensor] = []  # the smallest first

    def acquire(self, size: int) -> Tensor:
        """At least `size` bytes. New buffers replace free ones that are too small, if any."""
        index = bisect_left(self.free, size, key=len)
        if index < len(self.free):
            return self.free.pop(index)
        size = -(-size // ALIGNED) * ALIGNED
        count = next(
            n for n in range(1, 32) if WASTED * n * size >= (WASTED - 1) * _pinned(n * size)
        )
        del self.free[:count]
        block = self.allocate(_pinned(count * size))
        each = len(block) // count // ALIGNED * ALIGNED
        for buffer in block.split(each)[:count]:
            self.release(buffer)
        return self.acquire(size)

    def release(self, buffer: Tensor) -> None:
        """Keep `buffer` for the next acquire."""
        insort(self.free, buffer, key=len)


def offload_embedding(model: nn.Module) -> None:
    """Move the weight of `model`'s embedding to pinned host memory, in place, after apply_lora.
    resize_token_embeddings creates one on the GPU again.

    Raises:
        UserError: there is no GPU, or a step needs more than some rows of the embedding.
    """
    require_gpu("offload_embedding")
    name, _ = vocabulary(model)
    embedding: Any = None if name is None else model.get_submodule(name)
    is_found = isinstance(embedding, AdapterModule | nn.Embedding)
    require(is_found, "offload_embedding: this model has no embedding of tokens: leave it out")
    weight = embedding.weight
    named = model.named_parameters(remove_duplicate=False)
    users = [path.rpartition(".")[0] for path, p in named if p is weight]
    others = [user for user in users if not isinstance(model.get_submodule(user), nn.Embedding)]
    reasons = {
        "trained or adapted": isinstance(embedding, AdapterModule),
        "trained": weight.requires_grad,
        f"tied to {', '.join(others)}": others,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    message = f"offload_embedding: {name} is {why}, and then needed on the GPU: leave it out"
    require(why is None, message)
    weight.data = in_host_memory(weight.data)


def in_host_memory(weight: Tensor) -> Tensor:
    """A CUDA tensor with the values of `weight`, whose bytes are in pinned host memory."""
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
    return torch.as_tensor(_at_its_address(host), device=weight.device).view(weight.dtype)


def _at_its_address(host: Tensor) -> SimpleNamespace:
    """Pinned memory for CUDA: its address is valid on the GPU, whose tensor keeps it alive."""
    interface = {
        "shape": (*host.shape[:-1], host.shape[-1] * host.element_size()),
        "typestr": "|u1",  # the interface has no bf16
        "data": (host.data_ptr(), False),
        "version": 3,
    }
    return SimpleNamespace(host=host, __cuda_array_interface__=interface)
