"""Verification, --min-kept, --onto auto, and calibration."""

import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from chunks import Sizes, chunks_of
from conftest import FP32, larger_tokenizer, tiny_tokenizer, write_rows
from merging import merged, refused, report_of, rows_file, run_merge, trained
from merging import trained_on as trained_on
from transformers import AutoModelForCausalLM

from qlora import UserError, load_base
from qlora.adapters.format import read_adapter
from qlora.adapters.lora import lora_layers
from qlora.merge import measure
from qlora.merge.measure import (
    Verification,
    Verifier,
    calibrate,
    own_text,
    read_examples,
)
from qlora.merge.moments import LossMoments

POOR = Verification(12, 100, 3.0, 1.0, 1.5, 0.2, 1.9, 0.8, program="in llama.cpp")
WORSE = replace(POOR, loss_base=1.0, loss_live=2.0, loss_merged=2.0)


@pytest.fixture
def adapter(trained_on):
    return trained_on("llama").adapter


def test_verify_measures_merges_to_32_and_4_bits(adapter, tmp_path, capsys):
    data = rows_file(tmp_path)
    run_merge(adapter, tmp_path / "fp32", format="fp32", verify=data)
    assert "base + live adapter" in capsys.readouterr().out
    verified = report_of(tmp_path / "fp32")["verify"]
    assert verified["rows"] == 12
    # "it is 81" in single bytes and <|im_end|>: 7 to 9 + 1 tokens a row
    assert verified["tokens"] == sum(len(f"it is {i * i}") + 1 for i in range(12))
    # live and merged compute in the machine's dtype, bf16 or fp32: bf16 rounds at 4e-3
    assert verified["loss_merged"] == pytest.approx(verified["loss_live"], abs=5e-3)
    assert 0 <= verified["kl"] < 1e-3
    assert abs(verified["loss_base"] - verified["loss_live"]) > 5e-3  # the adapter is not idle
    run_merge(adapter, tmp_path / "nf4", format="nf4", calibration=data, verify=data)
    verified = report_of(tmp_path / "nf4")["verify"]
    assert 0 < verified["kl"] < 0.1
    assert 0.5 < verified["agreement"] <= 1


SOFTCAP = ("gemma", {"target_modules": ("lm_head", "q_proj")})
TRAINED = ("llama", {"modules_to_save": ("lm_head",)})
REBASED = ("llama", {"target_modules": ("lm_head", "q_proj"), "init_lora_weights": "pissa"})


