"""Training against PEFT + Trainer, and what a run leaves behind."""

import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from chunks import chunks_of
from conftest import (
    FAMILIES,
    FP32,
    VOCAB,
    quick_run,
    randomize_adapter,
    tiny_model,
    tiny_tokenizer,
    token_ids,
)
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from simulated_device import LateCopies
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import load_adapter, save_adapter
from qlora.adapters.format import read_adapter
from qlora.adapters.lora import lora_layers
from qlora.base.load import load_base
from qlora.config import DataConfig, LoraConfig, MergeConfig, QuantConfig
from qlora.data.rows import collator, prepare_data
from qlora.errors import UserError
from qlora.fast.head import LazyLogits
from qlora.fast.offload import offload_activations
from qlora.merge import merge
from qlora.training import run as training
from qlora.training import trainer
from qlora.training.optimizers import MasterWeights
from qlora.training.run import default_learning_rate, prepare_for_training, train
from qlora.training.trainer import AdapterTrainer, make_trainer

LORA = LoraConfig(r=4, lora_alpha=8)
config = partial(quick_run, samples=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 rows of different lengths, so that token means and row means differ."""
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"{i} times {i}", "completion": f"{i * i} " * (1 + i % 5)} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


# ---- against PEFT ----


def peft_twin(model: torch.nn.Module, folder: Path, base: Path) -> Any:
    """PEFT's model with the same base and the same adapter weights."""
    save_adapter(model, folder)
    twin = load_base(str(base), FP32)
    return peft.PeftModel.from_pretrained(twin, folder, is_trainable=True)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_pefts(family, use_dora, checkpoints, tmp_path):
    base = checkpoints(family)
    model = load_base(str(base), FP32)
    apply_lora(model, replace(LORA, use_dora=use_dora))
    randomize_adapter(model)
    twin = peft_twin(model, tmp_path / "adapter", base)
    ids = token_ids()
    ours, theirs = model(ids, labels=ids), twin(input_ids=ids, labels=ids)
    assert (ours.logits - theirs.logits).abs().max() <= 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    wrapped = twin.base_model.model
    compared = 0
    for name, layer in lora_layers(model).items():
        peer = wrapped.get_submodule(name)
        for side, parameter in layer.parameters_of("default").items():
            gradient = getattr(peer, side.removesuffix(".weight"))["default"].weight.grad
            assert gradient.abs().max() > 0
            assert (parameter.grad - gradient).abs().max() <= 1e-5, (name, side)
            compared += 1
    assert compared == (2 + use_dora) * len(lora_layers(model)) > 0
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == []


def test_20_steps_are_pefts(checkpoints, tmp_path, data):
    """PEFT + plain Trainer, same seed, data and optimizer: the same losses, to 1e-3."""
    base = checkpoints("llama")
    model = load_base(str(base), FP32)
    apply_lora(model, LORA, generator=torch.Generator().manual_seed(0))
    twin = peft_twin(model, tmp_path / "adapter", base)
    tokenizer = tiny_tokenizer()
    rows, _ = prepare_data(str(data), tokenizer, max_length=128)
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 5e-3,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
        "seed": 7,
    }
    curves = []
    for trainer_class, trained, extra in (
        (AdapterTrainer, model, {"processing_class": tokenizer}),
        (Trainer, twin, {}),
    ):
        set_seed(7)
        trainer = trainer_class(
            model=trained,
            args=TrainingArguments(output_dir=str(tmp_path / "out"), **arguments),
            train_dataset=rows,
            data_collator=collator(tokenizer),
            **extra,
        )
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    ours, theirs = curves
    assert len(ours) == len(theirs) == 20
    assert ours[-1] < ours[0] - 0.1  # it learns; two idle curves would agree too
    assert ours == pytest.approx(theirs, abs=1e-3)


# ---- the loss ----


