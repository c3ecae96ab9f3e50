"""Resuming: the same rows in the same order, the settings of the run's start, whole checkpoints."""

import errno
import json
import os
import platform
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import yaml
from conftest import (
    axis,
    losses,
    quick_config,
    read_rows,
    refuses,
    require_same_adapter,
    write_rows,
)
from safetensors import SafetensorError

from qlora import save_adapter
from qlora.config import DataConfig, LoraConfig, QuantConfig
from qlora.errors import Interrupted, UserError
from qlora.files import locked
from qlora.training import run
from qlora.training.checkpoints import OPTIMIZER, RANDOM, read_state, seal, write_state
from qlora.training.checks import check_settings
from qlora.training.outputs import MetricsWriter
from qlora.training.run import train
from qlora.training.trainer import AdapterTrainer


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, list[int]]]:
    """(optimizer steps before it, token ids) of every batch that training reads."""
    batches: list[tuple[int, list[int]]] = []
    training_step = AdapterTrainer.training_step

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append((self.state.global_step, inputs["input_ids"].flatten().tolist()))
        return training_step(self, model, inputs, *rest)

    monkeypatch.setattr(AdapterTrainer, "training_step", recorded)
    return batches


@pytest.mark.parametrize(
    "how",
    ["group_by_length", "streaming", *axis("packing", "random", "batch_rebalance", "sequential")],
)
def test_resuming_reads_the_rows_of_the_whole_run(how, checkpoints, tmp_path, data, seen):
    """Stopped in the second epoch, then in the first, with dropout and accumulation: every
    batch that follows, and the adapter, are those of the run that was not stopped."""
    packing = how == "packing"
    settings: Any = {
        "data": DataConfig(str(data), max_length=128, packing=packing), "num_train_epochs": 2,
        "max_steps": -1, "per_device_train_batch_size": 1 if packing else 4, "save_steps": 1,
        "gradient_accumulation_steps": 3, "lora": LoraConfig(r=4, lora_dropout=0.2),
        "save_total_limit": 20, "logging_steps": 2,
    }  # fmt: skip
    if how == "streaming":
        streamed: Any = {"streaming": True, "shuffle_buffer": 9, "dataset_num_proc": 1}
        settings |= {"data": replace(settings["data"], **streamed), "max_steps": 6}
    elif not packing:
        settings["trainer"] = {"train_sampling_strategy": how}
    config = quick_config(checkpoints("llama"), data, tmp_path / "whole", **settings)
    whole = train(config)
    last, batches = max(step for step, _ in seen) + 1, list(seen)
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    config = replace(config, output_dir=str(parts), resume=True)
    for stopped_at in (last - 1, last // 2 - 1):
        for step in range(stopped_at + 1, last + 1):
            shutil.rmtree(parts / f"checkpoint-{step}")
        seen.clear()
        train(config)
        assert seen == [batch for batch in batches if batch[0] >= stopped_at]
        require_same_adapter(whole, parts)
        assert losses(parts) == losses(whole)


def test_order_depends_on_the_seed_and_the_epoch_alone(checkpoints, tmp_path, data, seen):
    """Not on the random numbers drawn so far: dropout draws some on the CPU. Each epoch differs,
    and the first is plain Trainer's."""
    runs, data = [], write_rows(tmp_path / "few.jsonl", read_rows(data)[:12])
    for dropout, seed in ((0.0, 42), (0.2, 42), (0.0, 43)):
        settings: Any = {"num_train_epochs": 2, "max_steps": -1, "seed": seed}
        settings["lora"] = LoraConfig(r=4, lora_dropout=dropout)
        folder = tmp_path / f"{dropout}-{seed}"
        train(quick_config(checkpoints("llama"), data, folder, **settings))
        runs.append([ids for _, ids in seen])
        seen.clear()
    first, dropped, other = runs
    assert first == dropped != other
    assert first[:3] != first[3:]


# ---- settings


@pytest.fixture
def started(quick_run, tmp_path):
    """The config of a copy of the quick run, stopped after step 2 of 4, to resume."""
    folder = shutil.copytree(quick_run.folder, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoint-4")
    return replace(quick_run.config, output_dir=str(folder), resume=True)


OTHER_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"seed": 7}, "seed 42, not 7"),
    ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 4, not 2"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1, not 2"),
    ({"weight_decay": 0.1}, "weight_decay 0.0, not 0.1"),
    ({"optim": "adamw_torch"}, "optim paged_adamw_8bit, not adamw_torch"),
    ({"loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio 1.0, not 4.0"),
    ({"task": "seq2seq"}, "task causal-lm, not seq2seq"),
    ({"lora": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)}, "lora_dropout 0.0, not 0.1"),
    ({"lora": LoraConfig(r=4, lora_alpha=8, use_dora=True)}, "use_dora False, not True"),
    ({"quant": QuantConfig(compute_dtype="fp32", blocksize=128)}, "blocksize 64, not 128"),
    ({"trainer": {"adam_beta2": 0.9}}, "trainer.adam_beta2 None, not 0.9"),
    (
        {"trainer": {"metric_for_best_model": "accuracy"}},
        "trainer.metric_for_best_model None, not accuracy",
    ),
    (
        {"trainer": {"train_sampling_strategy": "random"}},
        "train_sampling_strategy None, not random",
    ),
]


