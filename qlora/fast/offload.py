"""The layer inputs that gradient checkpointing keeps, in pinned host memory until they are needed.

Checkpointing keeps one tensor (tokens, dim) a layer: layers * tokens * dim * 2 bytes in bf16, 2 GiB
for 8,192 tokens of Llama-3.1-8B, which is what grows with the length of rows. Here each is copied
out while the GPU computes the next layers, and copied back while it does the layer above:

    forward    x_i is saved; once `keep` newer ones are, its copy starts; one later it is let go
    backward   x_i is handed out, and the copy of x_(i-1) starts

Saved-tensor hooks (torch.autograd.graph) are all it takes: a non-re-entrant checkpoint saves its
positional tensors under the hooks around it, and what is inside of it under its own, so the hooks
here see layer inputs, and of what follows the layers a few tensors that are newest and stay. Left
where they are: parameters and other leaves (the graph holds them anyway: with a frozen embedding
the first layer's input is one), views of them, what needs no gradient, is small or not contiguous.

All copies of one `offload_activations` run in order on one stream of their own. It waits for the
stream that computes before each copy, as the memory there may still be in use; and that stream
waits for a copy before the tensor on the GPU is used or let go. So memory is let go in the order of
the computation, and buffers can be used again at once: no record_stream, which would let memory
grow while Python is ahead of the GPU. All state hangs on the graph, and goes with it.

What it costs: as much host memory, which cannot be swapped out. Time, none by arithmetic: a layer
of P parameters does 2 P FLOP a token and moves 2 dim bytes, so a copy is hidden if P / dim is at
least FLOP/s over bytes/s of the card; the tokens cancel. Llama-3.1-8B's P is 13 dim^2, and its dim
4,096: 53,000 FLOP a byte. By data sheet a 4090 does 6,600 (165e12 / 25e9), a T4 5,400, an H200
20,000. The backward pass computes twice as much for the same bytes. It is off by default, for long
rows too, until a GPU has shown it: time of a step and peak with and without, for rows of 2k, 8k and
32k tokens, and the time of the first step, which pins.

Left out: several GPUs, and tensors inside of checkpoints that keep more than their inputs.

The frozen embedding in host memory, where the GPU reads the rows that it looks up.

An embedding is the only weight of which a step needs a few rows: tokens * dim * 2 bytes of 0.98 GiB
for Llama-3.1-8B. Pinned host memory has an address on the GPU too (CUDA's unified addressing), so
the weight becomes a CUDA tensor whose bytes lie there, made through __cuda_array_interface__. The
lookup's kernel then fetches its rows over PCIe: 64 MiB for 8,192 tokens, 3 ms at 25 GB/s, with no
copy of ids to the CPU, which would wait for the GPU. Nobody else notices: the module, its name, its
device and dtype, state dict and generate() are as before; resize_token_embeddings makes a weight on
the GPU again. It is loaded onto the GPU first, when activations do not need the room yet. torch
rounds pinned memory up to a power of two.

Left out: the output head, of which every chunk of tokens needs all rows, 1 GB over PCIe; and an
embedding that is trained, adapted or tied to the head, for the same reason.
"""

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora.adapters.wrappers import AdapterModule
from qlora.base.modules import vocabulary
from qlora.errors import UserError

MIN_BYTES = 1 << 20  # below, starting a copy costs more than the memory is worth
KEEP = 2  # the last layer's input is needed first, and the final norm saves one more


def require_gpu(what: str) -> None:
    """Refuse a setting that means nothing on a machine without a GPU."""
    if not torch.cuda.is_available():
        raise UserError(f"{what} wants a CUDA GPU, and torch finds none here: leave it out")


class Copies(Protocol):
    """How bytes go to host memory and back, in the order in which copies are started."""

    device: torch.device

    def allocate(self, size: int) -> Tensor:
        """Host memory: `size` bytes, uint8."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Copy once all that was computed so far is done; to be finished."""

    def finish(self, started: Any) -> None:
        """What is computed from here on finds that copy done."""


class CudaCopies:
    """Copies between a GPU and pinned memory, beside what the GPU computes."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)

    def allocate(self, size: int) -> Tensor:
        """Pinned memory, or the copies would wait for the GPU."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, target: Tensor, source: Tensor) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
        """The stream that computes, whose memory it is, and the end of the copy."""
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return computing, self.stream.record_event()

    def finish(self, started: tuple[torch.cuda.Stream, torch.cuda.Event]) -> None:
        """Python does not wait, the stream does."""
        computing, end = started
        computing.wait_event(end)


