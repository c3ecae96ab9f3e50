"""Layer inputs and the embedding in host memory: equal numbers, in order, nothing left behind."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from conftest import CONFIGS, DEVICES, FP32, axis, on_gpu, tiny_model, token_ids
from safetensors.torch import load_file
from simulated_device import LateCopies
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from qlora import LoraConfig, UserError, apply_lora, load_base, save_adapter
from qlora.fast import layers, offload
from qlora.fast.offload import Buffers, Saved, offload_activations, offload_embedding
from qlora.training import prepare_for_training

LAYERS = 6
TOKENS, DIM = 8, 16
SIZE = TOKENS * DIM * 4  # bytes of a layer's input


@pytest.fixture
def copies() -> LateCopies:
    return LateCopies()


def offloading(copies: Any, **settings: Any) -> offload_activations:
    return offload_activations(copies=copies, **{"min_bytes": SIZE, **settings})


class Layers(nn.Module):
    """Checkpointed layers without attention, all of whose inputs have a gradient function."""

    def __init__(self, layers: int = LAYERS, dim: int = DIM) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(torch.randn(dim, dim) * dim**-0.5 for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() * 1
        for matrix in self.matrices:
            x = checkpoint(lambda x, m: x + torch.tanh(x @ m), x, matrix, use_reentrant=False)
        return x


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def run(model: nn.Module, context: Any, *losses: Callable[[], Tensor]) -> list[Tensor]:
    """The gradients of steps whose forward passes are in `context`, summed."""
    model.zero_grad()
    for loss_of in losses:
        with context:
            loss = loss_of()
        loss.backward()
    return gradients(model)


def layer_gradients(*batches: Tensor, context: Any = None, layers: int = LAYERS) -> list[Tensor]:
    """Of Layers, summed over batches; by default without offloading."""
    model = Layers(layers, batches[0].shape[-1]).to(batches[0].device)
    losses = [lambda x=x: model(x).sum() for x in batches]
    return run(model, context or torch.enable_grad(), *losses)


def equal(tensors: list[Tensor], expected: list[Tensor]) -> bool:
    return len(tensors) == len(expected) and all(map(torch.equal, tensors, expected))


def batch(seed: int = 0, tokens: int = TOKENS, dim: int = DIM) -> Tensor:
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep", axis(1, 2, 4, 9))
def test_offloaded_gradients_are_equal(copies, keep, device):
    """On a GPU of small layers: only the order on the streams keeps values apart."""
    is_gpu = device == "cuda"
    layers, dim, most = (24, 256, 4096) if is_gpu else (LAYERS, DIM, TOKENS)
    lengths = [most // 4, most // 2, most // 3, most] * 3
    batches = [batch(i, length, dim).to(device) for i, length in enumerate(lengths)]
    context = offload_activations(copies=None if is_gpu else copies, min_bytes=1, keep=keep)
    got = layer_gradients(*batches, context=context, layers=layers)
    assert equal(got, layer_gradients(*batches, layers=layers))
    assert is_gpu or bool(copies.log) == (keep < LAYERS)


@pytest.mark.parametrize("family", axis("gemma", "llama", "gpt2", "t5", "bart"))
def test_offloaded_gradients_of_a_model_are_equal(copies, family):
    model: Any = prepare_for_training(tiny_model(family)).eval().train()
    ids, runs = token_ids(length=16), []
    for context in (torch.enable_grad(), offloading(copies, min_bytes=1, keep=1)):
        torch.manual_seed(3)  # of dropout
        runs.append(run(model, context, lambda: model(input_ids=ids, labels=ids).loss))
    assert equal(runs[1], runs[0]) and copies.log


def test_of_a_frozen_model_only_layer_inputs_are_moved(copies, monkeypatch):
    """All but the first, which is a leaf; what the final norm saves is newest and stays."""
    monkeypatch.setattr(layers, "HAS_KERNEL", ("cpu", "cuda"))  # a GPU's norms, which keep x
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 4
    model: Any = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.requires_grad_()
    prepare_for_training(model)
    with offloading(copies, min_bytes=1, keep=2):
        outputs = model.base_model(input_ids=token_ids(), output_hidden_states=True)
    assert equal(copies.sources, [state.detach() for state in outputs.hidden_states[1:4]])


def test_several_graphs_and_backward_passes(copies):
    context, model, batches = offloading(copies), Layers(), [batch(i) for i in range(3)]
    with context, context:
        losses = [model(x).sum() for x in batches]
    some = torch.autograd.grad(losses[0], list(model.matrices)[-2:], retain_graph=True)
    assert equal(list(some), layer_gradients(batches[0])[-2:])
    order = (1, 0, 2, 1)
    for i in order:
        losses[i].backward(retain_graph=i == 1)
    assert equal(gradients(model), layer_gradients(*(batches[i] for i in order)))


def test_without_gradients_nothing_is_moved(copies):
    with offloading(copies) as context, torch.no_grad():
        Layers()(batch())
    assert not copies.log and not context._known


ONE = nn.Parameter(torch.ones(()))


def zeros() -> Tensor:
    """The first input of a chain, with a gradient function."""
    return torch.zeros(TOKENS, DIM) * ONE


def plus_one(x: Tensor, on_call: Callable[[], Any] = lambda: None) -> Tensor:
    """A checkpointed layer."""

    def layer(x: Tensor) -> Tensor:
        on_call()
        return x * ONE + 1

    return torch.as_tensor(checkpoint(layer, x, use_reentrant=False))


def test_order_of_copies_and_memory(copies):
    """A copy starts when two newer tensors exist, one is under way at a time, one is ahead."""
    context, storages, counts = offloading(copies), [], []
    held = context._known.values
    with context:
        x = zeros()  # x_i is i
        for _ in range(LAYERS):
            storages.append(weakref.ref(x.untyped_storage()))
            x = plus_one(x, lambda: counts.append(sum(s.tensor is not None for s in held())))
    out = ["start 0", "end 0", "start 1", "end 1", "start 2", "end 2", "start 3"]
    assert copies.log == out and max(counts) == 3
    assert [storage() is not None for storage in storages] == [False] * 3 + [True] * 3
    counts.clear()
    x.sum().backward()
    back = ["end 3", "start 2", "end 2", "start 1", "end 1", "start 0", "end 0"]
    assert copies.log == out + back
    # the two that stayed and one ahead; then the one ahead
    assert counts == [3, 2, 1, 1, 1, 0]
    del x
    assert not any(storage() for storage in storages)


def test_buffers_are_reused_for_any_length(copies):
    context = offloading(copies, min_bytes=1)
    for seed, tokens in enumerate((TOKENS, TOKENS, 3, TOKENS, 5)):
        layer_gradients(batch(seed, tokens), context=context)
        assert len(copies.allocated) == 4 == len(context.buffers.free)
    layer_gradients(batch(0, 3 * TOKENS), batch(0, 2 * TOKENS), context=context)
    assert copies.allocated == [SIZE] * 4 + [16 * SIZE]  # torch pins powers of two
    assert [len(buffer) for buffer in context.buffers.free] == [3 * SIZE] * 5
    buffers = Buffers(copies.allocate)  # the smallest that fits
    for buffer in [buffers.acquire(size) for size in (1024, 4096, 2048)]:
        buffers.release(buffer)
    sizes = [len(buffers.acquire(size)) for size in (1500, 10, 4096, 5000)]
    assert sizes == [2048, 1024, 4096, 5376]


@pytest.mark.parametrize("keep, times", [(1, 1), (2, 0)])
def test_a_tensor_that_many_layers_read_is_copied_once(copies, keep, times):
    """As an encoder's output in each layer of the decoder."""
    shared, x = batch().requires_grad_() + 7, batch(1).requires_grad_() * 1
    with offloading(copies, keep=keep):
        for _ in range(LAYERS):
            x = checkpoint(lambda x, y: torch.tanh(x + y), x, shared, use_reentrant=False)
    assert sum(torch.equal(source, shared) for source in copies.sources) == times
    x.sum().backward()


