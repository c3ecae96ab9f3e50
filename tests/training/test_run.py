"""`train(config)`: what a run writes, resuming, and settings that are refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
import yaml
from accelerate.utils import convert_outputs_to_fp32
from bitsandbytes.optim import AdamW8bit
from chunks import chunks_of
from conftest import (
    FP32,
    larger_tokenizer,
    losses,
    quick_config,
    read_rows,
    refuses,
    require_same_adapter,
    tiny_tokenizer,
    write_rows,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import apply_lora, merge_and_unload
from qlora.adapters.files import load_adapter, swap_adapter
from qlora.adapters.format import read_adapter
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_base
from qlora.config import DataConfig, LoraConfig, MergeConfig, QuantConfig
from qlora.data.rows import fingerprint, prepare_data
from qlora.merge import merge
from qlora.training import prepare_for_training
from qlora.training.checkpoints import OPTIMIZER, read_state
from qlora.training.checks import check_arguments, check_settings
from qlora.training.run import (
    default_learning_rate,
    load_model,
    prepare_rows,
    train,
)

LORA = LoraConfig(r=4, lora_alpha=8)


@pytest.fixture
def copied(quick_run, tmp_path):
    """The config of a copy of the quick run, to change or to resume."""
    folder = shutil.copytree(quick_run.folder, tmp_path / "copy")
    return replace(quick_run.config, output_dir=str(folder), report_to=(), resume=True)


def test_files_and_lines_of_a_run(quick_run, data):
    folder = quick_run.folder
    names = """adapter_config.json adapter_model.safetensors tokenizer.json run.yaml metrics.jsonl
    samples.jsonl loss.png README.md checkpoint-2 checkpoint-4"""
    assert {path.name for path in folder.iterdir()} >= set(names.split())
    assert not list(folder.rglob("training_args.bin"))  # a pickle
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1  # that of the umask: safetensors' own is 0600
    assert read_adapter(folder).config.lora_alpha == 8
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    for key in ("loss", "learning_rate", "tokens_per_second", "peak_bytes"):
        assert all(row[key] > 0 for row in rows if "eval_loss" not in row), key
    seconds = [row["seconds"] for row in rows]
    assert seconds[0] > 0 and seconds == sorted(seconds)

    recorded = yaml.safe_load((folder / "run.yaml").read_text())
    assert recorded["config"]["learning_rate"] == 1e-2 and recorded["config"]["r"] == 4
    rows, stats = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    counts = {"source": str(data), **stats.counts(), "fingerprint": fingerprint(rows)}
    assert recorded["data"] == {"training": counts, "evaluation": counts}
    assert recorded["data_paths"] == [str(data.absolute())]
    assert recorded["device"]["memory_bytes"] > 2**28
    assert recorded["base"]["fingerprint"]
    assert recorded["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]

    picture = folder / "loss.png"
    for words in (f"loss curve is {picture}", "40 rows", "step 4/4  loss", "trainable", "⟦"):
        assert words in quick_run.said
    is_unpaged = "paged_adamw_8bit runs unpaged" in quick_run.said
    assert is_unpaged == (not torch.cuda.is_available())


def test_eval_loss_is_the_mean_over_tokens(quick_run, checkpoints, data):
    model = load_adapter(load_base(str(checkpoints("llama")), FP32), quick_run.folder).eval()
    rows, stats = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    total = 0.0
    for row in rows:  # one row at a time: no padding, no batches
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)  # (T - 1, vocab)
        keep = labels[1:] != -100
        total -= float(log_p[keep].gather(1, labels[1:][keep][:, None]).sum())
    reported = read_rows(quick_run.folder / "metrics.jsonl")[-1]["eval_loss"]
    assert reported == pytest.approx(total / stats.supervised_tokens, abs=1e-4)


def test_defaults_that_depend_on_the_model(checkpoints, tmp_path, data, capsys):
    """A chat template if it has none, and a learning rate by its size."""
    shutil.copytree(checkpoints("llama"), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    settings = quick_config(tmp_path / "base", data, tmp_path / "run", max_steps=1)
    folder = train(replace(settings, learning_rate=None))
    said = capsys.readouterr().out
    assert "has no chat template" in said
    assert "### Assistant:" in AutoTokenizer.from_pretrained(folder).chat_template
    assert "LoRA Without Regret" in said and "hidden size 64" in said
    recorded = yaml.safe_load((folder / "run.yaml").read_text())["config"]
    assert recorded["learning_rate"] == pytest.approx(5e-4 * (2000 / 64) ** 0.781)


def test_learning_rate_rule():
    """figures.md, section 2: values computed there from the published formula."""
    known = (("llama", 576, 1.32e-3), ("qwen2", 1536, 5.1e-4), ("llama", 4096, 2.86e-4))
    for family, size, rate in known:
        assert default_learning_rate(family, size) == pytest.approx(rate, rel=0.01)


def test_rows_are_cut_at_the_models_positions(checkpoints, tmp_path, capsys):
    """This GPT-2 has 512 positions; a longer row would be an index error."""
    long = conftest.write_rows(tmp_path / "long.jsonl", [{"text": "a" * 900}])
    config = quick_config(checkpoints("gpt2"), long, tmp_path / "run")
    config = replace(config, data=DataConfig(str(long), max_length=1024, long_rows="truncate"))
    prepared = prepare_rows(config, Checkpoint.open(config.model), tiny_tokenizer())
    assert prepared.max_length == 512 and list(prepared.rows["length"]) == [512]
    said = capsys.readouterr().out
    assert "rows are cut at 512 tokens" in said and "1 rows cut" in said


def test_modules_to_save_start_from_the_original_weights(checkpoints, tmp_path, data):
    lora = replace(LORA, modules_to_save=("layers.1.mlp.up_proj",))
    config = quick_config(checkpoints("llama"), data, tmp_path / "out", lora=lora)
    checkpoint, tokenizer = Checkpoint.open(config.model), tiny_tokenizer()
    prepared = prepare_rows(config, checkpoint, tokenizer)
    model = load_model(config, checkpoint, tokenizer, prepared, None)
    (trained,) = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    original = load_file(checkpoints("llama") / "model.safetensors")
    assert torch.equal(trained, original["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("steps", "packing"), [(4, False), (4, True), pytest.param(50, False, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("family", conftest.axis(*dict.fromkeys(["gemma", *conftest.FAMILIES])))
def test_fast_and_plain_runs_have_one_curve(family, steps, packing, checkpoints, tmp_path, data):
    """4 rows (or packs) at once on the fast path; without it 2 and 2, padded or masked."""
    runs = []
    for fast, size in ((True, 4), (False, 2)):
        settings: Any = {
            "data": DataConfig(str(data), str(data), max_length=128, packing=packing),
            "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size,
            "fast_path": fast, "gradient_checkpointing": fast, "optim": "adamw_torch",
            "learning_rate": 1e-2 if steps == 4 else 1e-3, "max_steps": steps,
            "eval_steps": steps // 2, "save_steps": steps,
            # grouping by length orders rows by the size of a batch
            "trainer": {} if packing else {"train_sampling_strategy": "sequential"},
        }  # fmt: skip
        config = quick_config(checkpoints(family), data, tmp_path / str(fast), **settings)
        with chunks_of(8 * conftest.VOCAB):
            runs.append(read_rows(train(config) / "metrics.jsonl"))
    for key, count in (("loss", steps), ("eval_loss", 2), ("grad_norm", steps)):
        fast, plain = ([row[key] for row in run if key in row] for run in runs)
        assert len(fast) == len(plain) == count
        if steps == 4:  # fp32 sums in another order differ by 1e-6, which four steps magnify
            assert fast == pytest.approx(plain, rel=1e-5), key
        elif key != "grad_norm":
            assert fast[-1] == pytest.approx(plain[-1], abs=1e-3) and fast[-1] < fast[0]


def test_packed_run_counts_tokens(checkpoints, tmp_path, data, capsys):
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", max_steps=-1)
    folder = train(replace(config, data=replace(config.data, packing=True)))
    packs = int(re.search(r"40 rows in (\d+) packs of up to 128", capsys.readouterr().out)[1])
    last = json.loads((folder / f"checkpoint-{-(-packs // 4)}" / "trainer_state.json").read_text())
    _, stats = prepare_data(str(data), tiny_tokenizer(), max_length=128)
    assert stats.tokens / 128 <= packs <= 20
    assert last["max_steps"] == last["global_step"]
    assert last["num_input_tokens_seen"] == stats.tokens


RESUMED: dict[str, dict[str, Any]] = {
    "many at once": {
        "init_lora_weights": "eva", "modules_to_save": ("norm", "layers.1.mlp.up_proj"),
        "adapter_dtype": "bf16", "packing": True, "loraplus_lr_ratio": 4, "optim": "adamw_torch",
    },
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
    "loftq, one round": {"init_lora_weights": "loftq"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "tokens": {"trainable_token_indices": (5, 6, 7)},
    "embedding": {"target_modules": ("embed_tokens", "q_proj")},
    "bias": {"bias": "all"},
    "dora": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 2}},
    "dropout": {"lora_dropout": 0.1},
    "fp32 optimizer": {"optim": "paged_adamw_32bit"},
    "bf16, 8-bit optimizer": {"adapter_dtype": "bf16"},
    "bf16, adafactor": {"adapter_dtype": "bf16", "optim": "adafactor"},
}  # fmt: skip


@pytest.mark.parametrize("name", conftest.axis(*RESUMED))
def test_resumed_run_equals_the_whole_run_and_merges(name, checkpoints, tmp_path, data):
    settings, base = dict(RESUMED[name]), checkpoints("qwen2")
    packing = settings.pop("packing", False)
    ours = {k: settings.pop(k) for k in ("loraplus_lr_ratio", "optim") if k in settings}
    ours["data"] = DataConfig(str(data), max_length=128, packing=packing)
    config = quick_config(base, data, tmp_path / "whole", lora=replace(LORA, **settings), **ours)
    whole = train(config)
    assert losses(whole)[-1] < losses(whole)[0]
    parts = train(replace(config, output_dir=str(tmp_path / "parts"), max_steps=2))
    train(replace(config, output_dir=str(parts), resume=True))
    require_same_adapter(whole, parts)
    name = "adapter_config.json"
    assert (whole / name).read_text() == (parts / name).read_text()
    if "adapter_dtype" in settings:
        saved = load_file(whole / "adapter_model.safetensors").values()
        assert {tensor.dtype for tensor in saved} == {torch.bfloat16}
        states = [
            read_state(run / "checkpoint-4" / OPTIMIZER)["optimizer"] for run in (whole, parts)
        ]
        halves = [state["lower_halves"] for state in states]
        assert len(halves[0]) == len(saved) and all(half.any() for half in halves[0])
        assert all(map(torch.equal, *halves))

    live = load_adapter(load_base(str(base), read_adapter(parts).quantization), parts)
    merged = merge(MergeConfig(str(parts), str(tmp_path / "merged"), format="fp32"))
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        expected, logits = (m.eval()(conftest.token_ids()).logits for m in (live, plain))
    # fp32: the same sums in another order
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_resuming_from_half_way_repeats_the_rest(copied, quick_run):
    """The last checkpoint is incomplete: it has no trainer_state.json, which is written last."""
    folder = Path(copied.output_dir)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    answers = read_rows(folder / "samples.jsonl")
    train(copied)
    require_same_adapter(folder, quick_run.folder)
    assert losses(folder) == losses(quick_run.folder)  # the rows after checkpoint-2 were dropped
    seconds = [row["seconds"] for row in read_rows(folder / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert read_rows(folder / "samples.jsonl") == answers
    assert yaml.safe_load((folder / "run.yaml").read_text())["config"]["resume"] is False


def test_resuming_a_complete_run_adds_no_step(copied, quick_run, capsys):
    folder = Path(copied.output_dir)
    (folder / "adapter_model.safetensors").unlink()  # stopped between the last step and this file
    train(replace(copied, samples=0))
    require_same_adapter(folder, quick_run.folder)
    assert "All 4 steps are done" in capsys.readouterr().out
    train(replace(copied, samples=0, max_steps=6))
    assert (folder / "checkpoint-6").is_dir()
    assert read_rows(folder / "metrics.jsonl")[-1]["step"] == 6


def test_resuming_with_another_rank_is_refused(copied):
    with refuses(Path(copied.output_dir), "r 4, not 8", "lora_alpha 8, not 16"):
        train(replace(copied, lora=LoraConfig(r=8, lora_alpha=16)))


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("samples.jsonl", '{"prompt": "a", "wan', ["JSON object"]),
        ("samples.jsonl", '{"question": "a"}', ["prompt", "wanted", "before", "after"]),
        ("metrics.jsonl", '{"loss": 1.0}', ["no step"]),
    ],
)
def test_damaged_rows_are_refused_before_a_run_continues(name, line, words, copied):
    folder = Path(copied.output_dir)
    number = len(read_rows(folder / name)) + 1
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with refuses(folder, f"{name}, line {number}: ", "remove that line", *words):
        train(copied)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainer": {"adam_betta2": 0.9}}, ["adam_betta2", "Did you mean adam_beta2"]),
        ({"trainer": {"learning_rate": 1}}, ["--learning_rate", "flag of its own"]),
        ({"trainer": {"bf16": True}}, ["bf16", "follows from the other settings"]),
        ({"trainer": {"label_smoothing_factor": 0.1}}, ["label_smoothing_factor", "follows"]),
        ({"trainer": {"use_liger_kernel": True}}, ["use_liger_kernel is not supported"]),
        ({"trainer": {"torch_compile": "yes"}}, ["torch_compile is not supported"]),
        ({"trainer": {"push_to_hub": True}}, ["push_to_hub is not supported", "hf upload"]),
        ({"trainer": {"hub_model_id": "me/it"}}, ["hub_model_id is not supported", "hf upload"]),
        ({"trainer": {"fsdp_config": {}}}, ["fsdp_config is not supported", "several GPUs"]),
        ({"trainer": {"prediction_loss_only": True}}, ["prediction_loss_only has no effect"]),
        ({"trainer": {"resume_from_checkpoint": "x"}}, ["--resume continues"]),
        ({"trainer": {"auto_find_batch_size": True}}, ["is not needed", "is split"]),
        ({"trainer": {"adam_beta2": "high"}}, ["adam_beta2 must be a number, got 'high'"]),
        ({"trainer": {"dataloader_num_workers": 1.5}}, ["must be a whole number, got 1.5"]),
        ({"trainer": {"dataloader_drop_last": 1}}, ["must be true or false, got 1"]),
        ({"trainer": {"run_name": 7}}, ["run_name must be a word, got 7", "in quotes"]),
        ({"trainer": {"save_strategy": "off"}}, ["must be one of no, steps, epoch, best"]),
        ({"trainer": {"train_sampling_strategy": "rnd"}}, ["must be one of random, sequential"]),
        ({"trainer": {"log_level": "loud"}}, ["log_level must be one of detail"]),
        ({"trainer": {"eval_strategy": "steps"}}, ["eval_strategy steps needs", "--eval-data"]),
        ({"trainer": {"eval_on_start": "on"}}, ["eval_on_start needs", "--eval-data"]),
        ({"trainer": {"save_strategy": "best"}}, ["save_strategy best needs", "--eval-data"]),
        ({"trainer": {"metric_for_best_model": "loss"}}, ["needs", "--eval-data"]),
        ({"trainer": {"neftune_noise_alpha": -1}}, ["neftune_noise_alpha must be above 0, got -1"]),
        ({"trainer": {"adam_epsilon": 0.0}}, ["adam_epsilon must be above 0, got 0.0"]),
        ({"trainer": {"warmup_steps": -1}}, ["Trainer refuses these settings", "warmup_steps"]),
        (
            {"trainer": {"warmup_steps": 5}, "warmup_ratio": 0.1},
            ["--trainer.warmup_steps 5 would replace --warmup-ratio 0.1: give one of them"],
        ),
        ({"offload_activations": True}, ["--offload-activations", "a CUDA GPU", "leave it out"]),
        ({"offload_embedding": True}, ["--offload-embedding", "a CUDA GPU", "leave it out"]),
        ({"report_to": ("trackio",)}, ["--report-to trackio", "pip install trackio"]),
        ({"report_to": ("tensorboard", "wandb", "comet_ml")}, ["pip install wandb comet-ml"]),
        ({"report_to": ("wandbb",)}, ["azure_ml", "got wandbb", "Did you mean wandb?"]),
        ({"model": "/nowhere/at/all"}, ["/nowhere/at/all does not exist"]),
        ({"lora": LoraConfig(target_modules=("query",))}, ["'query' matches no layer", "q_proj"]),
        ({"optim": "adamw_turbo"}, ["adamw_turbo"]),
        ({"optim": "galore_adamw"}, ["Trainer refuses these settings", "galore"]),
        ({"lr_scheduler_type": "zigzag"}, ["zigzag"]),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, words, checkpoints, data, tmp_path, monkeypatch):
    """Before anything is written; most before anything is loaded: model and data do not exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loggers = "qlora.training.checks.loggers.get_available_reporting_integrations"
    monkeypatch.setattr(loggers, lambda: ["tensorboard"])
    base, rows = tmp_path / "base", tmp_path / "data"
    if settings.keys() & {"lora", "optim"}:
        base, rows = checkpoints("llama"), data
    with refuses(tmp_path, *words):
        train(quick_config(base, rows, tmp_path / "run", **settings))


