"""What the merge to 4 bits reads, and what it says where it cannot."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FP32, randomize_adapter, tiny_tokenizer

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.adapters.format import read_adapter
from qlora.adapters.lora import lora_layers
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.errors import UserError
from qlora.merge.measure import OWN_LENGTH, SecondMoments, calibrate, own_text


@pytest.fixture
def live(checkpoints):
    model = apply_lora(load_base(str(checkpoints("llama")), FP32), LoraConfig(r=4))
    randomize_adapter(model)
    return model.eval()


@pytest.mark.parametrize("count", [1, 2])
def test_rows_are_spread_over_the_data(count, live, checkpoints, tmp_path, monkeypatch):
    save_adapter(live, tmp_path / "adapter")
    files = [tmp_path / f"{verb}.jsonl" for verb in ("say", "ask")][:count]
    for file in files:
        rows = [{"prompt": f"{file.stem} {i}", "completion": f"{i}"} for i in range(100, 200)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("qlora.merge.measure.MIN_TOKENS", 500)
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
    with pytest.raises(UserError, match="holds no tokenizer"):
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
