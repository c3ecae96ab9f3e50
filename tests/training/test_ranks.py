"""Several ranks against one process: the same rows, losses and adapters; what travels; how a run
ends where one rank fails, is stopped or has other settings."""

import importlib.metadata
import os
import shutil
import signal
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    axis,
    losses,
    quick_config,
    read_rows,
    require_same_adapter,
    write_rows,
)
from safetensors.torch import load_file
from several import At, in_ranks, require_done, trained
from transformers import TrainerCallback

from qlora.config import DataConfig, LoraConfig, TrainConfig
from qlora.plan.estimate import Planner


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
    """(operation, bytes) that this rank gives away, by step."""
    import torch.distributed as dist

    steps: list[list[tuple[str, int]]] = []

    def counting(name: str, place: int) -> Any:
        send = getattr(dist, name)

        def counted(*given: Any, **named: Any) -> Any:
            if steps:
                steps[-1].append((name, given[place].nbytes))
            return send(*given, **named)

        return counted

    new = [name for name in ("all_gather_single", "reduce_scatter_single") if hasattr(dist, name)]
    second = ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", *new)
    for name in ("all_reduce", "broadcast", *second):
        setattr(dist, name, counting(name, int(name in second)))

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


def trained_without_its_checkpoint(config: TrainConfig) -> None:
    """As if rank 1's machine had an output folder of its own."""
    from qlora.training import run

    if os.environ["RANK"] == "1":
        run.check_settings = lambda *_: None  # type: ignore[assignment]
    trained(config)


def test_ranks_that_would_go_on_from_other_checkpoints_are_refused(checkpoints, few, tmp_path):
    config = config_of(checkpoints("llama"), few, tmp_path / "run", max_steps=2, save_steps=2)
    require_done(in_ranks(2, trained, config))
    again = replace(config, resume=True, max_steps=4)
    first, second = in_ranks(2, trained_without_its_checkpoint, again)
    last = tmp_path / "run" / "checkpoint-2"
    assert f"rank 1 has other checkpoints, last None, not {last} as rank 0" in first.error
    assert second.code == 2


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
