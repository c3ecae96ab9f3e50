"""Saved layer inputs in host memory: the same numbers, in the right order, and nothing left behind.

On the CPU the copies are late ones: what was not waited for holds NaN, as a GPU's holds anything.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from conftest import CONFIGS, tiny_model, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from qlora.errors import UserError
from qlora.fast import layers as norms
from qlora.fast.offload import Buffers, Saved, offload_activations
from qlora.training import prepare_for_training

LAYERS = 6
TOKENS, DIM = 8, 16
SIZE = TOKENS * DIM * 4  # bytes of a layer's input


class LateCopies:
    """Copies between two places on the CPU, each made when it is waited for, in order."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.log: list[str] = []
        self.allocated: list[int] = []
        self.waiting: list[tuple[Any, Any]] = []
        self.sources: list[Tensor] = []

    def allocate(self, size: int) -> Tensor:
        self.allocated.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def start(self, target: Tensor, source: Tensor) -> Any:
        self.log.append(f"start {float(source.flatten()[0]):g}")
        self.sources.append(source.clone())
        target.fill_(torch.nan)
        # weakly: who lets one go that is still being copied has a bug
        self.waiting.append((weakref.ref(target), weakref.ref(source)))
        return self.waiting[-1]

    def finish(self, started: Any) -> None:
        while any(started is one for one in self.waiting):
            target, source = (found() for found in self.waiting.pop(0))
            assert target is not None and source is not None, "let go while it was copied"
            target.data.copy_(source)
            self.log.append(f"end {float(source.flatten()[0]):g}")


@pytest.fixture
def copies() -> LateCopies:
    return LateCopies()


def offloading(copies: LateCopies, **settings: Any) -> offload_activations:
    return offload_activations(copies=copies, **{"min_bytes": SIZE, **settings})


class Layers(nn.Module):
    """Checkpointed layers whose inputs are all differentiable results, as from the second on."""

    def __init__(self, count: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(torch.randn(DIM, DIM) * 0.3 for _ in range(count))
        self.storages: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() * 1
        for matrix in self.matrices:
            self.storages.append(weakref.ref(x.untyped_storage()))
            x = checkpoint(lambda x, w: x + torch.tanh(x @ w), x, matrix, use_reentrant=False)
        return x

    def gradients(self, context: Any, x: Tensor) -> list[Tensor]:
        self.zero_grad()
        with context:
            loss = self(x).sum()
        loss.backward()
        return gradients(self)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def batch(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(seed))


def plain_gradients(*batches: Tensor) -> list[Tensor]:
    """Summed over batches, without any of it."""
    model = Layers()
    for x in batches:
        model(x).sum().backward()
    return gradients(model)


# ---- values ----


@pytest.mark.parametrize("keep", [1, 2, 4, 9])
def test_gradients_are_the_same_to_the_bit(copies, keep):
    offload = offloading(copies, keep=keep)
    model = Layers()
    for seed in range(3):
        assert same(model.gradients(offload, batch(seed)), plain_gradients(batch(seed)))
    assert copies.log.count("start 0") == 0
    assert len(copies.log) > 0 or keep >= LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "t5", "bart"])
def test_gradients_of_a_model_are_the_same_to_the_bit(copies, family):
    model: Any = prepare_for_training(tiny_model(family)).eval().train()
    ids = token_ids(length=16)
    found = []
    for context in (torch.enable_grad(), offloading(copies, min_bytes=1, keep=1)):
        torch.manual_seed(3)  # of dropout
        model.zero_grad()
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(gradients(model))
    assert same(found[1], found[0])
    assert copies.log


def four_layers() -> Any:
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.requires_grad_()
    return prepare_for_training(model)


def test_of_a_frozen_model_layer_inputs_are_moved_and_nothing_else(copies, monkeypatch):
    """All but the first, which is a leaf; what the final norm saves is newest and stays."""
    monkeypatch.setattr(norms, "HAS_KERNEL", ("cpu", "cuda"))  # a GPU's norms, which keep x
    model, ids = four_layers(), token_ids()
    with offloading(copies, min_bytes=1, keep=2):
        outputs = model.base_model(input_ids=ids, output_hidden_states=True)
    moved = copies.sources
    assert same(moved, [state.detach() for state in outputs.hidden_states[1 : 1 + len(moved)]])
    assert len(moved) == 3