@pytest.mark.parametrize(("settings", "words"), OTHER_SETTINGS, ids=[w for _, w in OTHER_SETTINGS])
def test_resuming_with_other_settings_is_refused(settings, words, started):
    """Before model and data are looked at: this model does not exist."""
    settings |= {"model": "/nowhere", "learning_rate": 1e-5}
    with refuses(Path(started.output_dir), words, "--config", "run.yaml", "new --output-dir"):
        train(replace(started, **settings))


@pytest.mark.parametrize("change", ["content", "order", "max_length", "fewer"])
def test_resuming_on_other_rows_is_refused(change, started, data, tmp_path):
    rows, length = read_rows(data), 128
    if change == "content":
        rows[5]["completion"] = "26 " + rows[5]["completion"][3:]  # of the same length
    rows = {"order": rows[::-1], "fewer": rows[:-1]}.get(change, rows)
    length = 40 if change == "max_length" else 128
    other = write_rows(tmp_path / "other.jsonl", rows)
    words = "max_length 128, not 40" if change == "max_length" else "other rows"
    with refuses(Path(started.output_dir), words):
        train(replace(started, data=DataConfig(str(other), str(data), max_length=length)))


ANYWAY: dict[str, dict[str, Any]] = {  # words of the refusal -> other settings
    "per_device_train_batch_size 4, not 5": {"per_device_train_batch_size": 5},
    "weight_decay 0.0, not 0.5": {"weight_decay": 0.5},
    "other rows": {},
    "seed 42, not 7": {"seed": 7},
    "gradient_accumulation_steps 1, not 2": {"gradient_accumulation_steps": 2},
    "max_length 128, not 40": {"data": {"max_length": 40}},
    "packing False, not True": {"data": {"packing": True}},
    "trainer.adam_beta2 None, not 0.9": {"trainer": {"adam_beta2": 0.9}},
}


