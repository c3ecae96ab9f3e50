"""Runs that are killed and resumed, and long ones: programs of their own, as they fork and measure
a process. Two kills run by default, the rest with `make reliability`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from reliability.kills import VARIANTS

HERE = Path(__file__).parent


def run(program: str, *words: str) -> str:
    paths = os.pathsep.join((str(HERE.parent.parent), str(HERE.parent)))
    ended = subprocess.run(
        [sys.executable, str(HERE / program), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert not ended.returncode, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def test_a_killed_run_is_resumed_to_the_same_bytes():
    assert "2 of 2" in run("kills.py", "--kills", "2", "--phase", "steps", "saving")


@pytest.mark.reliability
@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_killed_at_random_moments_are_resumed_to_the_same_bytes(variant):
    kills = "50" if variant == "8-bit" else "10"
    assert f"{kills} of {kills}" in run("kills.py", "--kills", kills, "--variant", variant)


@pytest.mark.reliability
def test_memory_does_not_grow_over_2000_steps():
    run("memory.py")
