"""What a run says while it goes: on a terminal, and elsewhere."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qlora.training.outputs import PlainProgress, describe_log

LOGS = {"loss": 0.51234, "tokens_per_second": 1234.5, "peak_bytes": 3 * 2**29}
LINE = "loss 0.5123  1,234 tokens/s  peak 1.50 GiB"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def went(monkeypatch: Any, stream: io.StringIO, *, begin: int = 0) -> str:
    """What is written to standard error by a run of 10 steps that is logged at its 6th."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    progress, state = PlainProgress(), SimpleNamespace(max_steps=10, is_world_process_zero=True)
    state.global_step = begin
    progress.on_train_begin(None, state, None)
    for state.global_step in range(begin + 1, 11):
        progress.on_step_end(None, state, None)
        if state.global_step == 6:
            progress.on_log(None, state, None, LOGS)
            progress.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
            progress.on_evaluate(None, state, None)
            progress.on_log(None, state, None, {"eval_loss": 0.25})
    progress.on_train_end(None, state, None)
    progress.on_log(None, state, None, LOGS)  # after the end there is no bar
    return stream.getvalue()


def test_a_terminal_has_a_bar_with_loss_speed_and_the_time_left(monkeypatch, capsys):
    shown = went(monkeypatch, Terminal())
    assert f"left, {LINE}" in shown and "10/10 steps" in shown and "100%" in shown
    assert "0/2 [" in shown  # the bar of evaluation
    said = capsys.readouterr().out
    assert f"step  6/10  {LINE}\n" in said and "step  6/10  evaluation loss 0.2500\n" in said


def test_elsewhere_there_are_lines_alone(monkeypatch, capsys):
    assert went(monkeypatch, io.StringIO()) == ""
    assert capsys.readouterr().out == (
        f"step  6/10  {LINE}\nstep  6/10  evaluation loss 0.2500\nstep 10/10  {LINE}\n"
    )


def test_the_bar_of_a_run_that_goes_on_begins_there(monkeypatch):
    """Else the steps of before would count as done in no time, and the time left be wrong."""
    shown = went(monkeypatch, Terminal(), begin=5)
    assert "0/10 steps" not in shown.replace("10/10", "") and "5/10 steps" in shown


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (LOGS, LINE),
        ({"eval_loss": 0.5, "eval_accuracy": 0.75}, "evaluation loss 0.5000  accuracy 0.7500"),
        ({"train_runtime": 3.0}, None),
    ],
)
def test_a_line(logs, line):
    assert describe_log(logs) == line