class offload_activations:  # a context manager, named as torch's save_on_cpu
    """Keep the inputs of checkpointed layers in host memory between forward and backward pass.

    Around the forward pass, and once for a whole run, for its pinned buffers are used again:

        offload = offload_activations()
        for batch in batches:
            with offload:
                loss = model(**batch).loss
            loss.backward()

    Values and gradients are the same to the bit. Without gradients it does nothing, and it can be
    entered again inside of itself. The model wants gradient checkpointing, else all that its layers
    save is moved.

    Args:
        min_bytes: smaller tensors stay.
        keep: so many of the newest stay, at least 1; one more is on its way.
        copies: by default from the current GPU to pinned memory.

    Raises:
        UserError: there is no GPU.
        RuntimeError: in either pass, where a tensor was changed in place after it was saved.
    """

    def __init__(
        self, *, min_bytes: int = MIN_BYTES, keep: int = KEEP, copies: Copies | None = None
    ) -> None:
        if copies is None:
            require_gpu("offload_activations")
            copies = CudaCopies()
        self.min_bytes, self.keep, self.copies = min_bytes, keep, copies
        self.buffers = Buffers(copies.allocate)
        self._entered: list[saved_tensors_hooks] = []
        self._known: weakref.WeakValueDictionary[int, Saved] = weakref.WeakValueDictionary()
        self._last: Callable[[], Saved | None] = _nothing
        self._newest: list[Callable[[], Saved | None]] = []

    def __enter__(self) -> "offload_activations":
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(*error)

    def _pack(self, tensor: Tensor) -> "Tensor | Saved":
        if not self._is_worth_it(tensor):
            return tensor.detach()  # the graph would hold itself by a tensor with its history
        address = tensor.untyped_storage().data_ptr()
        saved = self._known.get(address)
        if saved is None or not saved.is_of(tensor):
            saved = self._known[address] = Saved(tensor, self.copies, self.buffers, self._last)
            self._last = weakref.ref(saved)
        if saved.tensor is not None:
            self._make_room(saved)
        return saved

    def _unpack(self, saved: "Tensor | Saved") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        tensor = saved.take()
        ahead = saved.before()
        while ahead is not None and ahead.host is None:  # those that never left
            ahead = ahead.before()
        if ahead is not None:
            ahead.fetch()
        return tensor

    def _is_worth_it(self, tensor: Tensor) -> bool:
        whole = tensor._base
        return (
            tensor.device == self.copies.device
            and tensor.is_floating_point()
            and tensor.grad_fn is not None
            and (whole is None or not whole.is_leaf)
            and tensor.layout == torch.strided
            and tensor.is_contiguous()
            and tensor.nbytes >= self.min_bytes
        )

    def _make_room(self, newest: "Saved") -> None:
        """Let go of the one whose copy was started last time, and start that of the next."""
        here = [saved for found in self._newest if (saved := found()) not in (None, newest)]
        here.append(newest)
        while len(here) > self.keep + 1:
            here.pop(0).let_go()
        for saved in here[: -self.keep]:
            saved.leave()
        self._newest = [weakref.ref(saved) for saved in here]


def _nothing() -> None:
    """A reference to nothing."""


