"""Layer inputs and the embedding in host memory: equal numbers, in order, nothing left behind."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from conftest import CONFIGS, FP32, axis, on_gpu, tiny_model, token_ids
from safetensors.torch import load_file
from simulated_device import LateCopies
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.base.load import load_base
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
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
    """Checkpointed layers, all of whose inputs have a gradient function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(torch.randn(DIM, DIM) * 0.3 for _ in range(LAYERS))
        self.storages: list[Any] = []
        self.on_call: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() * 1
        for matrix in self.matrices:
            self.storages.append(weakref.ref(x.untyped_storage()))
            x = checkpoint(self.layer, x, matrix, use_reentrant=False)
        return x

    def layer(self, x: Tensor, matrix: Tensor) -> Tensor:
        self.on_call()
        return x + torch.tanh(x @ matrix)

    def gradients(self, context: Any, x: Tensor) -> list[Tensor]:
        return run(self, context, lambda: self(x).sum())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def run(model: nn.Module, context: Any, loss_of: Callable[[], Tensor]) -> list[Tensor]:
    """The gradients of one step whose forward pass is in `context`."""
    model.zero_grad()
    with context:
        loss = loss_of()
    loss.backward()
    return gradients(model)


def equal(tensors: list[Tensor], expected: list[Tensor]) -> bool:
    return len(tensors) == len(expected) and all(map(torch.equal, tensors, expected))


def batch(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(seed))


def plain_gradients(*batches: Tensor) -> list[Tensor]:
    """Summed over batches, without offloading."""
    model = Layers()
    for x in batches:
        model(x).sum().backward()
    return gradients(model)


# ---- values


@pytest.mark.parametrize("keep", axis(2, 1, 4, 9))
def test_offloaded_gradients_are_equal(copies, keep):
    context, model = offloading(copies, keep=keep), Layers()
    for seed in range(3):
        assert equal(model.gradients(context, batch(seed)), plain_gradients(batch(seed)))
    assert bool(copies.log) == (keep < LAYERS)


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


def test_several_batches_graphs_and_backward_passes(copies):
    context, batches = offloading(copies), [batch(i) for i in range(3)]
    model = Layers()
    for x in batches:
        with context:
            loss = model(x).sum()
        loss.backward()
    assert equal(gradients(model), plain_gradients(*batches))
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        model = Layers()
        with context:
            losses = [model(x).sum() for x in batches]
        for i in order:
            losses[i].backward()
        assert equal(gradients(model), plain_gradients(*(batches[i] for i in order)))
    model = Layers()
    with context:
        with context:
            loss = model(batch()).sum()
        some = torch.autograd.grad(loss, list(model.matrices)[-2:], retain_graph=True)
        assert equal(list(some), plain_gradients(batch())[-2:])
        loss.backward(retain_graph=True)
        (loss + model(batch(1)).sum()).backward()
    expected = zip(plain_gradients(batch()), plain_gradients(batch(1), batch()), strict=True)
    assert equal(gradients(model), [a + b for a, b in expected])


def test_without_gradients_nothing_is_moved(copies):
    model = Layers()
    with offloading(copies) as context, torch.no_grad():
        y = model(batch())
    assert torch.equal(y, model(batch()))
    assert not copies.log and not context._known


# ---- order and memory


ONE = nn.Parameter(torch.ones(()))


def plus_one(x: Tensor | None) -> Tensor:
    """A checkpointed layer, x + 1; without x its first input, 0."""
    if x is None:
        return torch.zeros(TOKENS, DIM) * ONE
    return torch.as_tensor(checkpoint(lambda x: x * ONE + 1, x, use_reentrant=False))


def test_order_of_copies(copies):
    """A copy starts when two newer tensors exist, one is under way at a time, one is ahead."""
    with offloading(copies):
        x = plus_one(None)  # x_i is i
        for _ in range(LAYERS):
            x = plus_one(x)
    out = ["start 0", "end 0", "start 1", "end 1", "start 2", "end 2", "start 3"]
    assert copies.log == out
    x.sum().backward()
    back = ["end 3", "start 2", "end 2", "start 1", "end 1", "start 0", "end 0"]
    assert copies.log == out + back


def test_memory_is_released_in_order_and_one_tensor_fetched_ahead(copies):
    context, model, counts = offloading(copies), Layers(), []
    held = context._known.values
    model.on_call = lambda: counts.append(sum(saved.tensor is not None for saved in held()))
    with context:
        loss = model(batch()).sum()
    assert [storage() is not None for storage in model.storages] == [False] * 3 + [True] * 3
    assert max(counts) == 3
    counts.clear()
    loss.backward()
    # the two that stayed and one ahead; then the one ahead
    assert counts == [3, 2, 1, 1, 1, 0]
    del loss
    assert not any(storage() for storage in model.storages)