@pytest.mark.parametrize("words", axis(*ANYWAY))
def test_resume_anyway_lets_the_rest_differ_from_the_next_step_on(
    words, started, data, tmp_path, seen, capsys
):
    """Refused without it. The batches that follow are the first ones of a new run with these
    settings, also where the resumed run is resumed again."""
    settings, output = dict(ANYWAY[words]), Path(started.output_dir)
    rows = write_rows(tmp_path / "other.jsonl", read_rows(data)[::-1]) if not settings else data
    settings["data"] = replace(started.data, data=str(rows), **settings.pop("data", {}))
    settings |= {"samples": 0, "max_steps": 5, "save_steps": 4}
    other = replace(started, **settings)
    with refuses(output, words, "--resume-anyway, or a new --output-dir"):
        train(other)
    train(replace(other, resume_anyway=True))
    said, batches = capsys.readouterr().out, [ids for _, ids in seen]
    adapter = (output / "adapter_model.safetensors").read_bytes()
    recorded = yaml.safe_load((output / "run.yaml").read_text())["resumed"]
    assert "--resume, from step 2 on: " in said and recorded[0]["step"] == 2
    keeps = words.startswith(("weight", "trainer"))
    assert ("order begins anew" in said) != keeps
    shutil.rmtree(output / "checkpoint-5", ignore_errors=True)
    seen.clear()
    train(other)  # from checkpoint-4, as after a kill
    assert (output / "adapter_model.safetensors").read_bytes() == adapter
    assert [ids for _, ids in seen] == batches[-len(seen) :] and 0 < len(seen) < len(batches)
    seen.clear()
    train(replace(other, output_dir=str(tmp_path / "new"), resume=False))
    new = [ids for _, ids in seen]
    assert batches == (new[2:] if keeps else new[: len(batches)])
    state = read_state(output / "checkpoint-4" / OPTIMIZER)["optimizer"]["param_groups"][0]
    assert state["weight_decay"] == other.weight_decay
    assert state["betas"][1] == other.trainer.get("adam_beta2", 0.999)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora": LoraConfig(r=8, lora_alpha=8)}, "r 4, not 8"),
        ({"optim": "adamw_torch"}, "optim paged_adamw_8bit, not adamw_torch"),
        ({"quant": QuantConfig(compute_dtype="fp32", quant_type="fp4")}, "quant_type nf4, not fp4"),
        ({"model": "qwen2"}, "another base"),
    ],
)
def test_what_no_run_can_go_on_with_is_refused_anyway(settings, words, started, checkpoints):
    if "model" in settings:
        settings = {"model": str(checkpoints(settings["model"]))}
    with refuses(Path(started.output_dir), words):
        train(replace(started, resume_anyway=True, **settings))


def test_what_may_change_is_said_and_recorded(started, data, tmp_path, capsys):
    """The data elsewhere, another learning rate, more steps: all of them take effect."""
    moved = str(shutil.copy(data, tmp_path / "moved.jsonl"))
    settings: Any = {"max_steps": 6, "logging_steps": 2, "data": DataConfig(moved, max_length=128)}
    settings |= {"eval_steps": None, "learning_rate": 1e-3, "samples": 0, "save_steps": 5}
    folder = train(replace(started, **settings))
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("--resume, from step 2 on: ")]
    for words in ("learning_rate 0.01 -> 0.001", "max_steps 4 -> 6", "logging_steps 1 -> 2"):
        assert words in line
    assert "learning rate goes on at 0.001" in said and "it was 0.01" in said
    rates = {row["step"]: row["learning_rate"] for row in read_rows(folder / "metrics.jsonl")[3:]}
    assert rates == {4: 1e-3, 6: 1e-3}
    assert (folder / "checkpoint-5").exists() and not (folder / "checkpoint-4").exists()
    recorded = yaml.safe_load((folder / "run.yaml").read_text())
    assert recorded["config"]["learning_rate"] == 1e-3 and recorded["config"]["data"] == moved
    (resumed,) = recorded["resumed"]
    assert resumed["step"] == 2 and resumed["changed"]["learning_rate"] == [0.01, 0.001]
    # The run is complete: nothing is trained with this rate, and run.yaml does not claim it.
    train(replace(started, **settings | {"learning_rate": 5e-3}))
    assert "All 6 steps are done" in capsys.readouterr().out
    assert yaml.safe_load((folder / "run.yaml").read_text()) == recorded
    assert "| learning rate | 0.001 |" in (folder / "README.md").read_text()


def test_the_rate_that_is_not_given_is_the_starts(started):
    folder = train(replace(started, learning_rate=None))
    assert read_rows(folder / "metrics.jsonl")[-2]["learning_rate"] == 1e-2
    assert "resumed" not in yaml.safe_load((folder / "run.yaml").read_text())


