"""Second moments against a plain sum over the tokens a layer really saw."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FP32, randomize_adapter, tiny_tokenizer
from torch import Tensor

from qlora.adapter_files import save_adapter
from qlora.adapter_reader import read_adapter
from qlora.adapters import apply_lora
from qlora.base import load_base
from qlora.calibration import OWN_LENGTH, SecondMoments, calibrate, own_text
from qlora.config import LoraConfig
from qlora.data import length_batches
from qlora.errors import UserError
from qlora.lora import lora_layers

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


def plain(model: torch.nn.Module, name: str) -> Tensor:
    """One row after the other, without padding, one token after the other."""
    seen: list[Tensor] = []
    hook = lora_layers(model)[name].register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row["input_ids"]]))
    hook.remove()
    return sum((torch.outer(x, x) for x in torch.cat(seen).double()), torch.zeros(1)).float()


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


def test_the_model_is_left_without_hooks(live):
    SecondMoments(live, length_batches(ROWS, tiny_tokenizer()), lora_layers(live)).of(
        "model.layers.0.mlp.up_proj"
    )
    assert not any(layer._forward_pre_hooks for layer in lora_layers(live).values())


@pytest.mark.parametrize("count", [1, 2])
def test_rows_are_spread_over_the_data(count, live, checkpoints, tmp_path, monkeypatch):
    save_adapter(live, tmp_path / "adapter")
    files = [tmp_path / f"{verb}.jsonl" for verb in ("say", "ask")][:count]
    for file in files:
        rows = [{"prompt": f"{file.stem} {i}", "completion": f"{i}"} for i in range(100, 200)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("qlora.calibration.MIN_TOKENS", 500)
    base = checkpoints("llama")
    adapter = read_adapter(tmp_path / "adapter")
    found = calibrate(adapter, str(base), [*map(str, files)], base, device="cpu")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in found.batches)
    assert 250 < tokens < 1000
    texts = [tiny_tokenizer().decode(ids) for batch in found.batches for ids in batch["input_ids"]]
    for file in files:
        for part in (10, 19):
            assert any(f"{file.stem} {part}" in text for text in texts)


def test_a_base_without_a_tokenizer(live, checkpoints, tmp_path):
    save_adapter(live, tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no tokenizer to calibrate with"):
        calibrate(
            read_adapter(tmp_path / "adapter"), str(checkpoints("llama")),
            [str(tmp_path / "rows.jsonl")], Path(empty), device="cpu",
        )  # fmt: skip


def test_the_model_writes_what_it_reads(live):
    """Sampled from the first token on, in full length, the same at every call."""
    before = torch.random.get_rng_state()
    (batch,) = own_text(live, 500)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert batch["input_ids"].shape == (4, OWN_LENGTH)
    assert (batch["input_ids"][:, 0] == live.generation_config.bos_token_id).all()
    assert len(batch["input_ids"][:, 1:].unique()) > 50  # nothing greedy
    assert torch.equal(own_text(live, 500)[0]["input_ids"], batch["input_ids"])
    moments = SecondMoments(live, [batch], lora_layers(live)).of("model.layers.1.mlp.down_proj")
    assert torch.isfinite(moments).all() and moments.diagonal().min() > 0