def test_accumulated_batches_weigh_tokens_not_rows(checkpoints, tmp_path, data):
    """8 rows at once, or as 4 batches of 2: one gradient, so one curve."""
    base = checkpoints("llama")
    curves = []
    for rows, passes in ((8, 1), (2, 4)):
        output = tmp_path / f"run-{rows}"
        train(
            config(
                base,
                data,
                output,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=passes,
                optim="adamw_torch",
                trainer={"train_sampling_strategy": "sequential"},
            )
        )
        curves.append(losses(output))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_eval_loss_is_the_mean_over_tokens(checkpoints, tmp_path, data):
    base = checkpoints("llama")
    settings = config(base, data, tmp_path / "run", learning_rate=1e-9, max_steps=1)
    train(replace(settings, data=replace(settings.data, eval_data=str(data))))
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    got = next(row["eval_loss"] for row in rows if "eval_loss" in row)

    model = load_base(str(base), FP32)
    dataset, stats = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    total = 0.0
    for row in dataset:  # one row at a time: no padding, no batches
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        keep = labels[1:] != -100
        total -= float(log_p[keep].gather(1, labels[1:][keep][:, None]).sum())
    assert got == pytest.approx(total / stats.supervised_tokens, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_without_logits_is_the_same(family, checkpoints, tmp_path, data):
    """Training with accumulated batches and evaluation, with checkpointing."""
    rows = []
    for on in (True, False):
        settings = config(
            checkpoints(family),
            data,
            tmp_path / str(on),
            fast_path=on,
            optim="adamw_torch",
            gradient_accumulation_steps=2,
        )
        both = replace(settings.data, eval_data=str(data))
        with chunks_of(8 * VOCAB):
            output = train(replace(settings, data=both, eval_steps=2))
        lines = (output / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    for key, count in (("loss", 4), ("eval_loss", 2), ("grad_norm", 4)):
        fast, slow = ([row[key] for row in run if key in row] for run in rows)
        # fp32 in another order, 1e-6, and what four steps of Adam make of it
        assert len(fast) == count and fast == pytest.approx(slow, rel=1e-5), key


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_fifty_steps_with_everything_on_end_where_they_do_with_everything_off(
    family, checkpoints, tmp_path, data
):
    """Layer functions, rows without padding, a loss in chunks, checkpointing."""
    ends = []
    with chunks_of(32 * VOCAB):
        for on in (True, False):
            settings = config(
                checkpoints(family),
                data,
                tmp_path / str(on),
                fast_path=on,
                gradient_checkpointing=on,
                learning_rate=1e-3,
                max_steps=50,
                save_steps=50,
                optim="adamw_torch",
            )
            found = losses(train(settings))
            assert found[-1] < found[0] - 0.3
            ends.append(found[-1])
    assert ends[0] == pytest.approx(ends[1], abs=1e-3)


@pytest.mark.parametrize("on", [True, False])
def test_neither_training_nor_evaluation_asks_for_logits(on, checkpoints, tmp_path, data):
    settings = config(checkpoints("gemma"), data, tmp_path / "run")
    model = apply_lora(load_base(settings.model, FP32), LORA)
    prepare_for_training(model, fast_path=on)
    rows, _ = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    trainer = make_trainer(settings, model, tiny_tokenizer(), rows, rows)
    seen, own_loss = [], trainer.compute_loss_func

    def loss(outputs, *args, **kwargs):
        seen.append(outputs["logits"])
        return own_loss(outputs, *args, **kwargs)

    trainer.compute_loss_func = loss
    with chunks_of(8 * VOCAB):
        trainer.train()
        trainer.evaluate()
    assert len(seen) == 4 + 10
    assert all((isinstance(x, LazyLogits) and x.value is None) is on for x in seen)


# ---- packing ----


def test_packed_batches_weigh_tokens_too(checkpoints, tmp_path, data):
    """4 packs at once, 2 packs twice, in flat batches or with a mask of each: one curve."""
    curves = []
    for size, passes, fast in ((4, 1, True), (2, 2, True), (2, 2, False)):
        output = tmp_path / f"run-{size}-{fast}"
        settings = config(
            checkpoints("qwen3"),
            data,
            output,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
            optim="adamw_torch",
            fast_path=fast,
        )
        train(replace(settings, data=replace(settings.data, packing=True)))
        curves.append(losses(output))
    # fp32 in another order, 1e-6, and what four steps of Adam make of it
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[1] == pytest.approx(curves[2], rel=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_a_packed_run_counts_its_tokens_evaluates_and_resumes(checkpoints, tmp_path, data, capsys):
    base = checkpoints("llama")
    runs = []
    for packing in (True, False):
        settings = config(base, data, tmp_path / str(packing), max_steps=-1)
        both = replace(settings.data, eval_data=str(data), packing=packing)
        runs.append(replace(settings, data=both, num_train_epochs=1.0, learning_rate=1e-9))
    packed, padded = (train(run) for run in runs)
    said = capsys.readouterr().out
    packs = int(re.search(r"packing: 40 rows in (\d+) of up to 128 tokens", said)[1])
    texts = [(run / "metrics.jsonl").read_text() for run in (packed, padded)]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    evals = [row["eval_loss"] for run in rows for row in run if "eval_loss" in row]
    assert len(evals) == 2 and evals[0] == pytest.approx(evals[1], rel=1e-5)
    states = []
    for run in (packed, padded):
        found = [json.loads(p.read_text()) for p in run.glob("checkpoint-*/trainer_state.json")]
        states.append(max(found, key=lambda state: state["global_step"]))
    _, stats = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    assert stats.tokens / 128 <= packs <= 20
    assert [state["global_step"] for state in states] == [-(-packs // 4), 10]
    assert {state["num_input_tokens_seen"] for state in states} == {stats.tokens}

    settings = replace(config(base, data, tmp_path / "whole"), data=runs[0].data)
    parts = replace(settings, output_dir=str(tmp_path / "parts"))
    whole = train(settings)
    train(replace(parts, max_steps=2))
    train(replace(parts, resume=True))
    saved = [load_file(f / "adapter_model.safetensors") for f in (whole, tmp_path / "parts")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


# ---- a run ----


def test_what_a_run_leaves_behind(checkpoints, tmp_path, data, capsys):
    base = checkpoints("llama")
    output = train(config(base, data, tmp_path / "run"))
    assert {p.name for p in output.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "run.yaml",
        "metrics.jsonl",
        "loss.png",
        "README.md",
        "checkpoint-4",
    }
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for key in ("loss", "learning_rate", "tokens_per_second", "peak_bytes"):
        assert all(row[key] > 0 for row in rows), key
    seconds = [row["seconds"] for row in rows]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    run = yaml.safe_load((output / "run.yaml").read_text())
    assert run["config"]["learning_rate"] == 1e-2 and run["config"]["r"] == 4
    _, stats = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    counted = {"source": str(data), **asdict(stats)}
    del counted["labels"], counted["chats"]
    assert run["data"] == {"training": counted} and run["device"]["memory_bytes"] > 2**28
    assert (
        run["base"]["fingerprint"]
        and run["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    )
    assert not list(output.rglob("training_args.bin"))  # a pickle nobody needs
    printed = capsys.readouterr().out
    assert "merge_dequant.py --adapter" in printed and "loss.png" in printed
    assert f"python -m qlora.report {output}" in printed
    assert read_adapter(output).config.lora_alpha == 8


def test_commands_to_go_on_with_can_be_copied(checkpoints, tmp_path, data, capsys):
    output = train(config(checkpoints("llama"), data, tmp_path / "a run", max_steps=1))
    said = [shlex.split(line.partition(":")[2]) for line in capsys.readouterr().out.splitlines()]
    assert ["python", "-m", "qlora.report", str(output)] in said
    assert ["python", "-m", "qlora.chat", "--adapter", str(output), "--compare"] in said
    merge = ["--adapter", str(output), "--output-dir", f"{output}-merged"]
    assert ["python", "merge_dequant.py", *merge] in said


def test_resuming_a_complete_run_does_no_step_more(checkpoints, tmp_path, data, capsys):
    settings = {"max_steps": 4, "save_steps": 4}
    base = checkpoints("llama")
    output = train(config(base, data, tmp_path / "run", **settings))
    before = load_file(output / "adapter_model.safetensors")
    (output / "adapter_model.safetensors").unlink()  # as if stopped between the last step and here
    train(config(base, data, output, resume=True, **settings))
    after = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "All 4 steps were done" in capsys.readouterr().out
    train(config(base, data, output, resume=True, max_steps=6, save_steps=6))
    assert (output / "checkpoint-6").is_dir()


def test_resume_goes_on_where_it_stopped(checkpoints, tmp_path, data):
    base = checkpoints("llama")
    whole = train(config(base, data, tmp_path / "whole"))
    train(config(base, data, tmp_path / "parts", max_steps=2))
    parts = train(config(base, data, tmp_path / "parts", resume=True))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)
    for name, (A, B, *_) in read_adapter(whole).pairs.items():
        A2, B2, *_ = read_adapter(parts).pairs[name]
        torch.testing.assert_close(A, A2, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(B, B2, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adafactor"]
)
def test_optimizers(optim, checkpoints, tmp_path, data, capsys):
    output = train(config(checkpoints("llama"), data, tmp_path / "run", optim=optim))
    assert losses(output)[-1] < losses(output)[0]
    said = capsys.readouterr().out.count("runs unpaged")
    assert said == (1 if optim.startswith("paged") and not torch.cuda.is_available() else 0)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch", "adafactor"])
def test_bf16_adapters_resume_to_the_bit(optim, checkpoints, tmp_path, data):
    """With what their optimizer keeps of updates too small for bf16."""
    bf16 = {"lora": replace(LORA, adapter_dtype="bf16"), "optim": optim, "loraplus_lr_ratio": 4}
    base, saved = checkpoints("llama"), {}
    for name, settings in {
        "whole": {},
        "parts": {"max_steps": 2},
        "again": {"resume": True},
    }.items():
        output = tmp_path / ("whole" if name == "whole" else "parts")
        train(config(base, data, output, **bf16, **settings))
        saved[name] = load_file(output / "adapter_model.safetensors")
    assert {t.dtype for t in saved["whole"].values()} == {torch.bfloat16}
    assert all(torch.equal(t, saved["again"][name]) for name, t in saved["whole"].items())
    states = [torch.load(tmp_path / n / "checkpoint-4/optimizer.pt") for n in ("whole", "parts")]
    halves = [state["lower_halves"] for state in states]
    assert len(halves[0]) == len(saved["whole"]) and all(half.any() for half in halves[0])
    assert all(map(torch.equal, *halves))


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "auto"])
def test_who_keeps_updates(dtype, checkpoints, tmp_path, data, capsys, monkeypatch):
    """bf16 adapters; where an optimizer cannot, a line says so."""
    rows, _ = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    settings = config(checkpoints("llama"), data, tmp_path / "run")
    for known in (True, False):
        if not known:
            monkeypatch.setattr("qlora.training.optimizers.BY_PARAMETER", ())
        model = apply_lora(load_base(settings.model, FP32), replace(LORA, adapter_dtype=dtype))
        trainer = make_trainer(settings, model, tiny_tokenizer(), rows, None)
        halves = next(iter(lora_layers(model).values())).lora_A["default"].dtype == torch.bfloat16
        keeps = isinstance(trainer.create_optimizer(), MasterWeights)
        assert keeps == (known and halves)
        said = "paged_adamw_8bit loses small updates of bf16 adapters" in capsys.readouterr().out
        assert said == (halves and not known)


def test_checkpointing_saves_memory_and_changes_nothing(checkpoints):
    runs = []
    for checkpointing in (True, False):
        model = load_base(str(checkpoints("llama")), FP32)
        apply_lora(model, LORA, generator=torch.Generator().manual_seed(0))
        randomize_adapter(model)
        prepare_for_training(model, gradient_checkpointing=checkpointing)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        gradient = model.model.layers[0].mlp.up_proj.lora_A["default"].grad
        runs.append((loss.item(), gradient, sum(sizes)))
    (loss_on, gradient_on, saved_on), (loss_off, gradient_off, saved_off) = runs
    assert loss_on == loss_off
    assert torch.equal(gradient_on, gradient_off)
    assert saved_on < saved_off / 2


def test_dora_trains_and_merges(checkpoints, data, tmp_path):
    """Its magnitudes learn, and the merged model computes what the live one does."""
    base = checkpoints("qwen2")
    uneven = replace(LORA, use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 2})
    output = train(config(base, data, tmp_path / "out", lora=uneven))
    saved = read_adapter(output)
    for name, layer in lora_layers(apply_lora(load_base(str(base), FP32), uneven)).items():
        start = layer.lora_magnitude_vector["default"]
        assert not torch.equal(saved.pairs[name].magnitude, start), name
    merged = merge(
        MergeConfig(adapter=str(output), output_dir=str(tmp_path / "merged"), format="fp32")
    )
    live = load_adapter(load_base(str(base), FP32), output).eval()
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = live(input_ids=token_ids()).logits
        torch.testing.assert_close(plain(input_ids=token_ids()).logits, wanted, rtol=0, atol=1e-5)


def test_loraplus_rates_are_pefts(checkpoints, tmp_path, data):
    model = apply_lora(load_base(str(checkpoints("llama")), FP32), LORA)
    rows, _ = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    run = config(checkpoints("llama"), data, tmp_path / "out", loraplus_lr_ratio=16)
    trainer = make_trainer(run, model, tiny_tokenizer(), rows, None)
    ours = {
        id(p): group["lr"]
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    matrices = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(ours[id(p)] == (0.16 if "lora_B" in n else 0.01) for n, p in matrices.items())
    theirs = create_loraplus_optimizer(
        model=peft_twin(model, tmp_path, checkpoints("llama")),
        optimizer_cls=torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=16,
    )
    rates = Counter(g["lr"] for g in theirs.param_groups for _ in g["params"])
    assert Counter(ours.values()) == rates


def test_loraplus_trains_b_faster_and_resumes(checkpoints, tmp_path, data):
    for name, settings in {"plain": {}, "plus": {"loraplus_lr_ratio": 4}}.items():
        train(config(checkpoints("llama"), data, tmp_path / name, max_steps=2, **settings))
    plain, plus = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "plus")
    )
    size = sum(t.abs().sum() for n, t in plus.items() if "lora_B" in n)
    assert size > 2 * sum(t.abs().sum() for n, t in plain.items() if "lora_B" in n)
    again = replace(
        config(checkpoints("llama"), data, tmp_path / "plus", loraplus_lr_ratio=4), resume=True
    )
    train(again)
    whole = tmp_path / "whole"
    train(config(checkpoints("llama"), data, whole, loraplus_lr_ratio=4))
    saved = [load_file(f / "adapter_model.safetensors") for f in (tmp_path / "plus", whole)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ("norm", "layers.1.mlp.up_proj")},
        {"trainable_token_indices": (5, 6, 7)},
        {"target_modules": ("embed_tokens", "q_proj")},
        {"bias": "all"},
    ],
    ids=str,
)
def test_what_else_trains_is_saved_resumed_and_merged(settings, checkpoints, tmp_path, data):
    base = checkpoints("qwen2")
    lora = replace(LORA, **settings)
    train(config(base, data, tmp_path / "run", lora=lora, max_steps=2))
    train(replace(config(base, data, tmp_path / "run", lora=lora), resume=True))
    train(config(base, data, tmp_path / "whole", lora=lora))
    files = [tmp_path / n / "adapter_model.safetensors" for n in ("run", "whole")]
    saved = [load_file(file) for file in files]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    adapter = read_adapter(tmp_path / "run")
    live = load_adapter(load_base(str(base), adapter.quantization), tmp_path / "run")
    output = tmp_path / "merged"
    merge(MergeConfig(adapter=str(tmp_path / "run"), output_dir=str(output), format="fp32"))
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        wanted, got = live.eval()(token_ids()).logits, merged(token_ids()).logits
    # fp32: the same sums in another order
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_trained_in_full_starts_from_the_original_weights(checkpoints, tmp_path, data):
    lora = replace(LORA, modules_to_save=("layers.1.mlp.up_proj",))
    run = config(checkpoints("llama"), data, tmp_path / "out", lora=lora, learning_rate=1e-9)
    train(run)
    name = "model.layers.1.mlp.up_proj.weight"
    original = load_file(checkpoints("llama") / "model.safetensors")[name]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # 4 steps of 1e-9; rounded to NF4 it would be off by a tenth
    torch.testing.assert_close(saved[f"base_model.model.{name}"], original, rtol=0, atol=1e-7)


def test_trainer_refuses_a_model_without_adapters(checkpoints):
    model = load_base(str(checkpoints("llama")), FP32)
    with pytest.raises(UserError, match="no adapter to train"):
        AdapterTrainer(model=model)


# ---- the learning-rate rule ----


@pytest.mark.parametrize(
    ("model_type", "hidden_size", "wanted"),
    # figures.md, section 2: values computed there from the published formula
    [("llama", 576, 1.32e-3), ("qwen2", 1536, 5.1e-4), ("llama", 4096, 2.86e-4)],
)
def test_learning_rate_rule(model_type, hidden_size, wanted):
    assert default_learning_rate(model_type, hidden_size) == pytest.approx(wanted, rel=0.01)


def test_the_rate_is_printed_with_its_reason(checkpoints, tmp_path, data, capsys):
    output = train(
        config(checkpoints("llama"), data, tmp_path / "run", learning_rate=None, max_steps=1)
    )
    printed = capsys.readouterr().out
    assert "LoRA Without Regret" in printed and "hidden size 64" in printed
    run = yaml.safe_load((output / "run.yaml").read_text())
    assert run["config"]["learning_rate"] == pytest.approx(5e-4 * (2000 / 64) ** 0.781)


# ---- what the user can mend ----


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"lora": LoraConfig(target_modules=("query",))}, "'query' matches no layer.*q_proj"),
        ({"trainer": {"adam_betta2": 0.9}}, "adam_betta2 is no argument.*adam_beta2"),
        ({"trainer": {"learning_rate": 1}}, "has a flag of its own"),
        ({"trainer": {"bf16": True}}, "follows from the other settings"),
        ({"optim": "adamw_turbo"}, "adamw_turbo"),
        ({"optim": "galore_adamw"}, "Trainer refuses these settings.*galore"),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "follows from the other settings"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        ({"report_to": ("paper",)}, "paper"),
        ({"resume": True}, "holds no checkpoint-N to resume from"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refused_before_anything_is_written(settings, match, checkpoints, tmp_path, data):
    output = tmp_path / "run"
    with pytest.raises(UserError, match=match):
        train(config(checkpoints("llama"), data, output, **settings))
    assert not output.exists()


def test_resuming_with_another_rank_changes_nothing(checkpoints, tmp_path, data):
    base = checkpoints("llama")
    output = train(config(base, data, tmp_path / "run", max_steps=2))
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="is no checkpoint of this run: r=4"):
        train(config(base, data, output, resume=True, lora=LoraConfig(r=8, lora_alpha=16)))
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_several_processes_are_refused(checkpoints, tmp_path, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several GPUs is not there yet"):
        train(config(checkpoints("llama"), data, tmp_path / "run"))


def test_a_model_without_a_chat_template(checkpoints, tmp_path, data, capsys):
    shutil.copytree(checkpoints("llama"), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    output = train(config(tmp_path / "base", data, tmp_path / "run", max_steps=1))
    assert "has no chat template" in capsys.readouterr().out
    assert "### Assistant:" in AutoTokenizer.from_pretrained(output).chat_template


def test_a_model_without_a_tokenizer(checkpoints, tmp_path, data):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="holds no tokenizer"):
        train(config(tmp_path / "base", data, tmp_path / "run"))


def test_a_checkpoint_cut_short_is_passed_over(checkpoints, tmp_path, data):
    """Trainer writes trainer_state.json last; a run killed while saving lacks it."""
    base = checkpoints("llama")
    output = train(config(base, data, tmp_path / "run"))
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    train(config(base, data, output, resume=True))
    assert len(losses(output)) == 4


def test_a_run_without_a_checkpoint_names_the_way_out(checkpoints, tmp_path, data):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("config: {}\n")
    with pytest.raises(UserError, match="or remove it: it has no checkpoint"):
        train(config(checkpoints("llama"), data, tmp_path / "run"))


def test_rows_are_cut_at_what_the_model_takes(checkpoints, tmp_path, data, capsys):
    """GPT-2 has positions for 512 tokens here; a longer row would be an index error."""
    long = tmp_path / "long.txt"
    long.write_text("a" * 900 + "\n")
    settings = config(checkpoints("gpt2"), long, tmp_path / "run", max_steps=1)
    train(replace(settings, data=DataConfig(str(long), max_length=1024)))
    said = capsys.readouterr().out
    assert "rows are cut at 512 tokens" in said and "1 row" in said


INITS = {
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
    "loftq_1": {"init_lora_weights": "loftq"},
    "eva": {"init_lora_weights": "eva"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("settings", INITS.values(), ids=INITS)
def test_a_run_with_another_start_learns_and_resumes_to_the_bit(
    settings, checkpoints, tmp_path, data
):
    base = checkpoints("llama")
    started = config(base, data, tmp_path / "whole", lora=replace(LORA, **settings))
    whole = train(started)
    assert losses(whole)[-1] < losses(whole)[0]
    parts = train(replace(started, output_dir=str(tmp_path / "parts"), max_steps=2))
    parts = train(replace(started, output_dir=str(parts), resume=True))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = [(folder / "adapter_config.json").read_text() for folder in (whole, parts)]
    assert files[0] == files[1]


def test_the_run_file_of_a_resumed_run_does_not_resume(checkpoints, tmp_path, data):
    base = checkpoints("llama")
    train(config(base, data, tmp_path / "run", max_steps=2))
    output = train(config(base, data, tmp_path / "run", resume=True))
    assert yaml.safe_load((output / "run.yaml").read_text())["config"]["resume"] is False


def test_loggers_get_speed_and_memory(checkpoints, tmp_path, data):
    seen: list[dict[str, Any]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    settings = config(checkpoints("llama"), data, tmp_path / "run")
    (tmp_path / "run").mkdir()
    model = load_base(settings.model, FP32)
    apply_lora(model, LORA)
    tokenizer = tiny_tokenizer()
    rows, _ = prepare_data(str(data), tokenizer, max_length=128)
    trainer = make_trainer(settings, model, tokenizer, rows, None)
    trainer.add_callback(Logger)
    trainer.train()
    assert {"loss", "tokens_per_second", "peak_bytes"} <= seen[0].keys()


def test_tensorboard_gets_every_row(checkpoints, tmp_path, data):
    settings = config(checkpoints("llama"), data, tmp_path / "run", report_to=("tensorboard",))
    both = replace(settings.data, eval_data=str(data))
    output = train(replace(settings, data=both, eval_steps=4))
    (folder,) = (output / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_bytes"):
        scalars = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert scalars == [(step, pytest.approx(x, rel=1e-6)) for step, x in wanted], name
    (found,) = events.Scalars("eval/loss")  # fp32
    assert found.value == pytest.approx(rows[-1]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("trackio",), "--report-to trackio wants a package .*: pip install trackio$"),
        (("tensorboard", "wandb", "comet_ml"), "to wandb comet_ml .*: pip install wandb comet-ml$"),
        (("wandbb",), r"--report-to must be among azure_ml, .*; got wandbb. Did you mean wandb\?$"),
    ],
)
def test_a_logger_that_is_not_installed(names, said, tmp_path, monkeypatch):
    """Said before anything is loaded: there is neither model nor data here."""
    there = ["tensorboard"]
    monkeypatch.setattr(trainer, "get_available_reporting_integrations", lambda: there)
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UserError, match=said):
        train(config(nowhere, nowhere, tmp_path / "run", report_to=names))
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_a_run(checkpoints, tmp_path, data):
    output = train(config(checkpoints("llama"), data, tmp_path / "run", max_steps=1))
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        train(config(checkpoints("llama"), data, output))
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


@pytest.mark.parametrize("name", ["offload_activations", "offload_embedding"])
def test_offloading_wants_a_gpu(name, checkpoints, tmp_path, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{flag} wants a CUDA GPU, and torch finds none here"):
        train(config(checkpoints("llama"), data, tmp_path / "run", **{name: True}))
    assert not (tmp_path / "run").exists()


def test_offloaded_layer_inputs_train_the_same_adapter(checkpoints, tmp_path, data, monkeypatch):
    monkeypatch.setattr(training, "require_gpu", lambda what: None)
    copies = LateCopies()
    offload = offload_activations(copies=copies, min_bytes=1, keep=1)
    monkeypatch.setattr(trainer, "offload_activations", lambda: offload)
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "data": DataConfig(str(data), str(data), max_length=128),
        "eval_steps": 2,
    }
    found = []
    for name in ("plain", "offloaded"):
        settings["offload_activations"] = name == "offloaded"
        train(config(checkpoints("llama"), data, tmp_path / name, **settings))
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert copies.log and not copies.waiting
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_run_on_a_gpu(base_of, tmp_path, data):
    base = base_of("llama", False)
    settings: dict[str, Any] = {"offload_activations": True, "offload_embedding": True}
    output = train(config(base, data, tmp_path / "run", quant=QuantConfig(), **settings))
    assert losses(output)[-1] < losses(output)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
def test_bf16_run_on_a_gpu(optim, checkpoints, tmp_path, data):
    """Paged optimizers, checkpointing and bf16 adapters, as on a real card; it resumes."""
    settings = {"quant": QuantConfig(), "optim": optim, "max_steps": 20, "save_steps": 10}
    base = checkpoints("llama")
    output = train(config(base, data, tmp_path / "run", **settings))
    halves = torch.load(output / "checkpoint-20" / "optimizer.pt")["lower_halves"]
    assert all(half.any() for half in halves)
    train(config(base, data, output, **settings | {"max_steps": 22}, resume=True))
    assert losses(output)[-1] < losses(output)[0] - 0.1
    A, *_ = next(iter(read_adapter(output).pairs.values()))
    assert A.dtype == torch.bfloat16
