"""Several ranks against one process: the same rows, losses and adapters; what travels; how a run
ends where one rank fails, is stopped or has other settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    losses,
    quick_config,
    read_rows,
    refuses,
    require_same_adapter,
    with_folders,
    write_rows,
)
from safetensors.torch import load_file
from several import Ended, in_ranks
from transformers import TrainerCallback

from qlora.config import DataConfig, LoraConfig, TrainConfig

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


@pytest.mark.parametrize(
    ("family", "how"),
    [("llama", "grouped"), ("gpt2", "random"), ("gemma", "streaming"), ("qwen3", "packing")],
)
def test_two_ranks_train_as_one_process(family, how, checkpoints, few, tmp_path):
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
    require_done(in_ranks(2, trained_and_seen, config, seen[0]))
    one = replace(config, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=4)
    require_done(in_ranks(1, trained_and_seen, one, seen[1]))
    assert rows_of(seen[0]) == rows_of(seen[1]) and len(list(seen[0].iterdir())) == 2
    require_close(tmp_path / "two", tmp_path / "one")


def trained_and_seen(config: TrainConfig, seen: Path) -> None:
    trained(config, seen=seen)
