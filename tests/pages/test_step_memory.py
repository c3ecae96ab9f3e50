"""benchmarks/step_memory.py: the memory that docs/measured.md says a step takes on a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
CONTEXT = GIB // 2  # about the memory of the CUDA context
LLAMA_8B = "llama3.1-8b --r 32 --offload"


@pytest.mark.parametrize(
    "card, flags, tokens",
    [
        (6, "llama2-7b", 2048),
        (8, LLAMA_8B, 8192),
        pytest.param(12, LLAMA_8B, 24576, marks=pytest.mark.full),
        pytest.param(24, LLAMA_8B, 86016, marks=pytest.mark.full),
    ],
)
def test_page_has_the_counted_memory_and_it_fits(card, flags, tokens):
    command = [sys.executable, str(ROOT / "benchmarks" / "step_memory.py"), *flags.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, "--seq", str(tokens)], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    counted = json.loads(ran.stdout.splitlines()[-1])
    page = (ROOT / "docs/measured.md").read_text("utf-8")
    (loaded, peak), *_ = re.findall(rf"{tokens:,} tokens.* \| ([\d.]+) GiB \| ([\d.]+) GiB", page)
    assert counted["loaded"] == pytest.approx(float(loaded) * GIB, rel=0.01)
    assert counted["peak"] == pytest.approx(float(peak) * GIB, rel=0.01)
    assert counted["peak"] < card * GIB - CONTEXT
