"""Steps without a finite loss or gradient: said with their rows, skipped, few, and never saved."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROWS, adapted_model, quick_config, require_same_adapter, write_rows
from safetensors.torch import load_file

from qlora import DataConfig, UserError
from qlora.files import read_metrics
from qlora.training.callbacks import FiniteSteps
from qlora.training.run import train
from qlora.training.trainer import AdapterTrainer


@pytest.fixture
def break_loss(monkeypatch):
    """`break_loss(text)`: the loss of every batch with that text is NaN, or with `gradient=True`
    only its gradient is."""

    def break_it(
        wanted: str, *, gradient: bool = False, training: bool = True, patch: Any = monkeypatch
    ) -> None:
        compute_loss = AdapterTrainer.compute_loss

        def broken(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            text = self.processing_class.decode(inputs["input_ids"].flatten())
            result = compute_loss(self, model, inputs, *rest, **options)
            if wanted not in text or model.training != training:
                return result
            if gradient:  # the derivative of sqrt at 0 is infinite, and 0 * inf is NaN
                return result + (result * 0).sqrt() * 0
            return result * math.nan if training else (result[0] * math.nan, result[1])

        patch.setattr(AdapterTrainer, "compute_loss", broken)

    return break_it


def strict_rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, read by a parser that knows no NaN, as jq and JavaScript do not."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_broken_step_is_said_with_its_rows_and_skipped(
    gradient, packing, checkpoints, tmp_path, data, break_loss, capsys
):
    break_loss("7 times 7", gradient=gradient)
    settings: Any = {"max_steps": -1, "per_device_train_batch_size": 1 if packing else 2}
    settings |= {"gradient_accumulation_steps": 2, "save_steps": 100}
    both = DataConfig(str(data), max_length=128, packing=packing)
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", data=both, **settings)
    folder = train(config)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "not finite" in line]
    what = "gradient" if gradient else "loss"
    assert f"the {what} is not finite" in line and "7 times 7" in line
    assert gradient or packing or "row 8 (" in line
    rows = strict_rows(folder)
    (bad,) = [row for row in rows if None in row.values()]
    assert line.startswith(f"step {bad['step']}:")
    assert bad["loss"] is None or (gradient and bad["grad_norm"] is None)
    assert ("loss nan" in said) == (not gradient)
    assert [row["step"] for row in read_metrics(folder) if math.isnan(row["grad_norm"])]
    saved = load_file(folder / "adapter_model.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in saved)
    assert any(tensor.any() for tensor in saved)


def test_a_run_stops_after_a_few_broken_steps(
    checkpoints, tmp_path, data, break_loss, capsys, monkeypatch
):
    """The last good checkpoint is named and resumed from, none is saved after it, and the adapter
    that a shorter run had written stays."""
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", max_steps=3, save_steps=1)
    folder = train(config)
    before = (folder / "adapter_model.safetensors").read_bytes()
    config = replace(config, max_steps=20, resume=True)
    with monkeypatch.context() as patch:
        break_loss(" times ", patch=patch)
        words = r"5 steps were skipped.*good checkpoint is \S+-2, checkpoint-3 is now not-finite-"
        with pytest.raises(UserError, match=words):
            train(config)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (folder / "not-finite-checkpoint-3").is_dir()
    assert [row["loss"] for row in strict_rows(folder)][3:] == [None] * 4
    assert capsys.readouterr().out.count("the loss is not finite") == 5
    train(replace(config, max_steps=3))
    assert (folder / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("steps", "bad", "stops_after"),
    [
        (200, range(0, 200, 10), None),  # one row of a tenth of an epoch, in each epoch
        (60, range(0, 60, 12), None),
        (20, range(0, 20, 4), 16),  # more than a tenth
        (200, range(0, 200, 4), 80),
        (1000, range(7, 1000), 11),
        (8, range(0, 8, 2), None),  # fewer than five
    ],
)
def test_a_run_stops_after_five_broken_steps_in_a_row_or_a_tenth_of_its_steps(
    steps, bad, stops_after, checkpoints, tmp_path
):
    model = adapted_model(checkpoints("llama"))
    trainer = Mock(
        model=model,
        on_signal=Mock(noted=0),
        accelerator=SimpleNamespace(scaler=None),
        train_dataset=[],
    )
    trainer.args.output_dir = tmp_path
    finite = FiniteSteps(trainer)
    begin = 100  # of a resumed run: its own steps count
    state = SimpleNamespace(global_step=begin, max_steps=begin + steps, num_input_tokens_seen=0)
    finite.on_train_begin(None, state, None)
    ended = None
    parameter = next(p for p in model.parameters() if p.requires_grad)
    for step in range(steps):
        state.global_step = begin + step
        parameter.grad = torch.full_like(parameter, math.nan if step in bad else 1.0)
        try:
            finite.on_pre_optimizer_step(None, state, None)
        except UserError as error:
            ended = step
            assert f"({finite.skipped} steps were skipped)" in str(error)
            break
    assert ended == stops_after


@pytest.mark.parametrize("rate", [1e30, 1e39])
def test_a_rate_that_breaks_the_adapter_ends_with_an_error(rate, checkpoints, tmp_path, data):
    """Also if the run is over before a few steps were skipped, or the last update overflowed."""
    settings: Any = {"learning_rate": rate, "max_steps": 3 if rate == 1e30 else 1, "save_steps": 9}
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", **settings)
    with pytest.raises(UserError, match=r"not finite.*no good checkpoint"):
        train(config)
    assert not list((tmp_path / "run").rglob("adapter_model.safetensors"))


def test_a_broken_row_in_the_last_step_costs_that_step_only(checkpoints, tmp_path, break_loss):
    """Other rows show that the adapter gives a finite loss; it is written."""
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[7], *ROWS[:3]])
    break_loss("7 times 7")
    settings: Any = {"per_device_train_batch_size": 1, "max_steps": 5}
    settings["trainer"] = {"train_sampling_strategy": "sequential"}
    base, folder = checkpoints("llama"), tmp_path / "run"
    train(quick_config(base, rows, folder, **settings))
    assert (folder / "adapter_model.safetensors").exists()


def test_an_evaluation_after_a_broken_step_is_not_the_best(checkpoints, tmp_path, data, break_loss):
    """Its adapter is not saved: the best is one that is."""
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[0], ROWS[7], *ROWS[1:3]])
    break_loss("7 times 7")
    settings: Any = {"per_device_train_batch_size": 1, "eval_steps": 2, "save_steps": 2}
    settings["data"] = DataConfig(str(rows), str(data), max_length=128)
    settings["trainer"] = {"load_best_model_at_end": True, "greater_is_better": True}
    settings["trainer"]["train_sampling_strategy"] = "sequential"
    config = quick_config(checkpoints("llama"), rows, tmp_path / "run", **settings)
    for steps in (4, 6):
        folder = train(replace(config, max_steps=steps, resume=steps > 4))
        assert [path.name for path in folder.glob("checkpoint-[24]")] == ["checkpoint-4"]
        require_same_adapter(folder, folder / "checkpoint-4")


def test_broken_evaluation_rows_are_named(checkpoints, tmp_path, data, break_loss, capsys):
    """Some of them: the run goes on. All of them: the adapter is the cause, nothing is saved."""
    break_loss("7 times 7", training=False)
    few = write_rows(tmp_path / "few.jsonl", ROWS[7:8])
    for eval_data, row in ((data, "row 8 ("), (few, "row 1 (")):
        both = DataConfig(str(data), str(eval_data), max_length=128)
        config = quick_config(checkpoints("llama"), data, tmp_path / row, data=both, max_steps=1)
        config = replace(config, eval_steps=1)
        if eval_data == data:
            assert strict_rows(train(config))[-1]["eval_loss"] is None
            assert "evaluation loss nan" in (tmp_path / row / "README.md").read_text()
        else:
            with pytest.raises(UserError, match="not finite"):
                train(config)
            assert not (tmp_path / row / "checkpoint-1").exists()
        said = capsys.readouterr().out
        assert "step 1: the evaluation loss is not finite: " in said and row in said
        assert "evaluation loss nan" in said


@pytest.mark.parametrize(("scale", "skipped"), [(65536.0, 0), (0.5, 1)])
def test_overflows_of_a_scaled_fp16_loss_are_the_scalers(scale, skipped, checkpoints, capsys):
    """It skips such a step itself and lowers the scale, as at the start of every fp16 run; below 1
    the scale is not the reason."""
    model = adapted_model(checkpoints("llama"))
    scaler = SimpleNamespace(get_scale=lambda: scale)
    trainer = Mock(
        model=model,
        on_signal=Mock(noted=0),
        accelerator=SimpleNamespace(scaler=scaler),
        train_dataset=[],
    )
    steps = FiniteSteps(trainer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf) if parameter.requires_grad else None
    steps.on_pre_optimizer_step(None, SimpleNamespace(global_step=3, num_input_tokens_seen=0), None)
    assert steps.skipped == skipped
    assert ("step 4: the gradient is not finite" in capsys.readouterr().out) == bool(skipped)
    assert any(p.grad is not None for p in model.parameters())  # the scaler counts on them


def test_max_bad_steps_is_the_users(checkpoints, tmp_path, data, break_loss):
    break_loss(" times ")
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", max_bad_steps=2)
    with pytest.raises(UserError, match=r"\(2 steps were skipped\)"):
        train(config)


def test_a_spike_of_the_loss_is_logged_with_its_rows(checkpoints, capsys):
    """Not the first losses, nor those that differ as much as the ones before."""
    model = adapted_model(checkpoints("llama"))
    inputs = {"input_ids": torch.arange(4, 8)[None], "attention_mask": torch.ones(1, 4)}
    trainer = Mock(
        model=model,
        on_signal=Mock(noted=0),
        accelerator=SimpleNamespace(scaler=None),
        processing_class=None,
    )
    trainer.train_dataset = [{"input_ids": [9]}, {"input_ids": [4, 5, 6, 7]}]
    finite, said = FiniteSteps(trainer), dict[int, str]()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for step in range(80):
        loss = {2: 50.0, 60: 9.0, 70: 3.0}.get(step, 2.0 + 0.1 * (step % 3))
        finite.batches = [(inputs, torch.tensor(loss / 2))] * 2
        state = SimpleNamespace(global_step=step, num_input_tokens_seen=0)
        finite.on_pre_optimizer_step(None, state, None)
        said |= {step: line} if (line := capsys.readouterr().out) else {}
    assert list(said) == [60]
    assert "step 61: the loss is 9.0000, it was 2.1" in said[60]
    assert "in the last 50 steps: row 2 ('(4, 5, 6, 7)')" in said[60]


def test_a_run_stops_early_with_the_best_adapter_and_resumes_to_the_same(
    checkpoints, tmp_path, data, capsys, monkeypatch
):
    """The evaluations get worse from step 2 on; the count goes on in a resumed run."""
    measured = iter([3.0, 2.0, 2.5, 2.6, 2.5, 2.6, 2.7])
    loop = AdapterTrainer.evaluation_loop

    def worse(self: Any, *given: Any, **named: Any) -> Any:
        output = loop(self, *given, **named)
        output.metrics["eval_loss"] = next(measured)
        return output

    monkeypatch.setattr(AdapterTrainer, "evaluation_loop", worse)
    settings: Any = {"early_stopping_patience": 2, "eval_steps": 1, "save_steps": 1}
    settings |= {"max_steps": 9, "data": DataConfig(str(data), str(data), max_length=128)}
    config = quick_config(checkpoints("llama"), data, tmp_path / "run", **settings)
    folder = train(config)
    said = capsys.readouterr().out
    assert "step 4: no new best in 2 evaluations, training stops; the best was at step 2" in said
    assert "The best checkpoint is that of step 2" in said
    best = (folder / "adapter_model.safetensors").read_bytes()
    assert best == (folder / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    train(replace(config, resume=True))
    assert "All 4 steps until it stopped are done; a larger --early" in capsys.readouterr().out
    train(replace(config, resume=True, early_stopping_patience=3))
    assert "step 5: no new best in 3 evaluations" in capsys.readouterr().out
    config = replace(config, output_dir=str(tmp_path / "other"), save_steps=3)
    with pytest.raises(UserError, match="--early-stopping-patience needs every checkpoint eval"):
        train(replace(config, eval_steps=2))
