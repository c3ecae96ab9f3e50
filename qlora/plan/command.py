"""`python train.py --plan …` and `qlora plan …`: the plan as a table, as JSON and as a picture.

Exit code 0: the run fits, or no card is known; 1: it does not fit; 2: bad input.
"""

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch

# bitsandbytes compiles its operators for a CPU at import, which takes a second: none runs here
with patch.object(torch, "compile", lambda function=None, **_: function or (lambda own: own)):
    import bitsandbytes  # noqa: F401

from qlora.config import TrainConfig
from qlora.plan.estimate import Plan, Planner

PICTURE = "plan.png"
GIB = 1 << 30


def run(config: TrainConfig) -> None:
    """The command: `show_plan`, and the exit code 0 or 1, without a second of tearing down."""
    gc.freeze()  # the imported packages, in which nothing is to be collected
    made = show_plan(config)
    sys.stdout.flush()
    os._exit(int(made.fits is False))


def show_plan(config: TrainConfig) -> Plan:
    """Print the plan of `config`."""
    made = Planner(config).plan()
    print(json.dumps(made.record()) if config.json else table(made))
    return made


def table(plan: Plan) -> str:
    """The plan for a terminal."""
    tokens = f"{plan.rows} × {plan.length:,} tokens"
    lines = [f"{plan.config.model}: a micro-batch of {tokens}", "", *_rows("GPU memory", plan.parts)]
    lines += [_row("peak", plan.peak_bytes), f"The peak is in the {plan.peak_at}.", ""]
    if plan.host:
        lines += [*_rows("host memory, besides the process", plan.host), ""]
    lines += [*_rows("disk", plan.disk), "", verdict(plan)]
    return "\n".join(lines)


def _rows(title: str, parts: Mapping[str, int]) -> list[str]:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [title, *[_row(f"  {name}", size) for name, size in ordered]]


def _row(name: str, size: int) -> str:
    return f"{name:<40}{show(size):>12}"


def show(size: int) -> str:
    """`1.23 GiB`, or `45 MiB` below a GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def verdict(plan: Plan) -> str:
    """Whether it fits, in one line."""
    if plan.budget_bytes is None:
        return "No GPU is here: --gpu-memory 8GiB, say, tells whether it fits."
    left = plan.budget_bytes - plan.peak_bytes
    if left >= 0:
        return f"It fits into {show(plan.budget_bytes)}: {show(left)} are left."
    return f"It does not fit into {show(plan.budget_bytes)}: {show(-left)} are missing."