def test_a_run_without_run_yaml_resumes(started, quick_run, capsys):
    (Path(started.output_dir) / "run.yaml").unlink()
    require_same_adapter(train(started), quick_run.folder)
    assert "settings are not compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("schedule", "by"),
    [("linear", "steps"), pytest.param("cosine", "epochs", marks=pytest.mark.full)],
)
def test_more_steps_follow_the_schedule_of_the_longer_run(
    schedule, by, checkpoints, tmp_path, data, capsys
):
    """A finished run of 2 steps, then 4 in all: the rates of steps 3 and 4 are those of a run of 4
    steps, where the finished schedule has 0."""
    settings: Any = {"lr_scheduler_type": schedule, "loraplus_lr_ratio": 4.0, "save_steps": 9}
    shorter: Any = {"max_steps": 2}
    if by == "epochs":  # of 2 steps
        settings |= {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 20}
        shorter = {"num_train_epochs": 1}
    config = quick_config(checkpoints("llama"), data, tmp_path / "parts", **settings)
    folder = train(replace(config, **shorter))
    train(replace(config, resume=True))
    said = capsys.readouterr().out
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    ours, wanted = (
        [row["learning_rate"] for row in read_rows(run / "metrics.jsonl")][2:]
        for run in (folder, whole)
    )
    assert ours == wanted and ours[0] > 0
    assert f"the learning rate goes on at {ours[0]:.3g}, that of a run of 4 steps" in said


PLATEAU, GREEDY = "reduce_lr_on_plateau", "greedy"  # they follow the evaluation loss


@pytest.fixture
def by_loss(checkpoints, tmp_path, data) -> Any:
    """Schedule -> the config of a run whose rate changes at each evaluation."""
    kwargs = {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "mode": "max"}}
    both = DataConfig(str(data), str(data), max_length=128)
    settings: Any = {"data": both, "eval_steps": 1, "trainer": kwargs, "learning_rate": 1.0}
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", **settings)
    return lambda schedule: replace(config, lr_scheduler_type=schedule)


def resumed_rates(config: Any, **settings: Any) -> list[float]:
    """Rates of steps 3 and 4 of the run of `config`, resumed after step 2 with these settings."""
    folder = Path(config.output_dir)
    shutil.rmtree(folder / "checkpoint-4")
    folder = train(replace(config, resume=True, **settings))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    return [row["learning_rate"] for row in rows if row["step"] > 2]


@pytest.mark.parametrize("schedule", [PLATEAU, GREEDY])
def test_a_schedule_by_evaluation_loss_goes_on(schedule, by_loss, tmp_path):
    """As in the run that was not stopped; another learning rate keeps its factor so far, and
    another setting of the schedule takes effect."""
    config = by_loss(schedule)
    whole = shutil.copytree(train(config), tmp_path / "whole")
    rows = [row for row in read_rows(whole / "metrics.jsonl") if "loss" in row]
    rates = [row["learning_rate"] for row in rows]
    assert len({*rates}) > 1 and rates[2] != rates[0]
    assert resumed_rates(config) == rates[2:]
    require_same_adapter(Path(config.output_dir), whole)
    assert resumed_rates(config, learning_rate=0.5)[0] == rates[2] / 2
    patient = {"lr_scheduler_kwargs": {"patience": 9}}
    assert resumed_rates(config, trainer=patient) == [rates[2], rates[2]]


def test_another_kind_of_schedule_goes_on_at_its_own_rate(by_loss, tmp_path):
    config = replace(by_loss(PLATEAU), output_dir=str(tmp_path / "other"))
    train(config)
    warm: Any = {"lr_scheduler_type": "constant_with_warmup", "trainer": {"warmup_steps": 4}}
    assert resumed_rates(config, **warm) == [0.5, 0.75]
    config = replace(by_loss("linear"), trainer={})
    train(config)
    assert resumed_rates(config, lr_scheduler_type=GREEDY) == [1.0, 1.0]


