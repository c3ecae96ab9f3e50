"""RMSNorms that are computed by torch's kernel, against those of transformers' models."""

from typing import Any

import pytest
import torch
from conftest import FP32, tiny_model, token_ids
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from qlora import norms
from qlora.adapters import apply_lora
from qlora.base import load_base
from qlora.config import LoraConfig
from qlora.merging import unload
from qlora.norms import RMSNorm, put_norms, rms_norm_eps
from qlora.training import prepare_for_training

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9, "mistral": 5, "gemma": 0, "phi": 0, "gpt2": 0}


@pytest.fixture
def on_cpus(monkeypatch):
    """There the same function is to be had, if no kernel."""
    monkeypatch.setattr(norms, "HAS_KERNEL", ("cpu", "cuda"))


def case(dtype: torch.dtype, device: str = "cpu", dim: int = 64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(dim, 1e-5).requires_grad_(False)
    norm.weight.add_(torch.randn(dim) * 0.3)
    return norm.to(device, dtype), torch.randn(33, dim).to(device, dtype)


def exact(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and the gradient of sum(y * cos) in float64."""
    x = x.detach().double().requires_grad_()
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_no_further_off_than_the_models_own(dtype, device):
    norm, x = case(dtype, device)
    wanted = exact(norm, x)
    ours, plain = (errors(n, x, wanted) for n in (RMSNorm(norm, 1e-5), norm))
    # in fp32 the same sums, maybe in another order
    slack = 1.2 if dtype == torch.float32 else 1.0
    assert all(a <= slack * b for a, b in zip(ours, plain, strict=True))
    assert max(ours) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("family", NORMS)
def test_norms_of_models_are_known(family, on_cpus):
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
    others = [Centred(64), EpsOutside(64, 1e-5), Gemma2RMSNorm(64), nn.LayerNorm(64, bias=False),
              Gated(64), nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64)]  # fmt: skip
    for module in others:
        assert rms_norm_eps(module.to(dtype).requires_grad_(False)) is None, module
    for module in (LlamaRMSNorm(64, 1e-4), T5LayerNorm(64, 1e-4)):
        assert rms_norm_eps(module.to(dtype)) is None  # trained
        assert rms_norm_eps(module.requires_grad_(False)) == 1e-4
        module.register_forward_hook(lambda *_: None)
        assert rms_norm_eps(module) is None


def test_a_norm_that_comes_to_be_trained_is_the_models_own():
    norm, x = case(torch.bfloat16)
    wrapper = RMSNorm(norm, 1e-5)
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


def test_norms_stay_as_they_are_where_there_is_no_kernel():
    model: Any = tiny_model("llama").requires_grad_(False)
    put_norms(model)
    assert not any(isinstance(m, RMSNorm) for m in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_x_is_kept_as_it_is(dtype):
    norm, x = case(dtype, "cuda", 4096)
    kept = []
    for module in (RMSNorm(norm, 1e-5), norm):
        storages: dict[int, int] = {}

        def keep(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.data_ptr()] = t.numel() * t.element_size()
            return t

        leaf = x.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(leaf)
        kept.append(sum(storages.values()))
    few = 2 * norm.weight.numel() * x.element_size() + 8 * len(x)  # w, and a number a row
    assert kept[0] <= x.numel() * x.element_size() + few
    assert kept[1] >= 2 * x.numel() * x.element_size()