# ---- order and memory ----


class Counting(nn.Module):
    """x_i is i: layers that add one, so that the log of copies says which they were."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, layers: int = LAYERS) -> Tensor:
        x = torch.zeros(TOKENS, DIM) * self.one
        for _ in range(layers):
            x = checkpoint(lambda x: x * self.one + 1, x, use_reentrant=False)
        return x


def test_order_of_copies(copies):
    """Each leaves when two newer ones are there, one is on its way at a time, one is ahead."""
    with offloading(copies):
        loss = Counting()().sum()
    out = ["start 0", "end 0", "start 1", "end 1", "start 2", "end 2", "start 3"]
    assert copies.log == out
    loss.backward()
    back = ["end 3", "start 2", "end 2", "start 1", "end 1", "start 0", "end 0"]
    assert copies.log == out + back


def test_memory_is_let_go_in_order(copies):
    model = Layers()
    with offloading(copies):
        loss = model(batch()).sum()
    assert [found() is not None for found in model.storages] == [False] * 3 + [True] * 3
    loss.backward()
    del loss
    assert not any(found() for found in model.storages)


def test_of_what_was_fetched_one_is_ahead_and_none_stays(copies, monkeypatch):
    offload = offloading(copies)
    alive: list[int] = []

    def watched(x: Tensor, w: Tensor) -> Tensor:
        alive.append(sum(one.tensor is not None for one in offload._known.values()))
        return x + torch.tanh(x @ w)

    x = batch().requires_grad_() * 1
    with offload:
        for matrix in Layers().matrices:
            x = checkpoint(watched, x, matrix, use_reentrant=False)
        loss = x.sum()
    assert max(alive) == 3
    alive.clear()
    loss.backward()
    # the two that stayed and what is below them; then the one ahead of it
    assert alive == [3, 2, 1, 1, 1, 0]


def test_buffers_are_used_again_whatever_the_length(copies):
    offload, model = offloading(copies, min_bytes=1), Layers()
    model.gradients(offload, batch())
    in_a_step = len(copies.allocated)
    assert in_a_step == 4 == len(offload.buffers.free)
    for seed, tokens in enumerate((TOKENS, 3, TOKENS, 5)):
        model.gradients(offload, batch(seed, tokens))
    assert len(copies.allocated) == in_a_step
    model.gradients(offload, batch(0, 3 * TOKENS))
    model.gradients(offload, batch(0, 2 * TOKENS))
    assert copies.allocated == [SIZE] * 4 + [4 * SIZE] * 4
    assert [len(buffer) for buffer in offload.buffers.free] == [4 * SIZE] * 4


def test_the_smallest_buffer_that_fits_is_taken():
    buffers = Buffers(lambda size: torch.empty(size, dtype=torch.uint8))
    held = [buffers.take(size) for size in (1024, 4096, 2048)]
    for one in held:
        buffers.give(one)
    assert [len(buffers.take(size)) for size in (1500, 10, 4096, 5000)] == [2048, 1024, 4096, 8192]


@pytest.mark.parametrize(("keep", "times"), [(1, 1), (2, 0)])
def test_what_many_layers_read_is_copied_once_at_most(copies, keep, times):
    """As an encoder's output is in each layer of the decoder."""
    read = (batch().requires_grad_() * 1) + 7
    x = batch(1).requires_grad_() * 1
    with offloading(copies, keep=keep):
        for _ in range(LAYERS):
            x = checkpoint(lambda x, read: torch.tanh(x + read), x, read, use_reentrant=False)
        loss = x.sum()
    assert sum(torch.equal(one, read) for one in copies.sources) == times
    loss.backward()


def test_another_tensor_at_the_same_address_is_another(copies):
    """So is the same one once it was changed."""
    memory = numpy.zeros((TOKENS, DIM), dtype=numpy.float32)
    first, second = torch.from_numpy(memory), torch.from_numpy(memory)
    offload = offloading(copies)
    saved = Saved(first, offload, lambda: None)
    assert first.data_ptr() == second.data_ptr()
    assert saved.is_of(first.view(TOKENS, DIM)) and not saved.is_of(second)
    assert not saved.is_of(first[1:]) and not saved.is_of(first.T)
    first.add_(1)
    assert not saved.is_of(first)