def test_a_tensor_is_known_by_storage_view_and_version(copies):
    memory = numpy.zeros((TOKENS, DIM), dtype=numpy.float32)
    first, second = torch.from_numpy(memory), torch.from_numpy(memory)  # at one address
    saved = Saved(first, offloading(copies), lambda: None)
    assert saved.is_of(first.view(TOKENS, DIM)) and not saved.is_of(second)
    assert not saved.is_of(first[1:]) and not saved.is_of(first.T)
    first.add_(1)
    assert not saved.is_of(first)


LEAF = torch.ones(TOKENS, DIM, requires_grad=True)
STAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf": lambda x: LEAF,
    "a view of a leaf": lambda x: LEAF.view(-1),
    "small": lambda x: x[:-1].contiguous(),
    "not contiguous": lambda x: x.T,
    "no gradient": lambda x: x.detach(),
    "integers": lambda x: x.argsort(),
}


@pytest.mark.parametrize("other", STAYS.values(), ids=STAYS)
def test_tensors_that_stay(copies, other):
    context, x = offloading(copies), batch().requires_grad_() * 1
    with context:
        y = checkpoint(lambda x, other: x * other.sum(), x, other(x), use_reentrant=False)
    assert [tuple(saved.tensor.shape) for saved in context._known.values()] == [(TOKENS, DIM)]  # x
    del y
    assert not context._known


