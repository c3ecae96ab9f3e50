"""Launches and waits of a training step are no more than docs/measured.md has."""

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import with_folders

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measured.md"
DECODERS = {"bitsandbytes": "ours", "Triton": "ours-triton"}


def test_launches_and_waits_do_not_grow():
    script = ROOT / "benchmarks" / "launches.py"
    ran = subprocess.run(
        [sys.executable, str(script), "--json", "--rounds", "2"],
        env=with_folders(ROOT), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    counted = json.loads(ran.stdout.splitlines()[-1])
    page = PAGE.read_text("utf-8")
    limits = re.findall(r"\| launches, (forward|backward).*by (\w+) \| (\d+) \|", page)
    assert len(limits) == 4
    for way, decoder, most in limits:
        ours = counted["launches"][DECODERS[decoder]]
        assert int(most) / 3 < ours[way] <= int(most), ours["made_by"][way]
    pefts = counted["launches"]["peft"]
    # seven products with a frozen weight, as many with A and with B
    assert pefts["made_by"]["forward"]["bitsandbytes::gemm_4bit"] == 7 * 4
    assert pefts["made_by"]["forward"]["aten::mm"] == 14
    assert all(us > 0 for side in counted["host"].values() for us in side.values())
    waits = counted["waits"]
    assert sum(waits.values()) > 0  # transformers has some of its own
    (most,) = re.findall(r"(\d+) of them in this library", page)
    assert sum(n for place, n in waits.items() if "qlora/" in place) <= int(most), waits
