"""Everything that only a GPU can show, in one command, for a GPU that is there for half an hour.

    python benchmarks/gpu_day.py --out DIR                     on a GPU: as many steps as 570 s hold
    python benchmarks/gpu_day.py --out DIR --from step-4x2048  go on there, in another call
    python benchmarks/gpu_day.py --out DIR --dry               on a CPU: what can run there, tiny
    python benchmarks/gpu_day.py --page DIR                    docs/gpu.md's table of DIR/day.jsonl;
                                                               the recorded one is results/gpu

A step is a command in a process group of its own, which is interrupted at the step's limit, and
killed soon after. What is measured goes to DIR/*.jsonl (see results.py), and a line about each step
to DIR/day.jsonl: exit code, seconds, numbers, the last lines of output. A failed step stops
nothing. A step for whose limit the budget has no time left is not begun: the last line says with
which --from to go on.

Nothing is read from a network. 16-bit and 4-bit models have random weights, made on the GPU.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- benchmarks/gpu_day.py -->", "<!-- end of the day -->"
BUDGET = 570  # seconds: a call that may take ten minutes, with time to copy the records
BUSY = 4  # times a step's limit for a dry day: its machine may have other work
GRACE = 10  # seconds for a step to end at its limit, before it is killed
LINES = 40  # of output that are kept
PACKAGES = (
    "torch", "bitsandbytes", "transformers", "datasets", "accelerate", "safetensors", "gguf",
    "peft", "wcwidth", "psutil", "pytest", "hypothesis", "scipy", "tqdm", "matplotlib", "sacrebleu",
    "tensorboard", "yaml", "pyarrow",
)  # fmt: skip
PYTEST = "-m pytest -q -p no:cacheprovider tests --ignore tests/pages"
STEP = "benchmarks/step.py --shape {shape} --folder {shapes} --sides"
LONG = STEP.replace("{shape}", "mistral-7b")  # Llama 2 has 4,096 positions
TINY = "--seq 32 --batch 1 --rounds 1"


@dataclass(frozen=True)
class Step:
    """A part of the day: its words after `python`, on a GPU and in a dry run on a CPU."""

    name: str
    limit: int
    """seconds; the step is killed then"""
    words: str
    dry: str = ""
    """nothing: it cannot run on a CPU"""
    gpus: int = 1
    """on fewer it is left out"""


STEPS = (
    Step("machine", 40, "benchmarks/gpu_check.py machine", "benchmarks/gpu_check.py machine"),
    Step("smoke", 60, "benchmarks/gpu_check.py smoke", "benchmarks/gpu_check.py smoke"),
    Step("tests", 280, f"{PYTEST} -m gpu", f"{PYTEST} -m gpu --collect-only"),
    Step("decode", 100, "benchmarks/decode.py --models llama2-7b --rounds 20"),
    Step(
        "step-1x2048", 200,
        f"{STEP} ours ours-triton peft dense --seq 2048 --batch 1 --rounds 8",
        f"{STEP} ours peft --one-process {TINY}",
    ),
    Step(
        "step-4x2048", 240, f"{STEP} ours ours-triton peft dense --seq 2048 --batch 4 --rounds 5",
    ),
    Step(
        "profile", 120, "benchmarks/gpu_check.py profile --shape {shape} --folder {shapes}",
        "benchmarks/gpu_check.py profile --shape {shape} --folder {shapes} --seq 32",
    ),
    Step("offload-8k", 150, f"{LONG} ours ours-offloading --seq 8192 --batch 1 --rounds 3 --alone"),
    Step(
        "offload-32k", 200, f"{LONG} ours ours-offloading --seq 32768 --batch 1 --rounds 2 --alone",
    ),
    Step(
        "ablation", 300,
        "benchmarks/step.py --shape {shape} --folder {shapes} --ablate --seq 2048 --batch 1 "
        "--rounds 4 --alone",
    ),
    Step(
        "longest", 300,
        f"{STEP} ours-offloading ours peft --longest --gpu-memory 8GiB --unit 2048",
    ),
    Step(
        "scaling", 540,
        "benchmarks/scaling.py --shape {shape} --folder {shapes} --seq 2048 --rounds 1", gpus=2,
    ),
)  # fmt: skip


# ---- steps ----


def main() -> None:
    """Run the steps, or write the page; a user's error is one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all steps")
    parser.add_argument("--from", dest="first", default=STEPS[0].name, help="the first step")
    parser.add_argument("--dry", action="store_true", help="what runs on a CPU, on a tiny model")
    parser.add_argument("--page", type=Path, help="write docs/gpu.md's table of that folder")
    given = parser.parse_args()
    if given.page:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), given.page / "day.jsonl"), "utf-8")
        return
    if fault := fault_of(given):
        print(f"error: {fault}", file=sys.stderr)
        raise SystemExit(2)
    given.out.mkdir(parents=True, exist_ok=True)
    failed = run_all(given)
    print(table(read(given.out / "day.jsonl")))
    raise SystemExit(1 if failed else 0)