def test_buffers_are_reused_for_any_length(copies):
    context, model = offloading(copies, min_bytes=1), Layers()
    for seed, tokens in enumerate((TOKENS, TOKENS, 3, TOKENS, 5)):
        model.gradients(context, batch(seed, tokens))
        assert len(copies.allocated) == 4 == len(context.buffers.free)
    model.gradients(context, batch(0, 3 * TOKENS))
    model.gradients(context, batch(0, 2 * TOKENS))
    assert copies.allocated == [SIZE] * 4 + [4 * SIZE] * 4
    assert [len(buffer) for buffer in context.buffers.free] == [4 * SIZE] * 4
    buffers = Buffers(copies.allocate)  # the smallest that fits
    for buffer in [buffers.acquire(size) for size in (1024, 4096, 2048)]:
        buffers.release(buffer)
    sizes = [len(buffers.acquire(size)) for size in (1500, 10, 4096, 5000)]
    assert sizes == [2048, 1024, 4096, 8192]


@pytest.mark.parametrize("keep, times", [(1, 1), (2, 0)])
def test_a_tensor_that_many_layers_read_is_copied_once(copies, keep, times):
    """As an encoder's output in each layer of the decoder."""
    shared = (batch().requires_grad_() * 1) + 7
    x = batch(1).requires_grad_() * 1
    with offloading(copies, keep=keep):
        for _ in range(LAYERS):
            x = checkpoint(lambda x, y: torch.tanh(x + y), x, shared, use_reentrant=False)
        loss = x.sum()
    assert sum(torch.equal(source, shared) for source in copies.sources) == times
    loss.backward()


def test_a_tensor_is_known_by_storage_view_and_version(copies):
    memory = numpy.zeros((TOKENS, DIM), dtype=numpy.float32)
    first, second = torch.from_numpy(memory), torch.from_numpy(memory)  # at one address
    saved = Saved(first, offloading(copies), lambda: None)
    assert saved.is_of(first.view(TOKENS, DIM)) and not saved.is_of(second)
    assert not saved.is_of(first[1:]) and not saved.is_of(first.T)
    first.add_(1)
    assert not saved.is_of(first)


# ---- what stays on the device


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


# ---- errors


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_leaves_no_hooks_copies_or_buffers(copies, where):
    context, model = offloading(copies), Layers()

    def broken(_: Tensor) -> Tensor:
        raise ValueError("broken")

    def two_steps() -> None:
        with context:
            x = model(batch())
            if where == "forward":
                checkpoint(broken, x, use_reentrant=False)
            x.register_hook(broken)
            loss = model(x).sum()
        loss.backward()

    with pytest.raises(ValueError, match="broken"):
        two_steps()
    x = batch().requires_grad_() * 1
    y = x * x
    assert y is not None and not context._known and not copies.waiting
    assert copies.allocated and len(context.buffers.free) == len(copies.allocated)
    assert equal(model.gradients(context, batch()), plain_gradients(batch()))


@pytest.mark.parametrize("newer", [0, 1, 2], ids=["stays", "stays too", "being copied"])
def test_a_change_in_place_raises(copies, newer):
    """As torch does where there are no hooks; in the backward pass, or when the copy starts."""
    x = changed = plus_one(None)
    with offloading(copies):
        for _ in range(newer + 1):
            x = plus_one(x)
    changed.add_(1)
    with pytest.raises(RuntimeError, match=r"\(8, 16\) .* was changed in place after it was saved"):
        x.sum().backward()
    x = plus_one(None)
    with pytest.raises(RuntimeError, match="changed in place"), offloading(copies):
        for _ in range(4):
            changed, x = x, plus_one(x)
            changed.add_(1)


def test_offloading_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"offload_activations wants a CUDA GPU.*leave it out"):
        offload_activations()
    with pytest.raises(UserError, match=r"offload_embedding wants a CUDA GPU.*leave it out"):
        offload_embedding(nn.Linear(2, 2))


# ---- the embedding


@pytest.fixture
def moved(monkeypatch) -> list[Tensor]:
    """Copies of the weight on the CPU, in place of pinned memory."""
    weights: list[Tensor] = []
    monkeypatch.setattr(offload, "require_gpu", lambda what: None)
    monkeypatch.setattr(
        offload, "in_host_memory", lambda weight: weights.append(weight.clone()) or weights[-1]
    )
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_array_interface_describes_pinned_memory(dtype):
    """numpy's protocol by another name, which numpy reads on the CPU."""
    weight = torch.randn(6, 10, dtype=dtype)

    class Array:
        __array_interface__ = offload._at_its_address(weight).__cuda_array_interface__

    array = torch.from_numpy(numpy.asarray(Array())).view(dtype)
    assert torch.equal(array, weight) and array.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("family", axis("llama", "qwen3", "phi"))
