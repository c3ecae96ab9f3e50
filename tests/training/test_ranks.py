"""Several ranks against one process: the same rows, losses and adapters; what travels; how a run
ends where one rank fails, is stopped or has other settings."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import (
    axis,
    losses,
    quick_config,
    read_rows,
    refuses,
    require_same_adapter,
    with_folders,
    write_rows,
)
from safetensors.torch import load_file
from several import SECONDS, Ended, free_port, in_ranks
from transformers import TrainerCallback

from qlora.cli import parse
from qlora.config import DataConfig, LoraConfig, TrainConfig
from qlora.plan.estimate import Planner

REPOSITORY = Path(__file__).parents[2]


def trained(config: TrainConfig, *, callback: Any = None, seen: Path | None = None) -> None:
    """Train in this rank; `seen` gets (step before, token ids) of every batch that it reads."""
    from qlora.training import ranks, run
    from qlora.training.trainer import AdapterTrainer

    training_step, made = AdapterTrainer.training_step, run.make_trainer

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        ids = inputs["input_ids"].flatten().tolist()
        if seen is not None and ids:
            with (seen / f"{ranks.number()}.jsonl").open("a") as file:
                file.write(json.dumps([self.state.global_step, ids]) + "\n")
        return training_step(self, model, inputs, *rest)

    def with_callback(*arguments: Any) -> Any:
        trainer = made(*arguments)
        if callback is not None:
            trainer.add_callback(callback)
        return trainer

    AdapterTrainer.training_step, run.make_trainer = recorded, with_callback  # type: ignore
    run.train(config)


def require_done(ended: list[Ended]) -> None:
    assert [(rank.error, rank.code) for rank in ended] == [("", 0)] * len(ended), ended


def rows_of(folder: Path, *, since: int = 0) -> list[Any]:
    """The batches of all ranks with their steps, sorted."""
    batches = chain.from_iterable(read_rows(file) for file in folder.glob("*.jsonl"))
    return sorted(batch for batch in batches if batch[0] >= since)


def require_close(one: Path, other: Path) -> None:
    """Losses of training and evaluation within 1e-5, adapters within 1e-4 of their size."""
    for name in ("loss", "eval_loss"):
        ours, theirs = (
            [row[name] for row in read_rows(folder / "metrics.jsonl") if name in row]
            for folder in (one, other)
        )
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.fixture(scope="module")
def few(data, tmp_path_factory) -> Path:
    """37 rows: the last batch of an epoch is short, and one rank has a batch less."""
    return write_rows(tmp_path_factory.mktemp("few") / "few.jsonl", read_rows(data)[:37])


def config_of(base: Path, rows: Path, output: Path, **settings: Any) -> TrainConfig:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    common = {"optim": "adamw_torch", "max_steps": 20, "save_steps": 100}
    return quick_config(base, rows, output, **(sizes | common | settings))


ORDERS = {"llama": "grouped", "gpt2": "random", "gemma": "streaming", "qwen3": "packing"}


@pytest.mark.parametrize("family", axis(*ORDERS))
def test_two_ranks_train_as_one_process(family, checkpoints, few, tmp_path):
    how = ORDERS[family]
    data: Any = DataConfig(str(few), str(few), max_length=128, packing=how == "packing")
    settings: Any = {"eval_steps": 10}
    if how == "streaming":
        data = replace(data, streaming=True, shuffle_buffer=9, dataset_num_proc=1)
    if how == "packing":
        settings["per_device_train_batch_size"] = 1
    if how == "random":
        settings["trainer"] = {"train_sampling_strategy": "random"}
    config = config_of(checkpoints(family), few, tmp_path / "two", data=data, **settings)
    seen = [tmp_path / "rows of two", tmp_path / "rows of one"]
    for folder in seen:
        folder.mkdir()
    others = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # of a launcher, which the command overrides
    require_done(in_ranks(2, trained_and_seen, config, seen[0], **others))
    one = replace(config, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=4)
    require_done(in_ranks(1, trained_and_seen, one, seen[1]))
    assert rows_of(seen[0]) == rows_of(seen[1]) and len(list(seen[0].iterdir())) == 2
    require_close(tmp_path / "two", tmp_path / "one")


def trained_and_seen(config: TrainConfig, seen: Path) -> None:
    trained(config, seen=seen)


# ---- what travels


def sent_in_a_step(config: TrainConfig) -> list[list[tuple[str, int]]]:
    """(operation, bytes) that this rank gives away, by step, and the parameters that it trains."""
    import torch.distributed as dist

    steps: list[list[tuple[str, int]]] = []

    def counting(name: str, place: int) -> Any:
        send = getattr(dist, name)

        def counted(*given: Any, **named: Any) -> Any:
            if steps:
                steps[-1].append((name, given[place].nbytes))
            return send(*given, **named)

        return counted

    for name, place in (("all_reduce", 0), ("broadcast", 0), ("all_gather", 1),
                        ("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1)):  # fmt: skip
        setattr(dist, name, counting(name, place))

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append([])

    trained(config, callback=Steps())
    return steps


def test_of_a_step_adapter_gradients_and_some_numbers_travel(checkpoints, few, tmp_path):
    """Also with accumulation: gradients travel after the last micro-batch."""
    settings: Any = {"max_steps": 4, "gradient_accumulation_steps": 3, "logging_steps": 100}
    config = config_of(checkpoints("llama"), few, tmp_path / "run", **settings)
    ended = in_ranks(2, sent_in_a_step, config)
    require_done(ended)
    values = load_file(tmp_path / "run" / "adapter_model.safetensors").values()
    gradients = 4 * (sum(value.numel() for value in values) + len(values))
    assert Planner(config, device="cpu").plan().gradient_bytes == gradients
    for rank in ended:
        for step in rank.value[1:-1]:  # the first one and the last are logged
            assert [sent for name, sent in step if name == "all_reduce"] == [gradients]
            others = [sent for name, sent in step if name != "all_reduce"]
            # the count of tokens, and five numbers
            assert sum(others) <= 8 + 5 * 8 and len(others) == 2


# ---- a rank that fails


class At(TrainerCallback):
    """Does something after a step, on one rank."""

    def __init__(self, rank: int, step: int, number: int) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (args.process_index, state.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), self.number)


def stopped_by(config: TrainConfig, rank: int, step: int, number: int, seen: Path) -> Any:
    trained(config, callback=At(rank, step, number), seen=seen)


@pytest.mark.full
def test_a_killed_rank_ends_the_other_and_the_run_goes_on_with_two_or_one(
    checkpoints, few, tmp_path
):
    settings: Any = {"max_steps": 8, "save_steps": 3}
    config = config_of(checkpoints("llama"), few, tmp_path / "whole", **settings)
    seen = {name: tmp_path / f"rows of {name}" for name in ("whole", "part", "two", "one")}
    for folder in seen.values():
        folder.mkdir()
    require_done(in_ranks(2, trained_and_seen, config, seen["whole"]))
    part = replace(config, output_dir=str(tmp_path / "part"))
    first, second = in_ranks(2, stopped_by, part, 1, 5, signal.SIGKILL, seen["part"])
    assert second.code == -signal.SIGKILL and first.error != "it hangs"
    ended = "another process of this run has ended, its error is above"
    assert ended in first.error + first.said or first.code == 1
    for name, count in (("two", 2), ("one", 1)):
        folder = shutil.copytree(tmp_path / "part", tmp_path / name)
        again = replace(config, output_dir=str(folder), resume=True)
        resumed = in_ranks(count, trained_and_seen, again, seen[name])
        require_done(resumed)
        assert rows_of(seen[name]) == rows_of(seen["whole"], since=3)
        require_close(folder, tmp_path / "whole")
    assert "1 processes, not 2: --gradient-accumulation-steps is 4" in resumed[0].said
    (three,) = {rank.error for rank in in_ranks(3, trained_and_seen, again, seen["one"])[:1]}
    assert "4 micro-batches" in three and "start one of 1, 2, 4 processes" in three


@pytest.mark.parametrize("rank", axis(1, 0))
def test_a_signal_to_one_rank_stops_all_after_the_same_step(rank, checkpoints, few, tmp_path):
    """The number is seen in the step after; with dropout, each rank goes on with its own."""
    settings: Any = {"max_steps": 6, "lora": LoraConfig(r=4, lora_dropout=0.2)}
    config = config_of(checkpoints("llama"), few, tmp_path / "whole", **settings)
    (seen := tmp_path / "rows").mkdir()
    require_done(in_ranks(2, trained, config))
    part = replace(config, output_dir=str(tmp_path / "part"))
    ended = in_ranks(2, stopped_by, part, rank, 3, signal.SIGTERM, seen)
    folder = tmp_path / "part" / "checkpoint-4"
    assert [end.error.partition(",")[0] for end in ended] == [f"Interrupted: {folder} is saved"] * 2
    assert [path.name for path in folder.parent.glob("checkpoint-*")] == ["checkpoint-4"]
    require_done(in_ranks(2, trained, replace(part, resume=True)))
    require_same_adapter(tmp_path / "whole", tmp_path / "part")
    assert losses(tmp_path / "whole") == losses(tmp_path / "part")


def trained_short_of_memory(config: TrainConfig) -> int:
    """Where rank 1 has no memory for two rows; returns how often it ran out."""
    from qlora.training import ranks
    from qlora.training.trainer import AdapterTrainer

    one_pass, failed = AdapterTrainer.one_pass, []

    def failing(self: Any, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        loss = one_pass(self, model, inputs, num_items_in_batch)
        if ranks.number() == 1 and len(inputs["attention_mask"]) > 1:
            failed.append(1)
            raise torch.OutOfMemoryError("in the backward pass, with gradients added")
        return loss

    AdapterTrainer.one_pass = failing  # type: ignore[method-assign]
    trained(config)
    return len(failed)


@pytest.mark.full
def test_one_rank_that_runs_out_of_memory_splits_its_batches(checkpoints, few, tmp_path):
    settings: Any = {"max_steps": 4, "fast_path": False}
    config = config_of(checkpoints("llama"), few, tmp_path / "whole", **settings)
    require_done(in_ranks(2, trained, config))
    ended = in_ranks(2, trained_short_of_memory, replace(config, output_dir=str(tmp_path / "part")))
    require_done(ended)
    assert ended[0].value == 0 < ended[1].value
    assert "rank 1: step 1: memory ran out at 2 rows" in ended[1].said
    require_close(tmp_path / "whole", tmp_path / "part")


def trained_with_a_bad_row(config: TrainConfig) -> None:
    """The loss of rank 1's first batch of step 2 is not a number."""
    from qlora.training import ranks
    from qlora.training.trainer import AdapterTrainer

    one_pass, passes = AdapterTrainer.one_pass, []

    def broken(self: Any, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        passes.append(1)
        loss = one_pass(self, model, inputs, num_items_in_batch)
        return loss * torch.nan if ranks.number() == 1 and len(passes) == 3 else loss

    AdapterTrainer.one_pass = broken  # type: ignore[method-assign]
    trained(config)


def test_a_loss_of_one_rank_that_is_not_finite_skips_the_step_of_all(checkpoints, few, tmp_path):
    settings: Any = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9}
    config = config_of(checkpoints("llama"), few, tmp_path / "run", **settings)
    ended = in_ranks(2, trained_with_a_bad_row, config)
    require_done(ended)
    assert "step 2: the loss is not finite, the adapter stays as it was: row" in ended[0].said
    assert ended[1].said == ""
    require_same_adapter(tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2")


# ---- ranks that do not belong together


def trained_with(config: TrainConfig, of_rank_1: dict[str, Any]) -> None:
    own = of_rank_1 if os.environ["RANK"] == "1" else {}
    trained(replace(config, **own))


@pytest.mark.parametrize(
    ("what", "words"),
    [("settings", "other settings, learning_rate 0.5, not 0.01 as rank 0"),
     ("versions", "other versions, accelerate 0.1, not "),
     ("rows", "rank 1 has other rows, "), ("data", "rank 1: ")],
)  # fmt: skip
def test_ranks_with_other_settings_or_rows_are_refused(what, words, checkpoints, few, tmp_path):
    config, own = config_of(checkpoints("llama"), few, tmp_path / "run"), {"learning_rate": 0.5}
    if what == "rows":
        ended = in_ranks(2, with_rows_of_its_own, config, few.parent)
    elif what == "data":
        ended = in_ranks(2, with_rows_of_its_own, config, tmp_path / "missing")
    elif what == "versions":
        ended = in_ranks(2, trained_beside_another_version, config)
    else:
        ended = in_ranks(2, trained_with, config, own)
    errors = [f"{end.error}" for end in ended]
    told = errors[0] if what != "data" else errors[1]
    assert words in told, ended
    assert what == "data" or ended[1].code == 2
    assert not (tmp_path / "run").exists()


def trained_beside_another_version(config: TrainConfig) -> None:
    version = importlib.metadata.version
    if os.environ["RANK"] == "1":
        importlib.metadata.version = lambda name: "0.1" if name == "accelerate" else version(name)
    trained(config)


def with_rows_of_its_own(config: TrainConfig, folder: Path) -> None:
    """As if the files of rank 1's machine were others."""
    from qlora.data import mixing

    prepare_training = mixing.prepare_training

    def prepared(data: Any, *rest: Any, **named: Any) -> Any:
        if os.environ["RANK"] == "1":
            source = folder / "others.jsonl"
            if folder.exists():
                write_rows(source, read_rows(Path(data.name))[:30])
            data = replace(data, data=str(source))
        return prepare_training(data, *rest, **named)

    mixing.prepare_training = prepared
    trained(config)


START = "start them with `torchrun --nproc-per-node N train.py"
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [({}, ("RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set", START)),
     (PLACE, ("MASTER_PORT not set", START)),
     (PLACE | {"RANK": "2", "MASTER_PORT": "1"}, ("RANK must be from 0 to 1, got 2", START)),
     (PLACE | {"MASTER_PORT": "x"}, ("MASTER_PORT must be from 1 to 65535, got 'x'", START)),
     ({"WORLD_SIZE": ""}, ("WORLD_SIZE must be a whole number, got '': unset it",)),
     ({"ACCELERATE_USE_FSDP": "true"}, ("ACCELERATE_USE_FSDP is set", "multi-GPU without it"))],
)  # fmt: skip
def test_variables_of_a_launcher_that_are_refused(
    variables, words, checkpoints, few, tmp_path, monkeypatch
):
    from qlora.training import train

    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with refuses(tmp_path / "run", *words):
        train(config_of(checkpoints("llama"), few, tmp_path / "run"))


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"RANK": "0"}, "1/2 clients joined"), ({"RANK": "1"}, "Connection refused"),
     ({"RANK": "1", "MASTER_ADDR": "no.such.host.invalid"}, "no.such.host.invalid")],
)  # fmt: skip
def test_a_rank_that_finds_no_other_ends(variables, words, checkpoints, few, tmp_path, monkeypatch):
    from qlora.training import ranks, train

    monkeypatch.setattr(ranks, "JOIN", timedelta(seconds=1))
    others = {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    for name, value in (PLACE | others | variables).items():
        monkeypatch.setenv(name, value)
    with refuses(tmp_path / "run", "the 2 processes do not find each other at", words):
        train(config_of(checkpoints("llama"), few, tmp_path / "run"))


# ---- launchers


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
                   "--main_process_port=0"),
}  # fmt: skip
SCRIPT = """
import os, sys
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit("the first start fails")
from qlora.__main__ import run
run("train", prog="train.py")
"""