@pytest.mark.parametrize(("family", "lora"), [("llama", {}), SOFTCAP, TRAINED, REBASED], ids=str)
def test_verification_in_chunks_is_that_of_all_logits(family, lora, checkpoints, tmp_path):
    base = checkpoints(family)
    model, folder = trained(base, tmp_path / "adapter", **lora)
    data = rows_file(tmp_path)
    run_merge(folder, tmp_path / "out", format="fp32", onto="original")
    batches = read_examples(data, base)
    verifier = Verifier(
        read_adapter(folder), str(base), batches, device="cpu", compute_dtype="fp32"
    )
    with chunks_of(5 * 320), Sizes() as sizes:
        measured = verifier.measure(tmp_path / "out")
    assert max(sizes.seen) < sum(batch["labels"].numel() for batch in batches) * 320
    models = (
        load_base(str(base), FP32),
        model,
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    wanted = []
    for batch in batches:
        kept = batch["labels"][:, 1:] != -100
        labels = batch["labels"][:, 1:][kept]
        log_p = []
        for one in models:
            with torch.no_grad():
                logits = one(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            log_p.append(logits[:, :-1][kept].double().log_softmax(-1))
        losses = [-x.gather(1, labels[:, None]).sum() for x in log_p]
        kls = [(log_p[1].exp() * (log_p[1] - log_p[i])).sum() for i in (2, 0)]
        same = (log_p[1].argmax(-1) == log_p[2].argmax(-1)).sum()
        wanted.append(torch.stack([*losses, *kls, same]))
    got = [getattr(measured, f"loss_{name}") for name in ("base", "live", "merged")]
    got += [measured.kl, measured.kl_base, measured.agreement]
    expected = (sum(wanted) / measured.tokens).tolist()
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)  # fp32
    assert min(expected) > 1e-4


def test_min_kept_and_the_warning_go_by_the_share_kept(adapter, tmp_path, monkeypatch, capsys):
    data = rows_file(tmp_path)
    monkeypatch.setattr(Verifier, "measure", lambda *_: POOR)
    match = r"keeps 75.0%.*less than --min-kept 0.9: nothing was written"
    refused(adapter, tmp_path / "out", match, verify=data, min_kept=0.9)
    run_merge(adapter, tmp_path / "poor", verify=data, min_kept=0.7)
    assert report_of(tmp_path / "poor")["verify"]["kept"] == 0.75
    said, card = capsys.readouterr().out, (tmp_path / "poor" / "README.md").read_text()
    assert "WARNING: on this data the merged model has lost 25.0%" in said
    assert "  merged, in llama.cpp " in said
    assert "On 12 rows, 100 supervised tokens: " in card and "1.5000 merged (in llama.cpp)" in card
    monkeypatch.setattr(Verifier, "measure", lambda *_: WORSE)
    match = "here it is 1.0000 without and 2.0000 with it"
    refused(adapter, tmp_path / "out", match, verify=data, min_kept=0.5)
    run_merge(adapter, tmp_path / "worse", verify=data)
    assert report_of(tmp_path / "worse")["verify"]["kept"] is None
    assert "no gain" in capsys.readouterr().out


@pytest.mark.parametrize("better", ["nf4", "original"])
def test_auto_takes_the_base_with_the_lower_loss(better, adapter, tmp_path, monkeypatch, capsys):
    def measured(_, folder):
        return replace(POOR, loss_merged=1.2 if folder.name == better else 1.5)

    wanted = merged(adapter, tmp_path / "wanted", onto=better)
    monkeypatch.setattr(Verifier, "measure", measured)
    tensors = merged(adapter, tmp_path / "out", onto="auto", verify=rows_file(tmp_path))
    torch.testing.assert_close(tensors, wanted, rtol=0, atol=0)
    files, again = ({p.name for p in (tmp_path / n).iterdir()} for n in ("out", "wanted"))
    assert files == again
    assert report_of(tmp_path / "out")["onto"] == better
    assert f"kept --onto {better}." in capsys.readouterr().out


def test_a_failing_verification_keeps_the_merge(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Verifier, "measure", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        run_merge(adapter, tmp_path / "out", verify=rows_file(tmp_path))
    assert (tmp_path / "out" / "merge_report.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("settings", [{}, {"format": "nf4"}])
def test_tokens_beyond_the_embedding_are_refused_before_a_merge(adapter, tmp_path, settings):
    larger = larger_tokenizer(shutil.copytree(adapter, tmp_path / "adapter"))
    rows = [{"prompt": "a", "completion": "<t69>"}]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    settings |= {"calibration" if settings else "verify": data}
    with pytest.raises(UserError, match=r"has 320 rows, .* these are used: '<t69>'\."):
        run_merge(larger, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_calibration_spreads_over_all_files(adapter, checkpoints, tmp_path, monkeypatch):
    data, base = [], checkpoints("llama")
    for verb in ("say", "ask"):
        rows = [{"prompt": f"{verb} {i}", "completion": f"{i}"} for i in range(100, 200)]
        data.append(str(write_rows(tmp_path / f"{verb}.jsonl", rows)))
    with pytest.raises(UserError, match="holds no tokenizer"):
        calibrate(read_adapter(adapter), str(base), data, tmp_path, device="cpu")
    monkeypatch.setattr(measure, "TOKENS_IN_SEQUENCE", (500, 1))
    known = read_adapter(adapter), str(base), data, base
    batches = calibrate(*known, device="cpu").loss.batches
    assert 250 < sum(int(batch["attention_mask"].sum()) for batch in batches) < 1000
    fewer = calibrate(*known, device="cpu", tokens=100).loss.batches
    assert 50 < sum(int(batch["attention_mask"].sum()) for batch in fewer) < 200
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(row) for batch in batches for row in batch["input_ids"]]
    for start in ("say 10", "say 19", "ask 10", "ask 19"):
        assert any(start in text for text in texts)


def test_the_model_samples_its_own_text(trained_on):
    """After the bos token, in full length, the same at every call."""
    model = trained_on("llama").model
    before = torch.random.get_rng_state()
    (batch,) = own_text(model, 300)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert batch["input_ids"].shape == (3, measure.OWN_LENGTH)
    assert (batch["input_ids"][:, 0] == model.generation_config.bos_token_id).all()
    assert len(batch["input_ids"][:, 1:].unique()) > 50  # not greedy
    assert torch.equal(own_text(model, 300)[0]["input_ids"], batch["input_ids"])
    found = LossMoments(
        model.eval().requires_grad_(False), [batch], lora_layers(model), with_outputs=True
    )
    for moments in found.of("model.layers.1.mlp.down_proj")[:2]:
        assert torch.isfinite(moments).all()
        assert moments.diagonal().min() > 0
