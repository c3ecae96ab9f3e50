"""What a step of a large model would hold on a GPU, counted on shapes without memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
CONTEXT = GIB // 2  # about what the CUDA context takes of a card


def counted(*flags: str) -> dict[str, int]:
    command = [sys.executable, str(ROOT / "benchmarks" / "step_memory.py"), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_llama_2_7b_takes_less_than_5_gib():
    found = counted("llama2-7b", "--seq", "2048")
    assert found["loaded"] == pytest.approx(3.675 * GIB, rel=0.001)
    assert found["peak"] == pytest.approx(4.625 * GIB, rel=0.01)


@pytest.mark.parametrize(
    "card, tokens, peak", [(8, 8192, 6.94), (12, 24576, 8.28), (24, 86016, 13.29)]
)
def test_rows_of_llama_3_1_8b_that_a_card_has_room_for(card, tokens, peak):
    found = counted("llama3.1-8b", "--seq", str(tokens), "--r", "32", "--offload")
    assert found["peak"] == pytest.approx(peak * GIB, rel=0.01)
    assert found["peak"] < card * GIB - CONTEXT