def launched(launcher: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a script, by a launcher; none of them is left."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *map(str, words)]
    given: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = with_folders(REPOSITORY) | {"OMP_NUM_THREADS": "1", **variables}
    with subprocess.Popen(command, env=environment, **given) as process:
        try:
            said, errors = process.communicate(timeout=SECONDS)
        finally:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def flags(base: Path, rows: Path, output: Path, *more: object) -> list[object]:
    return [
        "--model", base, "--data", rows, "--eval-data", rows, "--output-dir", output,
        "--max-length", 128, "--logging-steps", 1, "--compute-dtype", "fp32", "--samples", 0,
        "--per-device-train-batch-size", 2, *more,
    ]  # fmt: skip


def commanded(words: list[object], callback: Any = None) -> None:
    trained(parse(TrainConfig, [*map(str, words)], prog="train.py"), callback=callback)


@pytest.mark.parametrize("launcher", axis(*LAUNCHERS))
def test_a_launcher_restarts_a_run_from_its_last_checkpoint(launcher, checkpoints, few, tmp_path):
    """A run in which a rank was killed after step 3."""
    (script := tmp_path / "script.py").write_text(SCRIPT)
    output, more = tmp_path / "run", ("--max-steps", 4, "--save-steps", 2)
    words = flags(checkpoints("llama"), few, output, *more)
    first, second = in_ranks(2, commanded, words, At(1, 3, signal.SIGKILL))
    assert second.code == -signal.SIGKILL and first.error != "it hangs"
    name = "--max_restarts=1" if launcher == "accelerate" else "--max-restarts=1"
    done = launched(launcher, name, script, *words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "training: 2 steps after step 2" in done.stdout
    assert done.stdout.count("An example row") == 1  # of one rank
    steps = [row["step"] for row in read_rows(output / "metrics.jsonl")]
    assert steps == [1, 2, 2, 3, 4, 4]  # epochs end at 2 and 4, with an evaluation


def test_an_error_of_all_ranks_is_printed_by_the_first(tmp_path):
    done = launched("torchrun", REPOSITORY / "train.py", "--sead", 7)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: unknown flag --sead. Did you mean --seed?"]
    assert re.findall(r"exitcode *: 2 ", done.stderr) and done.returncode == 1


def test_an_error_of_another_rank_is_printed_too():
    command, others = [sys.executable, "train.py", "--sead", "7"], {"WORLD_SIZE": "2", "RANK": "1"}
    environment = with_folders(REPOSITORY) | others
    given: Any = {"env": environment, "cwd": REPOSITORY, "capture_output": True, "text": True}
    done = subprocess.run(command, **given)
    said = "error: unknown flag --sead. Did you mean --seed?\n"
    assert (done.returncode, done.stderr) == (2, said)


OTHER_SEED = """
import os, sys
from qlora.__main__ import run
sys.argv += ["--seed", os.environ["RANK"]]
run("train", prog="train.py")
"""


@pytest.mark.full
def test_other_settings_of_a_rank_are_one_line_of_the_first(checkpoints, few, tmp_path):
    (script := tmp_path / "script.py").write_text(OTHER_SEED)
    words = flags(checkpoints("llama"), few, tmp_path / "run")
    done = launched("torchrun", script, *words, CUDA_VISIBLE_DEVICES="")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rank 1 has other settings, seed 1, not 0 as rank 0" in errors[0]
    assert re.findall(r"exitcode *: 2 ", done.stderr) and done.returncode == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(checkpoints, few, tmp_path):
    """In fp32; products of other sizes have other sums, as TF32 would make worse."""
    more = ("--max-steps", 10, "--optim", "adamw_torch", "--gradient-accumulation-steps")
    run = flags(checkpoints("llama"), few, tmp_path / "two", *more, 1)
    assert launched("torchrun", REPOSITORY / "train.py", *run).returncode == 0
    run = flags(checkpoints("llama"), few, tmp_path / "one", *more, 2)
    one = [sys.executable, REPOSITORY / "train.py", *map(str, run)]
    subprocess.run(one, env=with_folders(REPOSITORY), check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
