"""A run on a CPU leaves the cores that other processes use."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora.training import callbacks
from qlora.training.callbacks import FreeCores

ON_CPU = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def load(monkeypatch):
    """Sets the percents that psutil reports: of each of four cores, and of this process."""
    monkeypatch.setattr(callbacks, "SECONDS", 0)
    monkeypatch.setattr(callbacks.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)

    def set_load(cores, own):
        monkeypatch.setattr(psutil, "cpu_percent", lambda percpu: cores)
        process = SimpleNamespace(cpu_percent=lambda: own)
        monkeypatch.setattr(psutil, "Process", lambda: process)
        return used

    return set_load


@pytest.mark.parametrize(
    ("cores", "own", "wanted"),
    [
        ([100, 100, 100, 100], 400, 4),  # alone
        ([100, 100, 100, 100, 100, 100], 380, 4),  # others on cores that are not ours
        ([100, 100, 100, 100], 310, 3),
        ([100, 100, 100, 100], 90, 1),
        ([100, 100, 100, 100], 0, 1),
        ([90, 90, 90, 90], 400, 4),  # two clocks that differ
    ],
)
def test_threads_are_the_free_cores(load, capsys, cores, own, wanted):
    used = load(cores, own)
    callback = FreeCores()
    callback.on_train_begin(ON_CPU, None, None)
    for _ in range(2):
        callback.on_step_end(ON_CPU, None, None)
    assert used == [wanted, wanted]
    said = capsys.readouterr().err + capsys.readouterr().out
    assert said.count("OMP_NUM_THREADS") <= 1


def test_more_threads_when_cores_are_free_again(load):
    load([100, 100, 100, 100], 400)
    callback = FreeCores()
    for own in (200, 400):
        used = load([100, 100, 100, 100], own)
        callback.process = psutil.Process()
        callback.on_step_end(ON_CPU, None, None)
    assert used == [2, 4]


def test_threads_that_are_set_or_of_a_gpu_stay(load, monkeypatch):
    used = load([100, 100, 100, 100], 0)
    FreeCores().on_step_end(SimpleNamespace(device=torch.device("cuda")), None, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    FreeCores().on_step_end(ON_CPU, None, None)
    assert used == []