# ---- checkpoints


DAMAGED = ["", '{"global_step": 4, "log', "[4]", "null", "{}", '{"global_step": null}', "\x00" * 9,
           '{"global_step": 4, "of_a_later_version": 1}']  # fmt: skip


@pytest.mark.parametrize("state", DAMAGED)
def test_a_checkpoint_with_a_damaged_state_is_no_checkpoint(state, started, capsys):
    """As a full disk leaves it: the one before is resumed from; without one that is said. A folder
    that somebody has copied is none either."""
    folder = Path(started.output_dir)
    for name in ("checkpoint-4", "checkpoint-old"):
        shutil.copytree(folder / "checkpoint-2", folder / name)
    (folder / "checkpoint-4" / "trainer_state.json").write_text(state)
    assert check_settings(started, folder) == str(folder / "checkpoint-2")
    assert "checkpoint-4, checkpoint-old of" in capsys.readouterr().out
    (folder / "checkpoint-2" / "trainer_state.json").write_text(state)
    with refuses(folder, "checkpoint-2, checkpoint-4, checkpoint-old of", "new --output-dir"):
        train(started)
    for path in folder.iterdir():
        if path.is_file() and path.name != "run.yaml":
            path.unlink()
    (folder / "checkpoint-old" / "trainer_state.json").parent.rename(folder / "checkpoint-3")
    with refuses(folder, "checkpoint-2, checkpoint-3, checkpoint-4", "and removes them"):
        train(started)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (OPTIMIZER, {"epoch": 3}),
        (OPTIMIZER, {"optimizer": {"param_groups": [{"params": [0]}]}}),
        (RANDOM, {"python": 7, "cpu": None}),
        (RANDOM, 3),
    ],
)
def test_a_checkpoint_with_other_contents_is_refused_before_the_run(name, content, started):
    """Whose hashes are right: another program has written it."""
    folder = Path(started.output_dir) / "checkpoint-2"
    write_state(folder / name, content)
    seal(folder)
    with refuses(folder.parent, "checkpoint-2 cannot be resumed from", "Remove that folder"):
        train(started)


def test_another_optimizer_is_refused_without_run_yaml_too(started):
    (Path(started.output_dir) / "run.yaml").unlink()
    with refuses(Path(started.output_dir), "of another optimizer than --optim adamw_torch"):
        train(replace(started, optim="adamw_torch"))


@pytest.mark.parametrize("part", ["data: null", "base: [1]", "resumed: {}", "config: 3"])
def test_a_run_file_with_other_contents_is_refused(part, started):
    path = Path(started.output_dir) / "run.yaml"
    name, _, value = part.partition(": ")
    path.write_text(
        yaml.safe_dump(yaml.safe_load(path.read_text()) | {name: yaml.safe_load(value)})
    )
    with refuses(path.parent, "run.yaml is not a run file of train.py, or damaged"):
        train(started)


# ---- a run that is stopped


