"""Second moments against a plain sum over the tokens a layer really saw."""

import pytest
import torch
from conftest import FP32, randomize_adapter, tiny_tokenizer
from torch import Tensor

from qlora.adapters.apply import apply_lora
from qlora.adapters.lora import lora_layers
from qlora.adapters.starts import MAX_BYTES, SecondMoments, moments_budget
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.data.rows import length_batches

ROWS = [
    {"input_ids": [3, 40, 41, 2], "labels": [-100, 40, 41, 2]},
    {"input_ids": [3, 50, 51, 52, 53, 54, 2], "labels": [-100, 50, 51, 52, 53, 54, 2]},
    {"input_ids": [3, 60, 2], "labels": [-100, 60, 2]},
]


@pytest.fixture
def live(checkpoints):
    model = apply_lora(load_base(str(checkpoints("llama")), FP32), LoraConfig(r=4))
    randomize_adapter(model)
    return model.eval()


def inputs(model: torch.nn.Module, name: str) -> Tensor:
    """What a layer reads, one row after the other, without padding, float64 (tokens, in)."""
    seen: list[Tensor] = []
    hook = lora_layers(model)[name].register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row["input_ids"]]))
    hook.remove()
    return torch.cat(seen).double()


def plain(model: torch.nn.Module, name: str) -> Tensor:
    """One token after the other."""
    return sum((torch.outer(x, x) for x in inputs(model, name)), torch.zeros(1)).float()


@pytest.mark.parametrize("max_bytes", [1 << 30, 1])
def test_moments_are_the_sum_over_real_tokens(live, max_bytes):
    moments = SecondMoments(
        live, length_batches(ROWS, tiny_tokenizer()), lora_layers(live), max_bytes=max_bytes
    )
    for name in lora_layers(live):
        torch.testing.assert_close(moments.of(name), plain(live, name), rtol=1e-4, atol=1e-5)
    assert len(moments.groups) == (1 if max_bytes > 1 else len(lora_layers(live)))


def test_layers_that_read_one_input_share_its_moments(live):
    moments = SecondMoments(live, length_batches(ROWS, tiny_tokenizer()), lora_layers(live))
    layer = "model.layers.1"
    q, k, v = (moments.of(f"{layer}.self_attn.{name}_proj") for name in "qkv")
    assert q is k is v
    assert moments.of(f"{layer}.mlp.gate_proj") is moments.of(f"{layer}.mlp.up_proj")
    assert q is not moments.of(f"{layer}.self_attn.o_proj")


def test_a_group_holds_no_more_than_asked(live):
    wide, narrow = 4 * 128**2, 4 * 64**2  # down_proj reads 128 values, all others 64
    moments = SecondMoments(
        live, length_batches(ROWS, tiny_tokenizer()), lora_layers(live), max_bytes=wide + narrow
    )
    for group in moments.groups:
        assert sum(wide if "down" in n else narrow for n in set(group.values())) <= wide + narrow
    assert [n for group in moments.groups for n in group] == list(lora_layers(live))


@pytest.mark.parametrize(("free", "wanted"), [(3 << 30, 3 << 29), (100 << 30, MAX_BYTES)])
def test_a_small_gpu_gives_half_of_what_is_free(monkeypatch, free, wanted):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 8 << 30))
    assert moments_budget(torch.device("cuda")) == wanted
    assert moments_budget(torch.device("cpu")) == MAX_BYTES


def test_the_covariance_is_that_of_the_tokens_less_their_mean(live):
    moments = SecondMoments(live, length_batches(ROWS, tiny_tokenizer()), lora_layers(live))
    name = "model.layers.1.mlp.down_proj"
    x = inputs(live, name)
    wanted = ((len(x) - 1) * torch.cov(x.T)).float()
    torch.testing.assert_close(moments.all_of(name).covariance(), wanted, rtol=1e-4, atol=1e-5)
    assert moments.all_of(name).tokens == len(x)


def test_the_model_is_left_without_hooks(live):
    SecondMoments(live, length_batches(ROWS, tiny_tokenizer()), lora_layers(live)).of(
        "model.layers.0.mlp.up_proj"
    )
    assert not any(layer._forward_pre_hooks for layer in lora_layers(live).values())