def test_a_model_with_a_moved_embedding_is_the_same(family, checkpoints, tmp_path, moved):
    model: Any = load_base(str(checkpoints(family, False)), FP32)
    apply_lora(model, LoraConfig(r=4))
    ids, names = token_ids(), [*model.state_dict()]
    logits, answer = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    weight = model.get_input_embeddings().weight
    offload_embedding(model)
    assert model.get_input_embeddings().weight is weight
    assert weight.data_ptr() == moved[0].data_ptr() and not weight.requires_grad
    assert torch.equal(model(ids).logits, logits) and [*model.state_dict()] == names
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), answer)
    save_adapter(model, tmp_path / "adapter")
    assert not [n for n in load_file(tmp_path / "adapter/adapter_model.safetensors") if "emb" in n]
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
    ids = token_ids()
    with pytest.raises(UserError, match="shared is tied to lm_head, and then"):
        offload_embedding(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    logits = model(input_ids=ids, labels=ids).logits
    offload_embedding(model)
    assert torch.equal(model(input_ids=ids, labels=ids).logits, logits)
    users = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert {user.weight.data_ptr() for user in users} == {moved[0].data_ptr()}
    with pytest.raises(UserError, match="this model has no embedding of tokens: leave it out"):
        offload_embedding(nn.Linear(2, 2))


# ---- on a GPU


class Blocks(nn.Module):
    """Layers without attention, whose kernels sum in one order."""

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


@on_gpu
def test_memory_and_gradients_on_a_gpu():
    layers, tokens, dim = 16, 8192, 1024
    size = tokens * dim * 2  # 16 MiB
    model = Blocks(layers, dim).to("cuda", torch.bfloat16)
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    context = offload_activations()
    peaks, runs = [], []
    # the first of each allocates workspaces and pins
    for mode in (torch.enable_grad(), torch.enable_grad(), context, context):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with mode:
            loss = model(x.clone().requires_grad_() * 1).float().square().mean()
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        runs.append(gradients(model))
    assert all(equal(run, runs[0]) for run in runs)
    # two stay, one is being copied, and in the backward pass one is ahead
    assert peaks[1] - peaks[2] >= (layers - 4) * size
    assert peaks[3] <= peaks[2]
    assert len(context.buffers.free) <= layers
    assert all(buffer.is_pinned() for buffer in context.buffers.free)


@on_gpu
def test_many_steps_on_a_gpu_while_python_is_ahead():
    """Small layers, so that only the order on the streams keeps values apart."""
    model = Blocks(24, 256).to("cuda")
    batches = [torch.randn(n, 256, device="cuda") for n in (1024, 2048, 1500, 4096)] * 3
    runs = []
    for context in (torch.enable_grad(), offload_activations(min_bytes=1, keep=1)):
        model.zero_grad()
        for x in batches:
            with context:
                loss = model(x.clone().requires_grad_() * 1).square().sum()
            loss.backward()
        runs.append(gradients(model))
    assert equal(runs[1], runs[0])


@on_gpu
def test_memory_is_not_reused_while_copies_write_to_it_on_a_gpu():
    model = Blocks(12, 512).to("cuda")
    x = torch.randn(4096, 512, device="cuda").requires_grad_()
    context = offload_activations(min_bytes=1)

    def broken(gradient: Tensor) -> Tensor:
        raise ValueError("broken")

    for _ in range(5):
        with context:
            y = model(x * 1)
            y.register_hook(broken)
            loss = model(y).sum()
        with pytest.raises(ValueError, match="broken"):
            loss.backward()
        del y, loss
        others = [torch.full((4096, 512), 7.0, device="cuda") for _ in range(24)]
        torch.cuda.synchronize()
        assert all(bool((other == 7).all()) for other in others)


@on_gpu
def test_the_embedding_in_host_memory_on_a_gpu(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=65536, num_attention_heads=4, pad_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model: Any = load_base(str(tmp_path), QuantConfig())
    apply_lora(model, LoraConfig(r=4))
    ids = token_ids().cuda()
    logits, answer = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    before, weight = torch.cuda.memory_allocated(), model.model.embed_tokens.weight
    values = weight.detach().cpu()
    offload_embedding(model)
    assert before - torch.cuda.memory_allocated() >= weight.nbytes
    assert model.device.type == "cuda" and model.dtype == weight.dtype
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), answer)
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"].cpu(), values)
    model(ids, labels=ids).loss.backward()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        table = torch.randn(1000, 96, device="cuda", dtype=dtype)
        hosted = offload.in_host_memory(table)
        assert (hosted.device, hosted.dtype, hosted.shape) == (table.device, dtype, table.shape)
        assert torch.equal(nn.functional.embedding(ids, hosted), table[ids])
        assert torch.equal(hosted.cpu(), table.cpu()) and torch.equal(hosted.clone(), table)
