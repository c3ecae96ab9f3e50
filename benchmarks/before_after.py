"""A training step of this checkout against the same step of another one, in one run.

    git worktree add ../before COMMIT
    python benchmarks/before_after.py ../before --dtype fp32 --rounds 9

Each checkout runs its own benchmarks/step_runner.py in its own process, on the same model, batch
and settings. The two alternate, the other one first in every second round, so that a change of
the machine's speed affects both. Printed and recorded: the ratio of each pair of steps (median, min
and max; above 1 is faster than before), and the memory that a step adds to the loaded model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from results import record, small_model
from step_sides import Setup

from qlora.base.checkpoint import resolve

ROOT = Path(__file__).parents[1]
SERVE = """
import json, sys
sys.path[:0] = ["benchmarks", "."]
from step_runner import Runner
from step_sides import Setup
runner = Runner("ours", Setup(**json.loads(sys.argv[1])))
for line in sys.stdin:
    print("ANSWER", json.dumps(getattr(runner, line.strip())()), flush=True)
"""


class Side:
    """The step of one checkout, in its own process."""

    def __init__(self, checkout: Path, setup: Setup) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "5"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, json.dumps(asdict(setup))],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, method: str) -> Any:
        """The result of one of the Runner's methods."""
        assert self.process.stdin and self.process.stdout
        print(method, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"the process ended with exit code {self.process.wait()}")


def measure(before: Path, setup: Setup, rounds: int) -> dict[str, Any]:
    """Seconds and memory of both sides, and the ratios of each pair of steps."""
    sides = {"before": Side(before, setup), "after": Side(ROOT, setup)}
    try:
        memory = {name: side.call("warm_up") for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, float] = {}
        for turn in range(rounds):
            for name in ("before", "after")[:: 1 if turn % 2 else -1]:
                taken, losses[name] = sides[name].call("step")
                seconds[name].append(taken)
    finally:
        for side in sides.values():
            side.process.kill()
    pairs = [b / a for b, a in zip(seconds["before"], seconds["after"], strict=True)]
    speed = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
    return {"speed": speed, "seconds": seconds, "memory": memory, "loss": losses}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setup = Setup(
        base=str(resolve(str(small_model()))),
        seq=256,
        batch=4,
        r=16,
        dtype=flags.dtype,
        checkpointing=flags.checkpointing,
        device=device,
        threads=torch.get_num_threads(),
        allocator_bytes=None,
    )
    row = measure(flags.before, setup, flags.rounds)
    speed = row["speed"]
    print(f"speed of before: {speed['median']:.3f} ({speed['min']:.3f} to {speed['max']:.3f})")
    for name, memory in row["memory"].items():
        print(f"{name:<7}{memory['above_loaded_bytes'] / 2**20:8.1f} MiB  loss {row['loss'][name]}")
    shared = {k: v for k, v in asdict(setup).items() if k not in ("base", "allocator_bytes")}
    record("before_after", {**shared, "rounds": flags.rounds, **row})


if __name__ == "__main__":
    main()
