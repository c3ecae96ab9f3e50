"""The plan that `python train.py` makes before a run."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import conftest
import psutil
import pytest

from qlora.config import LoraConfig
from qlora.errors import UserError
from qlora.files import read_metrics
from qlora.plan import estimate
from qlora.plan import run as planned


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU is there, for the question whether a run is planned."""
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(planned, "torch", SimpleNamespace(**vars(planned.torch) | {"cuda": cuda}))


def test_a_run_logs_its_planned_peak_and_is_the_same(quick_run, tmp_path, capsys):
    settings = {"output_dir": str(tmp_path / "run"), "samples": 0, "report_to": ()}
    folder = planned.run(replace(quick_run.config, **settings))
    conftest.require_same_adapter(folder, quick_run.folder)
    peak = estimate.plan(quick_run.config).peak_bytes
    rows = read_metrics(folder)
    assert {row["planned_bytes"] for row in rows} == {peak} and len(rows) == 6
    assert "planned_bytes" not in read_metrics(quick_run.folder)[0]
    assert capsys.readouterr().out.startswith(f"plan: peak memory {peak / 2**20:.0f} MiB\n")


def test_a_plan_is_one_line_and_never_an_error(quick_run, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "budget", lambda config: 100 << 20)
    assert planned.planned_bytes(quick_run.config) > 100 << 20
    line = " MiB of 100 MiB, it may not fit: --plan --fit tells what would\n"
    assert capsys.readouterr().out.endswith(line)
    config = replace(quick_run.config, model="/nowhere/at all")
    assert planned.planned_bytes(config) is None
    assert not capsys.readouterr().out  # the run itself says what is wrong
    fault = Mock(side_effect=UserError("model cannot be planned: its code computes with values"))
    monkeypatch.setattr(estimate, "Planner", fault)
    assert planned.planned_bytes(config) is None
    assert capsys.readouterr().out.startswith("plan: none for this run: model cannot be planned")


def test_on_a_cpu_the_planned_peak_is_of_the_process(quick_run, monkeypatch, capsys):
    monkeypatch.setattr(planned.torch.cuda, "is_available", lambda: False)
    above = estimate.Planner(quick_run.config, device="cpu").plan().peak_bytes
    before = psutil.Process().memory_info().rss
    assert before + above <= planned.planned_bytes(quick_run.config) < before + above + (64 << 20)
    assert capsys.readouterr().out.endswith(", it fits\n")


def test_a_run_from_an_adapter_is_planned_with_its_settings(quick_run):
    config = replace(quick_run.config, adapter=str(quick_run.folder), lora=LoraConfig())
    own = estimate.Planner(config).plan()
    assert own.parts["adapters"] == estimate.plan(quick_run.config).parts["adapters"]
    assert quick_run.config.lora.r != LoraConfig().r
