"""RMSNorms that keep less, against those of transformers' models and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICES, FP32, adapted_model, axis, on_gpu, tiny_model, token_ids
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from qlora import LoraConfig, apply_lora, load_base, unload
from qlora.fast import layers
from qlora.fast.layers import RMSNorm, put_norms, rms_norm_form
from qlora.training import prepare_for_training

IDS = token_ids(rows=2, length=16)
DTYPES = axis(torch.float32, torch.bfloat16, torch.float16)
NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "mistral": 5, "gemma": 9, "phi": 0, "gpt2": 0}


@pytest.fixture
def has_kernel(request, monkeypatch):
    """F.rms_norm computes the same on a CPU, if not by one kernel."""
    if getattr(request, "param", True):
        monkeypatch.setattr(layers, "HAS_KERNEL", ("cpu", "cuda"))


def case(
    dtype: torch.dtype, device: str = "cpu", dim: int = 64, kind: Any = LlamaRMSNorm
) -> tuple[Any, Any, Tensor]:
    """A norm, its wrapper and an input."""
    torch.manual_seed(0)
    norm = kind(dim, 1e-5).requires_grad_(False)
    norm.weight.add_(torch.randn(dim) * 0.3)
    x = torch.randn(33, dim).to(device, dtype).requires_grad_()
    return norm.to(device, dtype), RMSNorm(norm, 1e-5, float(kind is Gemma2RMSNorm)), x


def value_and_gradient(norm: Any, x: Tensor) -> list[Tensor]:
    """y and the gradient of sum(y * cos) in x."""
    y = norm(x)
    assert y.dtype == x.dtype
    upstream = torch.arange(x.numel(), device=x.device).view_as(x).cos().to(x.dtype)
    return [y.detach(), *torch.autograd.grad(y, x, upstream)]


def errors(norm: Any, wrapper: Any, x: Tensor) -> list[tuple[float, float]]:
    """Of the wrapper's y and its gradient, and of the norm's, against float64."""
    weight = norm.weight.double() + isinstance(norm, Gemma2RMSNorm)
    exact = value_and_gradient(
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight,
        x.detach().double().requires_grad_(),
    )
    values = zip(value_and_gradient(wrapper, x), value_and_gradient(norm, x), exact, strict=True)
    return [tuple(float((a.double() - c).norm() / c.norm()) for a in ab) for *ab, c in values]


def gradients_of(model: Any) -> list[Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def kept(call: Callable[[], Any]) -> int:
    """Bytes of all storages that are kept for the backward pass of `call`."""
    alive: dict[int, Any] = {}  # so that no address is used again

    def keep(t: Tensor) -> Tensor:
        alive[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = call()
    assert result is not None
    return sum(t.untyped_storage().nbytes() for t in alive.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_kernel_is_as_exact_as_the_models(dtype, device, has_kernel):
    # in fp32 the same sums, maybe in another order
    slack = 1.2 if dtype == torch.float32 else 1.0
    for ours, plain in errors(*case(dtype, device)):
        assert ours <= slack * plain and ours <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "kind, size, small_weights",  # 1e-3: that of sqrt(eps); small weights cost no digits
    [(LlamaRMSNorm, 1.0, False), (LlamaRMSNorm, 1e-3, False), (Gemma2RMSNorm, 1e3, False),
     (LlamaRMSNorm, 1.0, True)],
)  # fmt: skip
def test_from_its_output_a_norm_is_as_exact_as_the_models(kind, size, small_weights):
    norm, wrapper, x = case(torch.float32, dim=576, kind=kind)
    x.data *= size
    if small_weights:
        norm.weight.mul_(torch.logspace(-25, 0, 576))
    assert "_FromOutput" in type(wrapper(x).grad_fn).__name__
    (y, plain_y), (dx, plain_dx) = errors(norm, wrapper, x)
    # y by the same operations; dx by fewer, which round otherwise
    assert y == plain_y and dx <= 1.05 * plain_dx


@pytest.mark.parametrize("tiny", [0.0, 1e-33, -1e-42])
def test_a_weight_too_small_to_divide_by(tiny):
    norm, wrapper, x = case(torch.float32)
    norm.weight[5] = tiny
    assert kept(lambda: wrapper(x)) == kept(lambda: norm(x)) >= 4 * x.numel()
    assert all(map(torch.equal, value_and_gradient(wrapper, x), value_and_gradient(norm, x)))


def test_gradcheck():
    _, wrapper, x = case(torch.float64, dim=8)
    x = x.detach()[:6].view(3, 2, 8).transpose(0, 1)  # as a head's norm may get it
    assert torch.autograd.gradcheck(wrapper, x.requires_grad_())


def test_a_norm_keeps_only_what_the_next_layer_keeps():
    norm, wrapper, x = case(torch.float32)
    after = nn.Linear(64, 8, bias=False)  # keeps y, for its weight's gradient
    weights, size, per_row = 4 * (64 + 8 * 64), 4 * x.numel(), 4 * len(x)
    assert kept(lambda: after(norm(x))) == 2 * size + per_row + weights
    assert kept(lambda: after(wrapper(x))) == size + per_row + weights
    y = wrapper(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_input_is_kept_in_16_bits_on_a_gpu(dtype):
    norm, wrapper, x = case(dtype, "cuda", 4096)
    few = 2 * norm.weight.nbytes + 8 * len(x)  # w, and a number a row
    assert kept(lambda: wrapper(x)) <= x.nbytes + few
    assert kept(lambda: norm(x)) >= 2 * x.nbytes


@pytest.mark.parametrize("family", axis("gemma", "llama", "qwen3"))
def test_a_model_keeps_less_by_the_inputs_of_norms(family, checkpoints, monkeypatch):
    totals, gradients = [], []
    for _ in ("with norms", "without"):
        model: Any = adapted_model(checkpoints(family))
        prepare_for_training(model, gradient_checkpointing=False)
        totals.append(kept(lambda m=model: m(input_ids=IDS, labels=IDS).loss))
        gradients.append(gradients_of(model))
        monkeypatch.setattr(layers, "put_norms", lambda _: None)
    # Two of each of two layers; but the first one's x is the embedding's and has no gradient. What
    # is behind q_norm and k_norm, and Gemma's norms after a block, keeps no y: x and y are even.
    assert totals[1] - totals[0] == 3 * 4 * IDS.numel() * model.config.hidden_size
    # fp32 in another order, through two layers
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("has_kernel", [True, False], indirect=True)
@pytest.mark.parametrize("family", NORMS)
def test_norms_of_models_are_wrapped(family, has_kernel):
    model: Any = tiny_model(family).requires_grad_(False)
    wanted = model(IDS).logits
    put_norms(model)
    put_norms(model)  # once is enough
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == NORMS[family] and not any(isinstance(n.base_layer, RMSNorm) for n in norms)
    # fp32 in another order, through two layers
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-5)


def other(forward: Any) -> nn.Module:
    return type("Other", (LlamaRMSNorm,), {"forward": forward})(64)  # type: ignore[no-any-return]


def eps_outside(self: Any, x: Tensor) -> Any:
    return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_norms_are_not_wrapped(dtype):
    centred = other(lambda self, x: LlamaRMSNorm.forward(self, x - x.mean(-1, keepdim=True)))
    gated = other(lambda self, x, gate=None: LlamaRMSNorm.forward(self, x))  # as Mamba's
    of_heads = other(lambda self, x: LlamaRMSNorm.forward(self, x.unflatten(-1, (x.shape[2], 16))))
    others = [centred, gated, of_heads, other(eps_outside), nn.LayerNorm(64, bias=False),
              nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64)]  # fmt: skip
    for module in others:
        assert rms_norm_form(module.to(dtype).requires_grad_(False)) is None, module
    for kind, offset in ((LlamaRMSNorm, 0), (T5LayerNorm, 0), (Gemma2RMSNorm, 1)):
        module = kind(64, 1e-4).to(dtype)
        assert rms_norm_form(module) is None  # trained
        assert rms_norm_form(module.requires_grad_(False)) == (1e-4, offset)
        module.register_forward_hook(lambda *_: None)
        assert rms_norm_form(module) is None


def test_16_bit_norms_are_the_models_without_a_kernel_or_where_trained(monkeypatch):
    norm, wrapper, x = case(torch.bfloat16)
    gemma, gemma_wrapper, _ = case(torch.bfloat16, kind=Gemma2RMSNorm)
    for kernels in ((), ("cpu", "cuda")):
        monkeypatch.setattr(layers, "HAS_KERNEL", kernels)
        # torch's rounds less often; for 1 + w it would need a weight that is rounded once more
        assert torch.equal(wrapper(x), norm(x)) == (not kernels)
        assert torch.equal(gemma_wrapper(x), gemma(x))
    assert torch.equal(wrapper(x.float()), norm(x.float()))
    norm.weight.requires_grad_()
    assert torch.equal(wrapper(x), norm(x))
    wrapper(x).sum().backward()
    assert norm.weight.grad.norm() > 0


def test_adapters_that_train_norms(checkpoints, has_kernel):
    runs = []
    for norms_are_put, expected in (("never", 0), ("before", 5), ("after", 4)):
        model = load_base(str(checkpoints("llama")), FP32)
        if norms_are_put == "before":
            put_norms(model.requires_grad_(False))
        settings = LoraConfig(r=4, modules_to_save=("model.norm",))
        apply_lora(model, settings, generator=torch.Generator().manual_seed(0))
        prepare_for_training(model, fast_path=norms_are_put != "never")
        assert sum(isinstance(module, RMSNorm) for module in model.modules()) == expected
        # fp32 in another order, through two layers; A's is 0, as B is
        runs.append(gradients_of(model))
        torch.testing.assert_close(runs[-1], runs[0], rtol=1e-4, atol=1e-6)
        unload(model)
        assert not any(isinstance(module, RMSNorm) for module in model.modules())
