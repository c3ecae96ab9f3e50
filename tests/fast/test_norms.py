"""RMSNorms that keep less, against those of transformers' models and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FP32, randomize_adapter, tiny_model, token_ids
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from qlora.adapters.apply import apply_lora
from qlora.adapters.fuse import unload
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.fast import layers as norms
from qlora.fast.layers import Form, RMSNorm, put_norms, rms_norm_form
from qlora.training import prepare_for_training
from qlora.training import run as training

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IDS = token_ids(rows=2, length=16)
NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "mistral": 5, "gemma": 9, "phi": 0, "gpt2": 0}


@pytest.fixture
def on_cpus(monkeypatch):
    """There the same function is to be had, if no kernel."""
    monkeypatch.setattr(norms, "HAS_KERNEL", ("cpu", "cuda"))


def case(
    dtype: torch.dtype, device: str = "cpu", dim: int = 64, kind: Any = LlamaRMSNorm
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    norm = kind(dim, 1e-5).requires_grad_(False)
    norm.weight.add_(torch.randn(dim) * 0.3)
    return norm.to(device, dtype), torch.randn(33, dim).to(device, dtype)


def exact(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and the gradient of sum(y * cos) in float64."""
    x = x.detach().double().requires_grad_()
    weight = norm.weight.double() + isinstance(norm, Gemma2RMSNorm)
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    return y.detach(), torch.autograd.grad(y, x, upstream(x))[0]


def upstream(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), device=x.device).view_as(x).cos().to(x.dtype)


def errors(norm: nn.Module, x: Tensor, wanted: tuple[Tensor, Tensor]) -> list[float]:
    x = x.detach().requires_grad_()
    y = norm(x)
    assert y.dtype == x.dtype
    found = y.detach(), torch.autograd.grad(y, x, upstream(x))[0]
    pairs = zip(found, wanted, strict=True)
    return [float((got.double() - w).norm() / w.norm()) for got, w in pairs]


def kept(call: Callable[[], Any]) -> dict[int, int]:
    """Bytes of every storage that is kept for the backward pass of `call`, by its address."""
    found: dict[int, int] = {}
    alive = []  # so that no address is used again

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        alive.append(call())
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torchs_is_no_further_off_than_the_models_own(dtype, device, on_cpus):
    norm, x = case(dtype, device)
    wanted = exact(norm, x)
    ours, plain = (errors(n, x, wanted) for n in (RMSNorm(norm, Form(1e-5)), norm))
    # in fp32 the same sums, maybe in another order
    slack = 1.2 if dtype == torch.float32 else 1.0
    assert all(a <= slack * b for a, b in zip(ours, plain, strict=True))
    assert max(ours) <= torch.finfo(dtype).eps


# ---- in fp32 on a CPU, from what it gives


@pytest.mark.parametrize("size", [1.0, 1e3, 1e-3])  # that of sqrt(eps), last
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_from_what_it_gives_it_is_no_further_off_than_the_models_own(kind, size):
    norm, x = case(torch.float32, dim=576, kind=kind)
    x *= size
    wanted = exact(norm, x)
    wrapper = RMSNorm(norm, rms_norm_form(norm))
    ours, plain = errors(wrapper, x, wanted), errors(norm, x, wanted)
    assert "_FromOutput" in type(wrapper(x.requires_grad_()).grad_fn).__name__
    # y by the same operations; dx by fewer, whose roundings fall otherwise
    assert ours[0] == plain[0] and ours[1] <= 1.05 * plain[1]


def test_small_weights_cost_no_digits():
    norm, x = case(torch.float32, dim=576)
    norm.weight.mul_(torch.logspace(-25, 0, 576))
    wanted = exact(norm, x)
    wrapper = RMSNorm(norm, Form(1e-5))
    ours, plain = errors(wrapper, x, wanted), errors(norm, x, wanted)
    assert "_FromOutput" in type(wrapper(x.requires_grad_()).grad_fn).__name__
    assert ours[0] == plain[0] and ours[1] <= 1.05 * plain[1]


@pytest.mark.parametrize("tiny", [0.0, 1e-33, -1e-42])
def test_with_a_weight_too_small_to_divide_by_it_is_the_models_own(tiny):
    norm, x = case(torch.float32)
    norm.weight[5] = tiny
    wrapper = RMSNorm(norm, Form(1e-5))
    gradients = []
    for module in (wrapper, norm):
        leaf = x.detach().requires_grad_()
        assert sum(kept(lambda m=module, leaf=leaf: m(leaf)).values()) >= 4 * x.numel()
        gradients += torch.autograd.grad(module(leaf).sum(), leaf)
    assert torch.equal(*gradients)


def test_its_gradient_is_the_right_one_by_differences():
    norm, x = case(torch.float64, dim=8)
    x = x[:6].view(3, 2, 8).transpose(0, 1).requires_grad_()  # as a head's norm may get it
    assert torch.autograd.gradcheck(RMSNorm(norm, Form(1e-5)), x)