@pytest.fixture
def stop(monkeypatch):
    """`stop(method, *signals, step=2)`: the process gets them in this method, after step 2. None
    of them is ignored, as a shell or nohup ignores some for what it starts."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}

    def stop_in(method: str, *signals: int, step: int = 2) -> None:
        original, waiting = getattr(AdapterTrainer, method), list(signals)

        def stopped(self: Any, *given: Any, **named: Any) -> Any:
            while waiting and self.state.global_step == step:
                os.kill(os.getpid(), waiting.pop())
            return original(self, *given, **named)

        monkeypatch.setattr(AdapterTrainer, method, stopped)

    yield stop_in
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("method", "number", "settings"),
    [
        ("training_step", signal.SIGINT, {"eval_steps": 3}),
        ("training_step", signal.SIGTERM, {"trainer": {"save_only_model": True}}),
        ("training_step", signal.SIGHUP, {"trainer": {"save_strategy": "no"}}),
        ("evaluation_loop", signal.SIGINT, {"eval_steps": 3}),
    ],
)
def test_a_signal_saves_a_checkpoint_and_resume_goes_on(
    method, number, settings, checkpoints, tmp_path, data, stop, capsys, monkeypatch
):
    settings = {"gradient_accumulation_steps": 2, "save_steps": 9} | settings
    both = DataConfig(str(data), str(data) if "eval_steps" in settings else None, max_length=128)
    config = quick_config(checkpoints("llama"), data, tmp_path / "whole", data=both, **settings)
    whole = train(config)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(each) for each in signals]
    numbers = [number] * (2 if number == signal.SIGHUP else 1)  # a closed terminal sends two
    stop(method, *numbers, step=3 if method == "evaluation_loop" else 2)
    config = replace(config, output_dir=str(tmp_path / "parts"))
    with pytest.raises(Interrupted, match=r"parts/checkpoint-3 is saved.*--resume") as stopped:
        train(config)
    assert stopped.value.exit_code == 128 + number
    assert handlers == [signal.getsignal(each) for each in signals]
    assert ("stopping after this step" in capsys.readouterr().out) == (method == "training_step")
    monkeypatch.undo()
    parts = train(replace(config, resume=True))
    require_same_adapter(whole, parts)
    ours, theirs = (
        [(row["step"], row.get("loss"), row.get("eval_loss")) for row in read_rows(path)]
        for path in (parts / "metrics.jsonl", whole / "metrics.jsonl")
    )
    assert ours == theirs  # with the evaluation that it was stopped before or in


def test_a_second_signal_stops_at_once(checkpoints, tmp_path, data, stop, monkeypatch, capsys):
    """Before the first checkpoint: --resume then starts from the beginning."""
    config = quick_config(checkpoints("llama"), data, tmp_path / "run")
    stop("training_step", signal.SIGINT, signal.SIGTERM, step=0)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    monkeypatch.undo()
    folder = train(replace(config, resume=True))
    assert "has no checkpoint yet, the run starts from the beginning" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_without_a_checkpoint_does_not_block_a_new_start(
    checkpoints, tmp_path, data, quick_run
):
    """Its rows, cut ones too, and its half-written checkpoint do not become the new run's."""
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "adapter_config.json").write_text("{}")
    (folder / "run.yaml").write_text("config: {}\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo')
    (folder / "samples.jsonl").write_text('{"prompt": "a"')
    config = quick_config(checkpoints("llama"), data, folder, samples=1, max_steps=1)
    (folder / "notes.txt").write_text("mine")
    with refuses(folder, "already holds a run"):
        train(config)
    with refuses(folder, "no whole trainer_state.json", "give a new --output-dir"):
        train(replace(config, resume=True))
    (folder / "notes.txt").unlink()
    me = f"in use by another run, process {os.getpid()} on {platform.node()}: wait"
    with locked(folder), refuses(folder, me):
        train(config)
    (folder / ".lock").write_text('{"pid": 1, "host": "else", "started": 0.0}')  # was killed
    train(config)
    assert not (folder / ".lock").exists()
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1]
    assert not (folder / "checkpoint-2").exists()


DISK_FULL: list[tuple[str, Exception]] = [  # what each library raises on a tmpfs that is full
    (
        "qlora.training.saving.save_adapter",
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ),
    ("tokenizers.Tokenizer.save", Exception("No space left on device (os error 28)")),
    ("qlora.training.checkpoints.os.fsync", OSError(errno.EIO, "Input/output error")),
    ("qlora.training.outputs.files.metrics_line", OSError(errno.ENOSPC, "No space left")),
    ("transformers.TrainerState.save_to_json", OSError(errno.EDQUOT, "Disk quota exceeded")),
]


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints(started, quick_run, monkeypatch):
    """The half-written checkpoint is removed; after any number of failures the run goes on."""
    folder = Path(started.output_dir)
    before = {path: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}
    for where, error in DISK_FULL:
        with monkeypatch.context() as patch:
            patch.setattr(where, Mock(side_effect=error))
            with pytest.raises(UserError, match=r"cannot be written: .*-2 is saved.*--resume"):
                train(replace(started, on_full_disk="stop"))
        assert before == {path: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}
        assert not (folder / "checkpoint-4").exists(), where
    require_same_adapter(train(started), quick_run.folder)


