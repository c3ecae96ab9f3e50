"""A base in shards on several ranks against one process that has it whole."""

from dataclasses import replace
from typing import Any

import pytest
from conftest import axis
from several import in_ranks, require_done, trained
from test_ranks import config_of, require_close

from qlora.config import DataConfig


@pytest.mark.parametrize("family", axis("llama", "gpt2", "gemma", "qwen3"))
def test_two_ranks_with_a_shard_each_train_as_one_process(family, checkpoints, few, tmp_path):
    data = DataConfig(str(few), str(few), max_length=128)
    settings: Any = {"eval_steps": 10, "sharding": "fsdp"}
    config = config_of(checkpoints(family), few, tmp_path / "two", data=data, **settings)
    require_done(in_ranks(2, trained, config))
    alone: Any = {"gradient_accumulation_steps": 4, "sharding": "ddp"}
    one = replace(config, output_dir=str(tmp_path / "one"), **alone)
    require_done(in_ranks(1, trained, one))
    require_close(tmp_path / "two", tmp_path / "one")