# ---- what is left where it is ----


def packed(
    copies: LateCopies, compute: Callable[[], Any], **settings: Any
) -> list[tuple[int, ...]]:
    """Shapes of what is held in place of tensors while the results are alive."""
    offload = offloading(copies, **settings)
    with offload:
        results = compute()
    shapes = [tuple(one.tensor.shape) for one in offload._known.values()]
    del results
    assert len(offload._known) == 0
    return shapes


def test_parameters_other_leaves_and_views_of_them_stay(copies):
    weight, frozen = nn.Parameter(torch.randn(DIM, DIM)), torch.randn(DIM, DIM)
    leaf = batch().requires_grad_()
    assert packed(copies, lambda: leaf @ weight, min_bytes=1) == []
    assert packed(copies, lambda: leaf.view(-1, DIM) @ weight.t(), min_bytes=1) == []
    assert packed(copies, lambda: leaf @ frozen.t(), min_bytes=1) == []


@pytest.mark.parametrize(
    "stays",
    [
        pytest.param(lambda x: x[:-1].contiguous(), id="small"),
        pytest.param(lambda x: x.T, id="not contiguous"),
        pytest.param(lambda x: x.detach(), id="no gradient"),
        pytest.param(lambda x: x.argsort(), id="whole numbers"),
    ],
)
def test_what_stays(copies, stays):
    x = batch().requires_grad_() * 1

    def compute() -> Tensor:
        return checkpoint(lambda x, other: x * other.sum(), x, stays(x), use_reentrant=False)

    assert packed(copies, compute) == [(TOKENS, DIM)]  # x itself


def test_what_stays_does_not_hold_itself(copies):
    """A result that its own function saves, as relu's."""
    with offloading(copies, min_bytes=1 << 20):
        result = (batch().requires_grad_() * 1).relu()
    alive = weakref.ref(result.untyped_storage())
    del result
    assert alive() is None


# ---- ways to use it ----


def test_gradients_add_up_over_batches(copies):
    offload, model, batches = offloading(copies), Layers(), [batch(i) for i in range(3)]
    for x in batches:
        with offload:
            loss = model(x).sum()
        loss.backward()
    assert same(gradients(model), plain_gradients(*batches))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_several_graphs_at_once(copies, order):
    offload, model = offloading(copies), Layers()
    with offload:
        losses = [model(batch(i)).sum() for i in range(3)]
    for i in order:
        losses[i].backward()
    assert same(gradients(model), plain_gradients(*(batch(i) for i in order)))


def test_backward_again(copies):
    model = Layers()
    with offloading(copies):
        loss = model(batch()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert same(gradients(model), plain_gradients(batch(), batch()))


def test_some_gradients_alone(copies):
    model = Layers()
    with offloading(copies):
        loss = model(batch()).sum()
    found = torch.autograd.grad(loss, list(model.matrices)[-2:])
    assert same(list(found), plain_gradients(batch())[-2:])


def test_inside_of_itself_and_backward_inside(copies):
    offload, model = offloading(copies), Layers()
    with offload:
        with offload:
            loss = model(batch()).sum()
        loss = loss + model(batch(1)).sum()
        loss.backward()
    assert same(gradients(model), plain_gradients(batch(1), batch()))


def test_without_gradients_nothing_happens(copies):
    model = Layers()
    with offloading(copies) as offload, torch.no_grad():
        found = model(batch())
    assert torch.equal(found, model(batch()))
    assert not copies.log and not offload._known


# ---- errors ----


def all_clear(offload: offload_activations, copies: LateCopies) -> bool:
    """No hooks, no copies under way, every buffer back."""
    x = batch().requires_grad_() * 1
    y = x * x
    free = len(offload.buffers.free) == len(copies.allocated)
    return y is not None and not offload._known and not copies.waiting and free


def test_an_error_in_the_forward_pass_leaves_nothing(copies):
    offload, model = offloading(copies), Layers()

    def broken(x: Tensor) -> Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), offload:
        checkpoint(broken, model(batch()), use_reentrant=False)
    assert copies.allocated and all_clear(offload, copies)
    assert same(model.gradients(offload, batch()), plain_gradients(batch()))