def test_a_run_goes_on_while_the_disk_is_full(checkpoints, tmp_path, data, monkeypatch, capsys):
    """Without the checkpoint of the best, the last step, two logs and, at first, its result: what
    is lacking is told, and the result is the same."""
    writes, full = Path.open, OSError(errno.ENOSPC, "No space left on device")
    both = DataConfig(str(data), str(data), max_length=128)
    settings: Any = {"early_stopping_patience": 9, "eval_steps": 1, "save_steps": 1, "data": both}
    config = quick_config(checkpoints("llama"), data, tmp_path / "whole", **settings)
    whole = train(config)

    def opened(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        lines = path.read_bytes().count(b"\n") if (path.name, mode) == ("metrics.jsonl", "a") else 0
        if lines == 2 and next(logs, None):
            raise full
        return writes(path, mode, *given, **named)

    logs = iter("12345")
    failing = Mock(wraps=save_adapter, side_effect=[DEFAULT, full, DEFAULT, full, full, DEFAULT])
    monkeypatch.setattr("qlora.training.saving.save_adapter", failing)
    monkeypatch.setattr("qlora.training.saving.RETRY_SECONDS", 0.0)
    monkeypatch.setattr(Path, "open", opened)
    capsys.readouterr()
    parts = train(replace(config, output_dir=str(tmp_path / "parts")))
    said = capsys.readouterr().out
    for step, last in ((2, 1), (4, 3)):
        at = f"error: checkpoint-{step} cannot be written: No space left on device. Make room"
        assert at in said and f"parts/checkpoint-{last} is saved" in said
    assert "The adapter of step 4 is in memory only" in said and "metrics.jsonl cannot" in said
    assert losses(parts) == losses(whole)
    require_same_adapter(parts, whole)
    assert "| optimizer steps | 4 |" in (parts / "README.md").read_text()


def test_two_commands_in_one_folder(started, monkeypatch):
    """One loads its data and model for long, while the other trains: that one is kept."""
    output, prepare, others = Path(started.output_dir), run.before_training, iter([True])

    def meanwhile(*given: Any) -> None:
        if next(others, False):
            train(replace(config, resume=(output / "checkpoint-2").exists()))
        prepare(*given)

    monkeypatch.setattr(run, "before_training", meanwhile)
    for config in (started, replace(started, resume=False)):
        with pytest.raises(UserError, match=rf"another run has used {output} meanwhile"):
            train(config)
        assert (output / "checkpoint-4").is_dir() and (
            output / "adapter_model.safetensors"
        ).exists()
        shutil.rmtree(output)
        others = iter([True])


def test_a_log_that_is_moved_or_a_folder_that_is_removed_while_a_run_writes_it(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    for row in ({"loss": 1.0}, {"loss": 2.0}):
        writer._append(json.dumps(row) + "\n")
        assert read_rows(writer.path) == [row]
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_process_numbers_that_are_none_are_refused(value, name, started, monkeypatch):
    monkeypatch.setenv(name, value)
    with refuses(Path(started.output_dir), f"{name} must be a whole number, got {value!r}: unset"):
        train(started)


# ---- the best checkpoint


def test_card_and_lines_state_the_evaluation_of_the_saved_checkpoint(
    checkpoints, tmp_path, data, capsys
):
    """The best is the first of four here, as greater is better; also when the adapter is written by
    a later --resume."""
    trainer = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    settings: Any = {"trainer": {**trainer, "greater_is_better": True}, "eval_steps": 1}
    both = DataConfig(str(data), str(data), max_length=128)
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", data=both, **settings)
    for resume in (False, True):
        folder = train(replace(config, save_steps=1, resume=resume))
        said, card = capsys.readouterr().out, (folder / "README.md").read_text()
        require_same_adapter(folder, folder / "checkpoint-1")
        rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] == 1]
        measured = (
            f"training loss {rows[0]['loss']:.4f}, evaluation loss {rows[1]['eval_loss']:.4f}"
        )
        assert f"| after these steps | {measured} |" in card
        assert "| optimizer steps | 1, the best of 4 |" in card
        assert f"The best checkpoint is that of step 1: {measured}." in said
        (folder / "adapter_model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-1")
    with refuses(
        folder, "checkpoint-1, the best so far, is missing", "load_best_model_at_end false"
    ):
        train(replace(config, save_steps=1, resume=True))