def test_a_result_that_its_function_saves_is_freed(copies):
    """As relu's: no reference cycle."""
    with offloading(copies, min_bytes=1 << 20):
        result = (batch().requires_grad_() * 1).relu()
    alive = weakref.ref(result.untyped_storage())
    del result
    assert alive() is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_leaves_no_hooks_copies_or_buffers(copies, where, device):
    """On a GPU, no copy may write to memory that is used again."""
    layers, dim, tokens = (12, 512, 4096) if device == "cuda" else (LAYERS, DIM, TOKENS)
    context = offload_activations(copies=None if device == "cuda" else copies, min_bytes=1)
    model, x = Layers(layers, dim).to(device), batch(0, tokens, dim).to(device)

    def broken(_: Tensor) -> Tensor:
        raise ValueError("broken")

    def two_steps() -> None:
        with context:
            y = model(x)
            if where == "forward":
                checkpoint(broken, y, use_reentrant=False)
            y.register_hook(broken)
            loss = model(y).sum()
        loss.backward()

    for _ in range(5):
        with pytest.raises(ValueError, match="broken"):
            two_steps()
        others = [torch.full_like(x, 7.0) for _ in range(2 * layers)]
        if device == "cuda":
            torch.cuda.synchronize()
        assert all(bool((other == 7).all()) for other in others)
    y = x.requires_grad_() * 1
    z = y * y
    assert z is not None and not context._known and not copies.waiting
    assert device == "cuda" or 0 < len(copies.allocated) == len(context.buffers.free)
    assert equal(run(model, context, lambda: model(x).sum()), layer_gradients(x, layers=layers))


@pytest.mark.parametrize("newer", [0, 1, 2], ids=["stays", "stays too", "being copied"])
def test_a_change_in_place_raises(copies, newer):
    """As torch does where there are no hooks; in the backward pass, or when the copy starts."""
    x = changed = zeros()
    with offloading(copies):
        for _ in range(newer + 1):
            x = plus_one(x)
    changed.add_(1)
    with pytest.raises(RuntimeError, match=r"\(8, 16\) .* was changed in place after it was saved"):
        x.sum().backward()
    x = zeros()
    with pytest.raises(RuntimeError, match="changed in place"), offloading(copies):
        for _ in range(4):
            changed, x = x, plus_one(x)
            changed.add_(1)


@on_gpu
def test_memory_and_gradients_on_a_gpu():
    layers, tokens, dim = 16, 8192, 1024
    size = tokens * dim * 2  # 16 MiB
    model = Layers(layers, dim).to("cuda", torch.bfloat16)
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    context = offload_activations()
    peaks, runs = [], []
    gc.collect()  # memory of earlier tests could be freed within one of the runs
    # the first of each allocates workspaces and pins
    for mode in (torch.enable_grad(), torch.enable_grad(), context, context):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs.append(run(model, mode, lambda: model(x).float().square().mean()))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert all(equal(run, runs[0]) for run in runs)
    # two stay, one is being copied, and in the backward pass one is ahead
    assert peaks[1] - peaks[2] >= (layers - 4) * size
    assert peaks[3] <= peaks[2]
    assert len(context.buffers.free) <= layers
    assert all(buffer.is_pinned() for buffer in context.buffers.free)


# ---- the embedding