@pytest.mark.parametrize(
    ("trainer", "settings", "words"),
    [
        ({"dataloader_drop_last": "on"}, {"per_device_train_batch_size": 64}, ["40 rows fill no"]),
        ({"dataloader_persistent_workers": True}, {}, ["Trainer refuses", "num_workers"]),
        ({"per_device_eval_batch_size": 0}, {}, ["Trainer refuses", "batch_size"]),
        ({"metric_for_best_model": "accuracy"}, {}, ["must be loss, got 'accuracy'"]),
        ({"load_best_model_at_end": True}, {}, ["by epoch, saving by steps", "--eval-steps N"]),
        ({"load_best_model_at_end": True}, {"eval_steps": 3}, ["N or a multiple of it"]),
        ({"save_strategy": "best", "eval_strategy": "no"}, {}, ["drop eval_strategy no"]),
        ({"eval_strategy": "epoch"}, {"eval_steps": 3}, ["epoch would replace --eval-steps 3: g"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_data_are_refused(
    trainer, settings, words, checkpoints, data, tmp_path
):
    both = DataConfig(str(data), str(data), max_length=128)
    with refuses(tmp_path, *words):
        base, output = checkpoints("llama"), tmp_path / "run"
        train(quick_config(base, data, output, data=both, trainer=trainer, **settings))


def test_tokens_beyond_the_embedding_are_refused_before_a_run(checkpoints, tmp_path):
    """A larger tokenizer is fine as long as the data has none of them, as is a smaller one."""
    base = larger_tokenizer(shutil.copytree(checkpoints("llama"), tmp_path / "base"))
    rows = [{"prompt": "a", "completion": f"<t{i}>"} for i in (0, 69, 68)]
    train(quick_config(base, write_rows(tmp_path / "a.jsonl", rows[:1]), tmp_path / "run"))
    words = "b.jsonl: ", "has 320 rows, the tokenizer 330", "'<t68>', '<t69>'. ", "embeddings(330)"
    bad = write_rows(tmp_path / "b.jsonl", rows)
    both = DataConfig(str(tmp_path / "a.jsonl"), str(bad), max_length=128)
    for data in ({}, {"data": both}):
        with refuses(tmp_path / "new", *words):
            train(quick_config(base, bad, tmp_path / "new", **data))


def test_words_of_yaml_get_the_type_of_the_argument(checkpoints, data, tmp_path):
    """`no` is a strategy's word and a switch's false."""
    given = {"save_strategy": "no", "dataloader_drop_last": "no", "run_name": "on", "eval_delay": 1}
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", trainer=given, max_steps=1)
    assert check_arguments(config).trainer == given | {"dataloader_drop_last": False}
    assert not list(train(config).glob("checkpoint-*"))


def test_folders_that_are_refused(quick_run, tmp_path, data):
    with refuses(quick_run.folder, "already holds a run", "--resume to continue it"):
        train(quick_run.config)
    conftest.tiny_model("llama").save_pretrained(tmp_path / "base")
    with refuses(tmp_path, "holds no tokenizer"):
        train(quick_config(tmp_path / "base", data, tmp_path / "run"))
    (tmp_path / "run.yaml").write_text("config: {}\n")
    with refuses(tmp_path, "or remove it: it has no checkpoint to resume from"):
        check_settings(quick_run.config, tmp_path)
    for resume in (False, True):
        with refuses(tmp_path, "its name has more than 225 bytes"):
            check_settings(replace(quick_run.config, resume=resume), tmp_path / ("x" * 300))


@conftest.on_gpu
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
def test_bf16_run_on_a_gpu(optim, checkpoints, tmp_path, data):
    settings: Any = {"quant": QuantConfig(), "optim": optim, "max_steps": 20, "save_steps": 10}
    offloads = {"offload_activations": True, "offload_embedding": True}
    settings |= offloads if optim == "paged_adamw_8bit" else {}
    config = quick_config(checkpoints("llama", False), data, tmp_path / "run", **settings)
    folder = train(config)
    halves = read_state(folder / "checkpoint-20" / OPTIMIZER)["optimizer"]["lower_halves"]
    assert all(half.any() for half in halves)
    train(replace(config, max_steps=22, resume=True))
    assert losses(folder)[-1] < losses(folder)[0] - 0.1
    A, *_ = next(iter(read_adapter(folder).pairs.values()))
    assert A.dtype == torch.bfloat16


@conftest.on_gpu
@pytest.mark.parametrize("offload", [False, True])
def test_fp16_run_on_a_gpu(offload, checkpoints, tmp_path, data):
    """As on a T4 or V100: scaled losses, fp32 adapters, a paged optimizer."""
    config = quick_config(
        checkpoints("llama", False), data, tmp_path / "run", max_steps=20, save_steps=10,
        quant=QuantConfig(compute_dtype="fp16"), optim="paged_adamw_8bit",
        offload_activations=offload,
    )  # fmt: skip
    folder = train(config)
    train(replace(config, max_steps=22, resume=True))
    assert losses(folder)[-1] < losses(folder)[0] - 0.1
    assert (folder / "checkpoint-20" / "scaler.pt").is_file()
    A, *_ = next(iter(read_adapter(folder).pairs.values()))
    assert A.dtype == torch.float32 and A.isfinite().all()


def test_fp16_steps_with_a_scaled_loss(checkpoints):
    """What of an fp16 run a CPU can compute: every step but the kernels."""
    base = load_base(str(checkpoints("llama")), QuantConfig(compute_dtype="fp16"), device="cpu")
    model = prepare_for_training(apply_lora(base, LoraConfig(r=4)))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert model.dtype == torch.float16 and {p.dtype for p in trained} == {torch.float32}
    optimizer, scaler = AdamW8bit(trained, 3e-3), torch.amp.GradScaler("cpu")
    # accelerate wraps the forward of an fp16 model so; logits that are made lazily stay so
    forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.float16)(model.forward))
    ids, found = conftest.token_ids(rows=2, length=16), []
    for _ in range(12):
        loss = forward(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    assert found[-1] < found[0] - 0.1 and all(p.isfinite().all() for p in trained)


def test_a_run_records_where_answers_end(base_with_another_eos, data, tmp_path, capsys):
    """And a live model and one merged in memory go by it."""
    base = base_with_another_eos
    folder = train(quick_config(base, data, tmp_path / "run", max_steps=1, save_steps=1))
    said = "answers end at <|im_end|>, beside the base's <pad> (generation_config.json)"
    assert said in capsys.readouterr().out
    for place in (folder, folder / "checkpoint-1"):
        settings = json.loads((place / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [0, 2] and settings["bos_token_id"] == 1
    for load in (load_adapter, swapped):
        model = load(load_base(str(base), FP32), folder)
        assert model.generation_config.eos_token_id == [0, 2]
    merge_and_unload(model).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [0, 2]


def swapped(model, folder):
    apply_lora(model, LoraConfig(r=4))
    return swap_adapter(model, folder)
