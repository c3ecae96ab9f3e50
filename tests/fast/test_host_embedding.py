"""The embedding in host memory: nobody notices but the GPU's memory."""

from typing import Any

import numpy
import pytest
import torch
from conftest import CONFIGS, FP32, tiny_model, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.base.load import load_base
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.fast import offload as host_embedding
from qlora.fast.offload import _Pinned, in_host_memory, offload_embedding

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def elsewhere(monkeypatch) -> list[Tensor]:
    """On a CPU another place in memory stands for the host's."""
    moved: list[Tensor] = []
    monkeypatch.setattr(host_embedding, "require_gpu", lambda what: None)
    monkeypatch.setattr(
        host_embedding, "in_host_memory", lambda weight: moved.append(weight.clone()) or moved[-1]
    )
    return moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pinned_memory_is_described_as_it_is(dtype):
    """The protocol is numpy's, but for its name; numpy reads it on the CPU."""
    weight = torch.randn(6, 10, dtype=dtype)

    class Array:
        __array_interface__ = _Pinned(weight).__cuda_array_interface__

    found = torch.from_numpy(numpy.asarray(Array())).view(dtype)
    assert torch.equal(found, weight) and found.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_the_model_stays_what_it_is(family, base_of, tmp_path, elsewhere):
    model: Any = load_base(str(base_of(family, False)), FP32)
    apply_lora(model, LoraConfig(r=4))
    ids, names = token_ids(), [*model.state_dict()]
    wanted, said = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    parameter = model.get_input_embeddings().weight
    offload_embedding(model)
    assert model.get_input_embeddings().weight is parameter
    assert parameter.data_ptr() == elsewhere[0].data_ptr() and not parameter.requires_grad
    assert torch.equal(model(ids).logits, wanted) and [*model.state_dict()] == names
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), said)
    save_adapter(model, tmp_path / "adapter")
    assert not [n for n in load_file(tmp_path / "adapter/adapter_model.safetensors") if "emb" in n]
    model.resize_token_embeddings(parameter.shape[0] + 3)
    assert torch.equal(model(ids).logits[..., :-3], wanted)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        (
            "gemma",
            {},
            "model.embed_tokens is tied to lm_head, and then needed on the GPU",
        ),
        (
            "llama",
            {"modules_to_save": ("embed_tokens",)},
            "model.embed_tokens is trained or adapted, and then needed on the GPU",
        ),
        (
            "llama",
            {"target_modules": ("embed_tokens", "q_proj")},
            "model.embed_tokens is trained or adapted, and then needed on the GPU",
        ),
        (
            "llama",
            {"trainable_token_indices": (5, 6)},
            "model.embed_tokens is trained or adapted, and then needed on the GPU",
        ),
    ],
    ids=str,
)
def test_an_embedding_that_is_needed_whole(family, settings, why, base_of, elsewhere):
    model = load_base(str(base_of(family, family == "gemma")), FP32)
    apply_lora(model, LoraConfig(r=4, **settings))
    with pytest.raises(UserError) as error:
        offload_embedding(model)
    assert str(error.value) == f"offload_embedding: {why}: leave it out"
    assert not elsewhere


def test_one_that_encoder_and_decoder_share(elsewhere):
    model: Any = tiny_model("t5").requires_grad_(False)
    ids = token_ids()
    with pytest.raises(UserError, match="shared is tied to lm_head, and then"):
        offload_embedding(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    wanted = model(input_ids=ids, labels=ids).logits
    offload_embedding(model)
    assert torch.equal(model(input_ids=ids, labels=ids).logits, wanted)
    used = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert {one.weight.data_ptr() for one in used} == {elsewhere[0].data_ptr()}


def test_an_embedding_that_gets_a_gradient(elsewhere):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with pytest.raises(UserError, match=r"model.embed_tokens is trained, and then needed"):
        offload_embedding(model)


def test_a_model_without_an_embedding(elsewhere):
    with pytest.raises(UserError, match="this model has no embedding of tokens: leave it out"):
        offload_embedding(nn.Linear(2, 2))


def test_it_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="offload_embedding wants a CUDA GPU"):
        offload_embedding(nn.Linear(2, 2))


# ---- on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_read_from_host_memory(dtype):
    weight = torch.randn(1000, 96, device="cuda", dtype=dtype)
    before = torch.cuda.memory_allocated()
    found = in_host_memory(weight)
    assert torch.cuda.memory_allocated() == before
    assert (found.device, found.dtype, found.shape) == (weight.device, dtype, weight.shape)
    ids = torch.randint(0, 1000, (4, 50), device="cuda")
    assert torch.equal(nn.functional.embedding(ids, found), nn.functional.embedding(ids, weight))
    assert torch.equal(found.cpu(), weight.cpu()) and torch.equal(found.clone(), weight)


@pytest.mark.gpu
@needs_gpu
def test_memory_on_a_gpu_falls_by_the_embedding(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=65536, num_attention_heads=4, pad_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model: Any = load_base(str(tmp_path), QuantConfig())
    apply_lora(model, LoraConfig(r=4))
    ids = token_ids().cuda()
    wanted, said = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    before, weight = torch.cuda.memory_allocated(), model.model.embed_tokens.weight
    offload_embedding(model)
    assert before - torch.cuda.memory_allocated() >= weight.nbytes
    assert model.device.type == "cuda" and model.dtype == weight.dtype
    assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), said)
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"].cpu(), weight.cpu())
    model(ids, labels=ids).loss.backward()