def test_a_resumed_run_loads_the_best_checkpoint_of_its_folder(checkpoints, tmp_path, data):
    """Resumed from the best itself, and stopped before the next checkpoint; the folder has another
    place than at the start."""
    settings: Any = {"early_stopping_patience": 1, "eval_steps": 1, "save_steps": 1}
    settings["trainer"] = {"greater_is_better": True}
    settings["data"] = DataConfig(str(data), str(data), max_length=128)
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", **settings)
    best = train(config) / "checkpoint-1"
    state = json.loads((best / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_model_checkpoint"]) == (1, str(best))
    shutil.rmtree(best.with_name("checkpoint-2"))
    best.with_name("adapter_model.safetensors").unlink()
    moved = best.parent.rename(tmp_path / "moved")
    train(replace(config, output_dir=str(moved), resume=True, save_steps=3))
    require_same_adapter(moved, moved / "checkpoint-1")
    assert not (moved / "checkpoint-2").exists()


def test_a_best_adapter_between_two_checkpoints_is_saved(checkpoints, tmp_path, data):
    """Checkpoints are due after steps 3 and 4; the best is that of step 1, also when resumed."""
    settings: Any = {"early_stopping_patience": 9, "eval_steps": 1, "save_steps": 3}
    settings |= {"trainer": {"greater_is_better": True}, "save_total_limit": 1}
    settings["data"] = DataConfig(str(data), str(data), max_length=128)
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", **settings)
    for resume in (False, True):
        folder = train(replace(config, resume=resume))
        require_same_adapter(folder, folder / "checkpoint-1")
        assert "| optimizer steps | 1, the best of 4 |" in (folder / "README.md").read_text()
        shutil.rmtree(folder / "checkpoint-4")


def test_a_mixture_with_an_eval_share_is_resumed_on_the_same_rows(checkpoints, data, tmp_path):
    """Also if its files have other places, and the rows of one another order."""
    rows = read_rows(data)
    paths = [write_rows(tmp_path / f"{name}.jsonl", rows[i::2]) for i, name in enumerate("ab")]
    mixed = {"max_length": 128, "data_weights": (2.0, 1.0), "eval_share": 0.2}
    config = quick_config(
        checkpoints("llama"),
        data,
        tmp_path / "out",
        data=DataConfig(tuple(map(str, paths)), **mixed),
    )
    train(config)
    recorded = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    counts = {part: facts["rows"] for part, facts in recorded["data"].items()}
    assert counts == {"training": 24, "evaluation": 6}  # of 20 and 10
    assert any("eval_loss" in row for row in read_rows(tmp_path / "out" / "metrics.jsonl"))
    longer = replace(config, resume=True, max_steps=6)
    train(longer)
    assert read_rows(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 6
    moved = tuple(str(path.rename(path.with_name(f"moved-{path.name}"))) for path in paths)
    train(replace(longer, max_steps=7, data=DataConfig(moved, **mixed)))
    with pytest.raises(UserError, match=r"eval_share 0\.2, not 0\.3"):
        train(replace(longer, data=DataConfig(moved, **mixed | {"eval_share": 0.3})))