def test_it_keeps_nothing_but_what_the_next_layer_keeps():
    norm, x = case(torch.float32)
    x.requires_grad_()
    after = nn.Linear(64, 8, bias=False)  # its weight is wanted a gradient, so that it keeps y
    weights = 4 * (64 + 8 * 64)
    size, a_row = 4 * x.numel(), 4 * len(x)
    assert sum(kept(lambda: after(norm(x))).values()) == 2 * size + a_row + weights
    assert sum(kept(lambda: after(RMSNorm(norm, Form(1e-5))(x))).values()) == size + a_row + weights


def test_who_changes_y_in_place_is_told():
    norm, x = case(torch.float32)
    y = RMSNorm(norm, Form(1e-5))(x.requires_grad_())
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_model_keeps_less_by_the_input_of_norms_before_adapters(family, checkpoints, monkeypatch):
    totals, gradients = [], []
    for _ in ("with norms", "without"):
        model: Any = load_base(str(checkpoints(family)), FP32)
        apply_lora(model, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
        randomize_adapter(model)
        prepare_for_training(model, gradient_checkpointing=False)
        totals.append(sum(kept(lambda m=model: m(input_ids=IDS, labels=IDS).loss).values()))
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        monkeypatch.setattr(training, "put_norms", lambda _: None)
    # two a layer, of two; but the first one's x is the embedding's and has no gradient. What is
    # behind q_norm and k_norm, and Gemma's norms after a block, keeps no y: there x and y are even.
    assert totals[1] - totals[0] == 3 * 4 * IDS.numel() * model.config.hidden_size
    for got, wanted in zip(*gradients, strict=True):
        # fp32 in another order, through two layers
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


# ---- which norms


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("family", NORMS)
def test_norms_of_models_are_known(family, kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(norms, "HAS_KERNEL", ("cpu", "cuda"))
    model: Any = tiny_model(family).requires_grad_(False)
    wanted = model(token_ids()).logits
    put_norms(model)
    put_norms(model)  # once is enough
    found = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(found) == NORMS[family] and not any(isinstance(n.base_layer, RMSNorm) for n in found)
    # fp32 in another order, through two layers
    torch.testing.assert_close(model(token_ids()).logits, wanted, rtol=0, atol=1e-5)


class Centred(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Gated(LlamaRMSNorm):
    """As Mamba's, which may be called without its gate."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class EpsOutside(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_rms_norm_is_not_taken_for_one(dtype):
    others = [Centred(64), EpsOutside(64, 1e-5), nn.LayerNorm(64, bias=False),
              Gated(64), nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64)]  # fmt: skip
    for module in others:
        assert rms_norm_form(module.to(dtype).requires_grad_(False)) is None, module
    for kind, offset in ((LlamaRMSNorm, 0), (T5LayerNorm, 0), (Gemma2RMSNorm, 1)):
        module = kind(64, 1e-4).to(dtype)
        assert rms_norm_form(module) is None  # trained
        assert rms_norm_form(module.requires_grad_(False)) == (1e-4, offset)
        module.register_forward_hook(lambda *_: None)
        assert rms_norm_form(module) is None


def test_a_norm_that_comes_to_be_trained_is_the_models_own(on_cpus):
    norm, x = case(torch.bfloat16)
    wrapper = RMSNorm(norm, Form(1e-5))
    assert not torch.equal(wrapper(x), norm(x))  # one rounding less
    assert torch.equal(wrapper(x.float()), norm(x.float()))
    norm.weight.requires_grad_()
    assert torch.equal(wrapper(x), norm(x))
    wrapper(x).sum().backward()
    assert norm.weight.grad.norm() > 0


@pytest.mark.parametrize("adapter_first", [True, False])
def test_adapters_that_train_norms(adapter_first, checkpoints, on_cpus):
    settings = LoraConfig(r=4, modules_to_save=("model.norm",))
    gradients = []
    for with_norms in (True, False):
        model = load_base(str(checkpoints("llama")), FP32)
        if with_norms and not adapter_first:
            put_norms(model.requires_grad_(False))
        apply_lora(model, settings, generator=torch.Generator().manual_seed(0))
        prepare_for_training(model, fast_path=with_norms)
        assert sum(isinstance(m, RMSNorm) for m in model.modules()) == (
            (4 if adapter_first else 5) if with_norms else 0
        )
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for got, wanted in zip(*gradients, strict=True):
        # fp32 in another order, through two layers; A's is 0, as B is
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    unload(model)
    assert not any(isinstance(m, RMSNorm) for m in model.modules())


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_16_bit_norms_without_a_kernel_are_the_models_own(kind, kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(norms, "HAS_KERNEL", ("cpu", "cuda"))
    norm, x = case(torch.bfloat16, kind=kind)
    is_own = torch.equal(RMSNorm(norm, rms_norm_form(norm))(x), norm(x))
    # torch's rounds less often; for 1 + w it would want a weight that is rounded once more
    assert is_own == (kind is Gemma2RMSNorm or not kernel)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_x_is_kept_as_it_is(dtype):
    norm, x = case(dtype, "cuda", 4096)
    x.requires_grad_()
    ours, plain = (sum(kept(lambda m=m: m(x)).values()) for m in (RMSNorm(norm, Form(1e-5)), norm))
    few = 2 * norm.weight.numel() * x.element_size() + 8 * len(x)  # w, and a number a row
    assert ours <= x.numel() * x.element_size() + few
    assert plain >= 2 * x.numel() * x.element_size()