class Saved:
    """What the graph has in a tensor's place: on the GPU, in host memory, or in both.

    Args:
        before: a weak reference to what was saved before it.
    """

    def __init__(
        self,
        tensor: Tensor,
        copies: Copies,
        buffers: "Buffers",
        before: "Callable[[], Saved | None]",
    ) -> None:
        self.copies, self.buffers = copies, buffers
        self.before = before
        self.tensor: Tensor | None = tensor.detach()
        self.host: Tensor | None = None
        self.started: Any = None
        self._version = tensor._version
        self._storage = weakref.ref(tensor.untyped_storage())
        self._place = _place(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what was saved. Memory that was let go may hold another at its
        address, so the storage itself is compared."""
        return self._storage() is tensor.untyped_storage() and self._place == _place(tensor)

    def leave(self) -> None:
        """Start the copy to host memory, if it was not yet."""
        if self.tensor is not None and self.host is None:
            self._require_unchanged()
            self._buffer = self.buffers.take(self.tensor.nbytes)
            flat = self._buffer[: self.tensor.nbytes].view(self.tensor.dtype)
            self.host = flat.view(self.tensor.shape)
            self.started = self.copies.start(self.host, self.tensor)

    def let_go(self) -> None:
        """Give back the memory on the GPU, once the copy in host memory is whole."""
        if self.tensor is not None and self.host is not None:
            self._finish()
            self.tensor = None

    def fetch(self) -> None:
        """Start the copy back, if it is not there."""
        if self.tensor is None:
            assert self.host is not None
            shape, dtype = self.host.shape, self.host.dtype
            self.tensor = torch.empty(shape, dtype=dtype, device=self.copies.device)
            self.started = self.copies.start(self.tensor, self.host)
            self._version = self.tensor._version

    def take(self) -> Tensor:
        """The tensor. It can be had again while the graph lives: what has left stays in host
        memory."""
        self.fetch()
        self._finish()
        tensor = self.tensor
        assert tensor is not None
        if self.host is not None:
            self.tensor = None
        return tensor

    def _finish(self) -> None:
        if self.started is not None:
            self.copies.finish(self.started)
            self.started = None
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        """As torch does where there are no hooks."""
        assert self.tensor is not None
        if self.tensor._version != self._version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                "place after it was saved"
            )

    def __del__(self) -> None:
        """With the graph: nothing may go on writing where others will."""
        if self.started is not None:
            self.copies.finish(self.started)
        if self.host is not None:
            self.buffers.give(self._buffer)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which part of its storage a contiguous tensor is, and of what time."""
    return tensor.storage_offset(), tensor.shape, tensor.dtype, tensor._version


class Buffers:
    """Host memory that is allocated once and used again: pinning takes long."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self.allocate = allocate
        self.free: list[Tensor] = []  # the smallest first

    def take(self, size: int) -> Tensor:
        """At least `size` bytes. As one that is too small goes for each that is made, there are
        never more than were in use at once."""
        place = bisect_left(self.free, size, key=len)
        if place < len(self.free):
            return self.free.pop(place)
        del self.free[:1]
        return self.allocate(1 << (size - 1).bit_length())  # as torch rounds up what it pins

    def give(self, buffer: Tensor) -> None:
        """Take it back."""
        insort(self.free, buffer, key=len)


def offload_embedding(model: nn.Module) -> None:
    """Move the weight of `model`'s embedding to pinned host memory, in place, after its adapters
    were put on.

    Raises:
        UserError: there is no GPU, or more than rows of the embedding is needed in a step.
    """
    require_gpu("offload_embedding")
    if reason := _why_not(model):
        raise UserError(f"offload_embedding: {reason}: leave it out")
    embedding: Any = model.get_submodule(str(vocabulary(model)[0]))
    embedding.weight.data = in_host_memory(embedding.weight.data)


def _why_not(model: nn.Module) -> str | None:
    name, _ = vocabulary(model)
    embedding = None if name is None else model.get_submodule(name)
    if isinstance(embedding, AdapterModule):
        return f"{name} is trained or adapted, and then needed on the GPU"
    if not isinstance(embedding, nn.Embedding):
        return "this model has no embedding of tokens"
    weight = embedding.weight
    if weight.requires_grad:
        return f"{name} is trained, and then needed on the GPU"
    named = model.named_parameters(remove_duplicate=False)
    users = [own.rpartition(".")[0] for own, p in named if p is weight]
    others = [user for user in users if not isinstance(model.get_submodule(user), nn.Embedding)]
    if others:
        return f"{name} is tied to {', '.join(others)}, and then needed on the GPU"
    return None


def in_host_memory(weight: Tensor) -> Tensor:
    """`weight` as a CUDA tensor of the same values whose bytes are in pinned host memory."""
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
    return torch.as_tensor(_Pinned(host), device=weight.device).view(weight.dtype)


class _Pinned:
    """Pinned memory by its address, which is the same on the GPU; alive as long as the tensor made
    of it."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": (*host.shape[:-1], host.shape[-1] * host.element_size()),
            "typestr": "|u1",  # the interface has no bf16
            "data": (host.data_ptr(), False),
            "version": 3,
        }