def fault_of(given: argparse.Namespace) -> str | None:
    """Why the day cannot begin."""
    names = [step.name for step in STEPS]
    if given.out is None:
        return "--out is missing: a folder for the records"
    if given.first not in names:
        return f"--from {given.first} is no step. The steps: {', '.join(names)}"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}. pip install, or carry their wheels along"
    import torch

    if not (given.dry or torch.cuda.is_available()):
        return "no GPU is to be seen: --dry runs what a CPU can"
    return None


def run_all(given: argparse.Namespace) -> list[str]:
    """The names of the steps that failed."""
    import torch

    start, failed = time.monotonic(), []
    first = [step.name for step in STEPS].index(given.first)
    for step in STEPS[first:]:
        left = given.budget - (time.monotonic() - start)
        if given.dry and not step.dry:
            print(f"{step.name}: needs a GPU", flush=True)
            continue
        if step.gpus > 1 and torch.cuda.device_count() < step.gpus:
            print(f"{step.name}: needs {step.gpus} GPUs", flush=True)
            continue
        if step.limit > left and not given.dry:
            print(f"{left:.0f} s are left: go on with --from {step.name}", flush=True)
            break
        row = run(step, given.out, dry=given.dry)
        with (given.out / "day.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{step.name}: {outcome(row)} in {row['seconds']} s", flush=True)
        failed += [step.name] * (row["exit"] != 0)
    return failed


def run(step: Step, out: Path, *, dry: bool) -> dict[str, Any]:
    """The step's line: what it ran, how it ended, and the records that it wrote."""
    shapes = Path(tempfile.gettempdir()) / "qlora-shapes"
    words = (step.dry if dry else step.words).format(
        shape="tiny" if dry else "llama2-7b", shapes=shapes
    )
    if "pytest" in words and importlib.util.find_spec("xdist") and not dry:
        words += " -n 6"
    before = {path: len(read(path)) for path in out.glob("*.jsonl")}
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(folders), BENCHMARK_RESULTS=str(out))
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *words.split()], cwd=ROOT, start_new_session=True,
            env=environment, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(step.limit * (BUSY if dry else 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest prints what has failed until then
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = -signal.SIGKILL
        said.seek(0)
        lines = said.read().splitlines()[-LINES:]
    records = [
        {"name": path.stem, **row}
        for path in sorted(out.glob("*.jsonl"))
        if path.name != "day.jsonl"
        for row in read(path)[before.get(path, 0) :]
    ]
    return {
        "step": step.name,
        "command": f"python {words}".replace(str(shapes), "SHAPES"),
        "exit": code,
        "seconds": round(time.monotonic() - start, 1),
        "records": records,
        "output": lines,
    }


def read(path: Path) -> list[Any]:
    """The lines of a JSON lines file; none if it is not there."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


# ---- the table ----


def outcome(row: dict[str, Any]) -> str:
    """How a step ended, in a word or two."""
    if row["exit"] == 0:
        return "done"
    return "killed at its limit" if row["exit"] < 0 else f"exit code {row['exit']}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A markdown table of the last line of each step."""
    last = {row["step"]: row for row in rows}
    lines = ["| step | outcome | seconds | figures |", "|---|---|---|---|"]
    for name in (step.name for step in STEPS):
        if row := last.get(name):
            shown = "; ".join(figures(row)) or "".join(row["output"][-1:])[:120]
            lines.append(f"| {name} | {outcome(row)} | {row['seconds']:.0f} | {shown} |")
    return "\n".join(lines)


def figures(row: dict[str, Any]) -> Iterator[str]:
    """What a reader wants to know of a step's records."""
    for found in row["records"]:
        for side, values in found.get("sides", {}).items():
            if "tokens_per_second" in values:
                rate, share = values["tokens_per_second"]["median"], values["share_of_ceiling"]
                peak = (values.get("peak_bytes") or values["above_loaded_bytes"]) / 2**30
                yield f"{side} {rate:,.0f} tokens/s, {share:.0%} of the ceiling, {peak:.2f} GiB"
            else:
                yield f"{side} out of memory"
        for side, tokens in found.get("tokens", {}).items():
            yield f"{side} {tokens:,} tokens"
        yield from found.get("shown", [])


def with_table(text: str, day: Path) -> str:
    """The page's text with the table of that day between the markers."""
    before, _, rest = text.partition(BEGIN)
    shown = f"{table(read(day))}\n" if day.exists() else ""
    return f"{before}{BEGIN}\n{shown}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    main()
