"""Runs with --streaming; that they are resumed at the same row is a case of test_resume.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import losses, quick_config, read_rows, write_rows

from qlora.config import DataConfig
from qlora.data import streaming
from qlora.errors import UserError
from qlora.training.checks import check_arguments
from qlora.training.run import train


def test_a_streamed_run_says_so_and_refuses_other_rows(checkpoints, data, tmp_path, monkeypatch):
    """A fault in its data, found on the way, is one line; other rows behind the first ones, too."""
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 8)
    rows = read_rows(data)[:40]
    own = write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "a", "completion": {}}])
    streamed: Any = {"streaming": True, "shuffle_buffer": 1, "dataset_num_proc": 1}
    settings: Any = {"data": DataConfig(str(own), max_length=128, **streamed), "max_steps": 12}
    settings |= {"save_steps": 2, "save_total_limit": 20}
    config = quick_config(checkpoints("llama"), data, tmp_path / "out", **settings)
    folder, again = Path(config.output_dir), replace(config, resume=True)
    with pytest.raises(
        UserError, match=r"step 10: .*rows\.jsonl, row 41: .*; .*checkpoint-8 is saved, the same"
    ):
        train(config)
    write_rows(own, [*rows[:20], *rows[21:]])
    with pytest.raises(
        UserError,
        match=r"--resume: .* has other rows than those that the run has read: give the same",
    ):
        train(again)
    write_rows(own, rows)
    train(again)
    assert "streamed, " in (folder / "README.md").read_text()
    recorded = yaml.safe_load((folder / "run.yaml").read_text())
    assert (
        recorded["config"]["streaming"] and "first rows" in recorded["data"]["training"]["streamed"]
    )
    assert losses(folder)


STREAMED: Any = [
    ({"max_steps": -1}, {}, "streaming needs max_steps, as the number of rows is not known"),
    ({"task": "seq-cls"}, {}, "streaming needs task causal-lm or seq2seq, got seq-cls"),
    ({}, {"eval_share": 0.1}, "eval_share needs all rows before training, unlike streaming"),
    ({}, {"streaming": False, "shuffle_buffer": 5}, "shuffle_buffer needs streaming"),
    (
        {"trainer": {"dataloader_num_workers": 2}},
        {},
        "--trainer.dataloader_num_workers is for rows",
    ),
]


@pytest.mark.parametrize(("settings", "of_data", "words"), STREAMED)
def test_what_streaming_cannot_do_is_refused(settings, of_data, words, data, tmp_path):
    with pytest.raises(UserError, match=words):
        rows = DataConfig(str(data), **{"streaming": True} | of_data)
        settings = {"max_steps": 2, "data": rows} | settings
        check_arguments(quick_config("base", data, tmp_path / "out", **settings))
