"""Memory of a training run on a CPU: the plan against the measured peak.

    python benchmarks/plan_cpu.py [--rows 1 4] [--tokens 256 1024] [--dtypes fp32 bf16]
        [--checkpointing on off] [--model FOLDER]

Each run trains two steps in a process of its own. Its peak is that of metrics.jsonl, of resident
memory, minus the resident memory with all packages imported, before anything is loaded. The plan
knows config.json and the sizes of the files.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import ROOT, record, small_model

from qlora.config import DataConfig, QuantConfig, TrainConfig
from qlora.plan.estimate import Planner

STEPS = 2
WORDS = "the a of and to in is it you that he was for on are with as his they be at one have this"
RUN = """
import json, sys
import psutil
from qlora.config import DataConfig, QuantConfig, TrainConfig
from qlora.training import train
from qlora.training.outputs import peak_resident_bytes
settings = json.loads(sys.argv[1])
data, quant = DataConfig(**settings.pop("data")), QuantConfig(**settings.pop("quant"))
start = psutil.Process().memory_info().rss
folder = train(TrainConfig(**settings, data=data, quant=quant))
rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
print(max(row["peak_bytes"] for row in rows) - start)
"""


def settings_of(model: Path, folder: Path, rows: int, tokens: int, **how: Any) -> dict[str, Any]:
    """The settings of a run on random words, whose rows are all longer than `tokens`."""
    draw, data = random.Random(0), folder / "rows.jsonl"
    texts = (" ".join(draw.choices(WORDS.split(), k=2 * tokens)) for _ in range(STEPS * rows))
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "model": str(model), "output_dir": str(folder / "out"),
        "data": {"data": str(data), "max_length": tokens, "long_rows": "truncate"},
        "quant": {"compute_dtype": how["dtype"]}, "gradient_checkpointing": how["checkpointing"],
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "max_steps": STEPS, "samples": 0, "learning_rate": 1e-4,
    }  # fmt: skip


def measure(settings: dict[str, Any]) -> int:
    """The peak of resident memory of a run, above its start, in bytes."""
    command = [sys.executable, "-c", RUN, json.dumps(settings)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return int(ran.stdout.split()[-1])


def planned(settings: dict[str, Any]) -> Any:
    """The plan of the same run."""
    data, quant = DataConfig(**settings["data"]), QuantConfig(**settings["quant"])
    config = TrainConfig(**settings | {"data": data, "quant": quant})
    return Planner(config, device="cpu").plan()


def cases(arguments: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the settings asked for."""
    names = ("rows", "tokens", "dtype", "checkpointing")
    on = [word == "on" for word in arguments.checkpointing]
    given = (arguments.rows, arguments.tokens, arguments.dtypes, on)
    yield from (dict(zip(names, values, strict=True)) for values in itertools.product(*given))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--checkpointing", nargs="+", default=["on", "off"])
    arguments = parser.parse_args()
    model = arguments.model or small_model()
    print("rows tokens dtype checkpointing   planned  measured   error  peak in")
    for case in cases(arguments):
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(model, Path(folder), **case)
            plan, peak = planned(settings), measure(settings)
        row = {**case, "planned_bytes": plan.peak_bytes, "peak_bytes": peak}
        row |= {"error": plan.peak_bytes / peak - 1, "peak_at": plan.peak_at, "parts": plan.parts}
        record("plan_cpu", {"model": model.name, **row})
        shown = f"{case['rows']:4} {case['tokens']:6} {case['dtype']:5} "
        shown += f"{'on' if case['checkpointing'] else 'off':13} {plan.peak_bytes / 2**20:6.0f} MiB"
        print(f"{shown} {peak / 2**20:5.0f} MiB {row['error']:7.1%}  {plan.peak_at}", flush=True)


if __name__ == "__main__":
    main()