def test_an_error_in_the_backward_pass_leaves_nothing(copies):
    offload, model = offloading(copies), Layers()

    def broken(gradient: Tensor) -> Tensor:
        raise ValueError("broken")

    with offload:
        x = model(batch())
        x.register_hook(broken)
        x = model(x)
        loss = x.sum()
    with pytest.raises(ValueError, match="broken"):
        loss.backward()
    del x, loss
    assert copies.allocated and all_clear(offload, copies)
    assert same(model.gradients(offload, batch()), plain_gradients(batch()))


@pytest.mark.parametrize("newer", [0, 1, 2], ids=["stayed", "stayed too", "on its way"])
def test_a_change_in_place_is_an_error(copies, newer):
    """As it is in torch without hooks, which with hooks does not look."""
    one = nn.Parameter(torch.ones(()))
    changed = x = torch.zeros(TOKENS, DIM) * one
    with offloading(copies):
        for _ in range(newer + 1):
            x = checkpoint(lambda x: x * one + 1, x, use_reentrant=False)
    changed.add_(1)
    with pytest.raises(RuntimeError, match=r"\(8, 16\) .* was changed in place after it was saved"):
        x.sum().backward()


def test_a_change_in_place_is_an_error_in_the_forward_pass_too(copies):
    one = nn.Parameter(torch.ones(()))
    x = torch.zeros(TOKENS, DIM) * one
    with pytest.raises(RuntimeError, match="changed in place"), offloading(copies):
        for _ in range(4):
            y = checkpoint(lambda x: x * one + 1, x, use_reentrant=False)
            x.add_(1)
            x = y


def test_it_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"offload_activations wants a CUDA GPU.*leave it out"):
        offload_activations()


# ---- on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Blocks(nn.Module):
    """Layers without attention, whose kernels add up in one order."""

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.gpu
@needs_gpu
def test_memory_and_gradients_on_a_gpu():
    layers, tokens, dim = 16, 8192, 1024
    size = tokens * dim * 2  # 16 MiB
    model = Blocks(layers, dim).to("cuda", torch.bfloat16)
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    offload = offload_activations()
    peaks, found = [], []
    # the first of each allocates workspaces and pins
    for context in (torch.enable_grad(), torch.enable_grad(), offload, offload):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with context:
            loss = model(x.clone().requires_grad_() * 1).float().square().mean()
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append(gradients(model))
    assert all(same(one, found[0]) for one in found)
    # two stay, one is on its way, and in the backward pass one is ahead
    assert peaks[1] - peaks[2] >= (layers - 4) * size
    assert peaks[3] <= peaks[2]
    assert len(offload.buffers.free) <= layers
    assert all(buffer.is_pinned() for buffer in offload.buffers.free)


@pytest.mark.gpu
@needs_gpu
def test_many_steps_on_a_gpu_while_python_is_ahead():
    """Small layers, so that nothing but the order on the streams keeps values apart."""
    model = Blocks(24, 256).to("cuda")
    batches = [torch.randn(n, 256, device="cuda") for n in (1024, 2048, 1500, 4096)] * 3
    offload = offload_activations(min_bytes=1, keep=1)
    found = []
    for context in (torch.enable_grad(), offload):
        model.zero_grad()
        for x in batches:
            with context:
                loss = model(x.clone().requires_grad_() * 1).square().sum()
            loss.backward()
        found.append(gradients(model))
    assert same(found[1], found[0])


@pytest.mark.gpu
@needs_gpu
def test_an_error_on_a_gpu_harms_nobody():
    """Memory that copies still write to is not handed to others."""
    model = Blocks(12, 512).to("cuda")
    x = torch.randn(4096, 512, device="cuda").requires_grad_()
    offload = offload_activations(min_bytes=1)

    def broken(gradient: Tensor) -> Tensor:
        raise ValueError("broken")

    for _ in range(5):
        with offload:
            y = model(x * 1)
            y.register_hook(broken)
            loss = model(y).sum()
        with pytest.raises(ValueError, match="broken"):
            loss.backward()
        del y, loss
        others = [torch.full((4096, 512), 7.0, device="cuda") for _ in range(24)]
        torch.cuda.synchronize()
        assert all(bool((one == 7).all()) for one in others)
