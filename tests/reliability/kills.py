"""Runs that are killed at random moments and resumed end as the run that was not.

    PYTHONPATH=tests python tests/reliability/kills.py --kills 50 --seed 0 [--variant packed] ...

A moment is a phase, one of the times that it begins, and a delay within its duration; each phase
is drawn as often. A third of the runs are killed again when they are resumed. Compared, byte for
byte: the adapter, the states in the last checkpoint, the sample answers; and every value of
metrics.jsonl but times and memory.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROWS, read_rows, tiny_model, tiny_tokenizer, write_rows
from reliability.forks import PHASES, Ended, Moment, Runs

MEASURED = ("tokens_per_second", "seconds", "peak_bytes", "planned_bytes")
COMMON = (
    "--max-length 128 --r 4 --compute-dtype fp32 --per-device-train-batch-size 4 --logging-steps 1 "
    "--gradient-accumulation-steps 2 --max-steps 8 --save-steps 2 --learning-rate 1e-2 --samples 1 "
    "--lora-dropout 0.1 --eval-steps 2"
)
VARIANTS = {  # name -> flags beside COMMON
    "8-bit": "",  # paged_adamw_8bit, the default, unpaged on a CPU
    "packed": "--packing --per-device-train-batch-size 1 --save-total-limit 1",
    "best": "--early-stopping-patience 2 --learning-rate 0.5 --save-total-limit 1 --max-steps 20",
    "bf16": "--adapter-dtype bf16 --optim adamw_torch --use-dora --eval-steps 3 --save-steps 3",
    "epochs": "--max-steps -1 --num-train-epochs 2 --dataset-num-proc 2 --loraplus-lr-ratio 4 "
    "--lr-scheduler-type cosine --eval-steps 3 --save-steps 1 --save-total-limit 2 "
    "--init-lora-weights pissa --logging-steps 2",
}


@dataclass
class Outcome:
    """Of one run that was killed: the phases in which it was, and what differs at its end."""

    hits: list[str]
    faults: list[str]


class Kills:
    """The undisturbed run of a variant, and killed ones to compare with it."""

    def __init__(self, folder: Path, runs: Runs, variant: str) -> None:
        self.runs, self.folder = runs, folder / variant
        self.folder.mkdir(parents=True)
        data = write_rows(self.folder / "rows.jsonl", ROWS)
        held_out = write_rows(self.folder / "held_out.jsonl", ROWS[::5])
        self.words = ["--model", str(base(folder)), "--data", str(data)]
        self.words += ["--eval-data", str(held_out), *COMMON.split(), *VARIANTS[variant].split()]
        self.whole = self.folder / "whole"
        ended = self.run(self.whole)
        if ended.code:
            raise SystemExit(f"{variant}: the run fails by itself\n{ended.output}")
        self.phases = ended.phases

    def run(self, output: Path, moment: Moment | None = None, *numbers: int, resume=False) -> Ended:
        words = [*self.words, "--output-dir", str(output), *["--resume"] * resume]
        return self.runs.run(words, moment, *numbers)

    def moment(self, phase: str, draw: random.Random) -> Moment:
        """A random moment of `phase`, as long as it took in the undisturbed run."""
        seconds = [seconds for name, seconds in self.phases if name == phase]
        turn = draw.randrange(len(seconds))
        return Moment(phase, turn + 1, draw.random() * seconds[turn])

    def killed(self, name: str, phase: str, draw: random.Random, *, sent: int) -> Outcome:
        """Run, send the signal in `phase`, resume (and do so once more in a third of the cases)."""
        output, hits, resume, faults = self.folder / name, [], False, []
        moments = [self.moment(phase, draw)]
        if draw.random() < 1 / 3:
            moments.append(self.moment(draw.choice([*PHASES]), draw))
        for moment in (*moments, None):
            ended = self.run(output, moment, sent, resume=resume)
            if ended.hit:
                hits.append(ended.hit)
                faults += misses_of(ended, sent)
            elif ended.code:
                faults.append(f"exit code {ended.code}: {ended.output.strip()[-2000:]}")
            resume = True
        faults += [] if faults else differences(self.whole, output)
        if not faults:
            shutil.rmtree(output)
        return Outcome(hits, faults)


def misses_of(ended: Ended, sent: int) -> list[str]:
    """What a run that got a signal owes: its exit code, one line, no traceback."""
    wanted = -sent if sent == signal.SIGKILL else 128 + sent
    faults = []
    if ended.code not in (wanted, 0):  # 0: it was done
        faults.append(f"exit code {ended.code} in {ended.hit}: {ended.output.strip()[-2000:]}")
    if "Traceback" in ended.output:
        faults.append(f"a traceback in {ended.hit}: {ended.output.strip()[-2000:]}")
    return faults


def base(folder: Path) -> Path:
    """A tiny model and its tokenizer, written once."""
    path = folder / "base"
    if not path.exists():
        tiny_model("llama").save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    return path


def differences(whole: Path, other: Path) -> list[str]:
    """What differs between the outputs of two runs."""
    last = max(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
    states = [f"{last}/{name}.safetensors" for name in ("adapter_model", "optimizer", "random")]
    faults = []
    for name in ("adapter_model.safetensors", "samples.jsonl", "adapter_config.json", *states):
        one, two = whole / name, other / name
        if not two.exists() or one.read_bytes() != two.read_bytes():
            faults.append(f"{name} {'differs' if two.exists() else 'is missing'}")
    ours, theirs = history(whole), history(other)
    if ours != theirs:
        only = [[row for row in a if row not in b] for a, b in ((ours, theirs), (theirs, ours))]
        faults.append(f"metrics.jsonl differs: only undisturbed {only[0]}, only killed {only[1]}")
    kept = [{p.name for p in folder.iterdir()} for folder in (whole, other)]
    if kept[0] != kept[1]:
        faults.append(f"files differ: {sorted(kept[0] ^ kept[1])}")
    return faults


def history(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the machine's load."""
    rows = read_rows(output / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in MEASURED} for row in rows]


def run_kills(
    kills: int, *, seed: int, variant: str, folder: Path, sent: int, phases: list[str]
) -> list[Outcome]:
    """`kills` runs that are killed in `phases`; prints a line per fault and the phases of all."""
    runs = Runs(folder / "log")
    subject, draw, outcomes = Kills(folder, runs, variant), random.Random(seed), []
    present = [phase for phase in phases if any(name == phase for name, _ in subject.phases)]
    for number in range(kills):
        phase = present[number % len(present)]
        outcome = subject.killed(f"{number}", phase, draw, sent=sent)
        outcomes.append(outcome)
        for fault in outcome.faults:
            print(f"{variant} {number}, in {' then '.join(outcome.hits)}: {fault}", flush=True)
    hits = Counter(hit for outcome in outcomes for hit in outcome.hits)
    shown = ", ".join(f"{name} {hits[name]}" for name in ("start", *PHASES) if hits[name])
    same = sum(not outcome.faults for outcome in outcomes)
    print(
        f"| {variant} | {seed} | {same} of {kills} | {sum(hits.values())} | {shown} |", flush=True
    )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", nargs="+", default=["8-bit"], choices=[*VARIANTS])
    parser.add_argument("--phase", nargs="+", default=[*PHASES], choices=[*PHASES])
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    outcomes = []
    for variant in given.variant:
        settings: Any = {"seed": given.seed, "variant": variant, "folder": folder}
        settings["phases"] = given.phase
        outcomes += run_kills(given.kills, sent=signal.Signals[given.signal], **settings)
    if not given.folder:
        shutil.rmtree(folder)
    sys.exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    main()