@pytest.fixture
def moved(monkeypatch) -> list[Tensor]:
    """Copies of the weight on the CPU, in place of pinned memory."""
    weights: list[Tensor] = []

    def copied(weight: Tensor) -> Tensor:
        weights.append(weight.clone())
        return weights[-1]

    monkeypatch.setattr(offload, "require_gpu", lambda what: None)
    monkeypatch.setattr(offload, "in_host_memory", copied)
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_over_host_memory(dtype, device):
    """On the CPU by numpy's protocol, which is CUDA's by another name."""
    weight = torch.randn(1000, 96).to(device, dtype)
    if device == "cuda":
        hosted = offload.in_host_memory(weight)
        ids = token_ids().cuda()
        assert torch.equal(nn.functional.embedding(ids, hosted), weight[ids])
        assert torch.equal(hosted.cpu(), weight.cpu())
    else:
        interface = offload._at_its_address(weight).__cuda_array_interface__
        array = numpy.asarray(SimpleNamespace(__array_interface__=interface))
        hosted = torch.from_numpy(array).view(dtype)
        assert hosted.data_ptr() == weight.data_ptr()
    assert (hosted.device, hosted.dtype) == (weight.device, dtype)
    assert torch.equal(hosted, weight) and torch.equal(hosted.clone(), weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", axis("llama", "qwen3", "phi"))
def test_a_model_with_a_moved_embedding_is_the_same(family, device, checkpoints, tmp_path, request):
    moved = request.getfixturevalue("moved") if device == "cpu" else []
    model: Any = load_base(str(checkpoints(family, False)), FP32, device=device)
    apply_lora(model, LoraConfig(r=4))
    ids, state = token_ids().to(device), {k: v.cpu() for k, v in model.state_dict().items()}
    logits, answer = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    weight = model.get_input_embeddings().weight
    before = torch.cuda.memory_allocated() if device == "cuda" else weight.nbytes
    offload_embedding(model)
    after = torch.cuda.memory_allocated() if device == "cuda" else 0
    assert before - after >= weight.nbytes
    assert model.get_input_embeddings().weight is weight and not weight.requires_grad
    assert [weight.data_ptr()] * len(moved) == [tensor.data_ptr() for tensor in moved]
    assert model.device.type == device and model.dtype == weight.dtype
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), answer)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value.cpu(), state[k]) for k, value in model.state_dict().items())
    model(ids, labels=ids).loss.backward()
    save_adapter(model, tmp_path / "adapter")
    assert not [n for n in load_file(tmp_path / "adapter/adapter_model.safetensors") if "emb" in n]
    if device == "cpu":
        model.resize_token_embeddings(weight.shape[0] + 3)
        assert torch.equal(model(ids).logits[..., :-3], logits)


@pytest.mark.parametrize(
    "family, settings, why",
    [("gemma", {}, "is tied to lm_head"), ("llama", None, "is trained"),
     ("llama", {"modules_to_save": ("embed_tokens",)}, "is trained or adapted"),
     ("llama", {"target_modules": ("embed_tokens", "q_proj")}, "is trained or adapted"),
     ("llama", {"trainable_token_indices": (5, 6)}, "is trained or adapted")],
    ids=str,
)  # fmt: skip
def test_an_embedding_needed_on_the_gpu_is_refused(family, settings, why, checkpoints, moved):
    model: Any = load_base(str(checkpoints(family, family == "gemma")), FP32)
    if settings is None:
        model.model.embed_tokens.weight.requires_grad_()
    else:
        apply_lora(model, LoraConfig(r=4, **settings))
    message = f"offload_embedding: model.embed_tokens {why}, and then needed on the GPU: leave it"
    with pytest.raises(UserError, match=message):
        offload_embedding(model)
    assert not moved


def test_an_embedding_shared_by_encoder_and_decoder(moved):
    model: Any = tiny_model("t5").requires_grad_(False)
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    with pytest.raises(UserError, match="shared is tied to lm_head, and then"):
        offload_embedding(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    logits = model(**inputs).logits
    offload_embedding(model)
    assert torch.equal(model(**inputs).logits, logits)
    users = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert {user.weight.data_ptr() for user in users} == {moved[0].data_ptr()}
    with pytest.raises(UserError, match="this model has no embedding of tokens: leave it out"):
        offload_embedding(nn.Linear(2, 2))
