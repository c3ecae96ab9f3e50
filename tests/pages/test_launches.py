"""Launches and waits of a training step, counted by benchmarks/launches.py, do not grow."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import with_folders

ROOT = Path(__file__).parents[2]
# launches of a layer of Llama-2-7B, forward and backward, by the decoder
LIMITS = {"ours": (48, 108), "ours-triton": (34, 86)}
WAITS = 6  # of our own code in an optimizer step of 2 micro-batches


def test_launches_and_waits_do_not_grow():
    script = ROOT / "benchmarks" / "launches.py"
    ran = subprocess.run(
        [sys.executable, str(script), "--json", "--rounds", "2"],
        env=with_folders(ROOT), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    counted = json.loads(ran.stdout.splitlines()[-1])
    for side, (forward, backward) in LIMITS.items():
        ours = counted["launches"][side]
        assert 20 < ours["forward"] <= forward, ours["made_by"]["forward"]
        assert 60 < ours["backward"] <= backward, ours["made_by"]["backward"]
    pefts = counted["launches"]["peft"]
    # seven products with a frozen weight, as many with A and with B
    assert pefts["made_by"]["forward"]["bitsandbytes::gemm_4bit"] == 7 * 4
    assert pefts["made_by"]["forward"]["aten::mm"] == 14
    assert all(us > 0 for side in counted["host"].values() for us in side.values())
    waits = counted["waits"]
    assert sum(waits.values()) > 0  # transformers has some of its own
    assert sum(n for place, n in waits.items() if "qlora/" in place) <= WAITS, waits
