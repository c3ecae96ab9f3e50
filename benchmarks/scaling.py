"""Tokens a second and memory a rank of train.py, by the number of ranks.

    python benchmarks/scaling.py [--shape llama2-7b | --model FOLDER] [--ranks 1 2 4]
        [--sharding ddp fsdp] [--seq 1024] [--rows 1] [--steps 12] [--rounds 3]

Ranks are GPUs, or without one CPU processes with Gloo. torchrun starts train.py, on rows of --seq
tokens each. Two ways to grow:

    same rows a rank   --rows on each: a step has N times as many
    same global batch  --rows × the most ranks in every step, through accumulation

With the most ranks both are the same run. Efficiency is against one rank in the same round:
tokens a second / (N × those of one rank, with the same growth and sharding). Of a run, the median
of its logs counts, without the first ones; of the rounds, their median. Every rank has the same
threads, cores / the most ranks. CPU ranks share caches and memory bandwidth, so that they show
that the program works and what the exchange costs, not how GPUs scale.

Memory is the largest of all ranks: allocated on the GPU, or resident.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import ROOT, record, small_model
from shapes import make

from qlora.errors import UserError, require

SHARDINGS = ("ddp", "fsdp")
GROWTHS = ("same rows a rank", "same global batch")
WARM = 2  # logs that do not count: of the first steps, which compile and fill caches
WORDS = "the a of and to in is it you that he was for on are with as his they be at one have this"
# One rank: train.py's own command, and then its peak in a file. torchrun starts it by its path.
AS_RANK = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from qlora.__main__ import run
run("train", prog="train.py")
from qlora.training.outputs import peak_bytes
Path({folder!r}, "peak-" + os.environ["RANK"]).write_text(str(peak_bytes()))
"""


class Case(NamedTuple):
    """A run: its ranks, and the micro-batches of each in a step."""

    growth: str
    sharding: str
    ranks: int
    passes: int


def cases(ranks: Sequence[int], shardings: Sequence[str]) -> Iterator[Case]:
    """The runs of a round, one rank first; the same global batch needs whole micro-batches."""
    most = ranks[-1]
    for sharding in shardings:
        yield from (Case(GROWTHS[0], sharding, n, 1) for n in ranks)
        yield from (Case(GROWTHS[1], sharding, n, most // n) for n in ranks[:-1])


def default_ranks() -> list[int]:
    """1, 2, 4, … up to the GPUs, or to the cores without one."""
    most = torch.cuda.device_count() or os.cpu_count() or 1
    return [1 << i for i in range(most.bit_length())]


# ---- a run


def write_data(folder: Path, seq: int) -> Path:
    """Rows of random words, which are all cut to `seq` tokens."""
    draw, data = random.Random(0), folder / "rows.jsonl"
    texts = (" ".join(draw.choices(WORDS.split(), k=2 * seq)) for _ in range(256))
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return data


def write_tokenizer(folder: Path) -> None:
    """A word is a token, for random weights that have no tokenizer of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS.split()])}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)


def train_words(
    given: argparse.Namespace, case: Case, model: Path, data: Path, out: Path
) -> list[str]:
    """The flags of train.py."""
    sharding = ["--sharding", case.sharding] if case.sharding != "ddp" else []
    return [
        "--model", str(model), "--data", str(data), "--output-dir", str(out),
        "--max-length", str(given.seq), "--long-rows", "truncate",
        "--per-device-train-batch-size", str(given.rows),
        "--gradient-accumulation-steps", str(case.passes), "--max-steps", str(given.steps),
        "--logging-steps", "1", "--samples", "0", "--learning-rate", "1e-4", *sharding,
    ]  # fmt: skip


def measure(
    given: argparse.Namespace, case: Case, model: Path, data: Path, threads: int
) -> dict[str, float]:
    """Tokens a second, and the peak of the rank that needs most; UserError for a run that fails."""
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder, "train.py"), Path(folder, "out")
        script.write_text(AS_RANK.format(root=str(ROOT), folder=folder))
        starts = ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        words = train_words(given, case, model, data, out)
        ran = subprocess.run(
            [sys.executable, "-m", *starts, str(script), *words], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False,
        )  # fmt: skip
        lines = [*ran.stderr.splitlines(), f"exit code {ran.returncode}"]
        told = [line for line in lines if line.startswith(("error:", "rank "))] or lines[-2:]
        require(ran.returncode == 0, f"{case.ranks} ranks, {case.sharding}: {told[0]}")
        logs = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        rates = [row["tokens_per_second"] for row in logs if "loss" in row][WARM:]
        peaks = [int(path.read_text()) for path in Path(folder).glob("peak-*")]
    return {"tokens_per_second": statistics.median(rates), "peak_bytes": max(peaks)}


# ---- the table


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its efficiency against one rank, of the same growth, sharding and round.

    The run with the most ranks stands for both growths, and is listed in both.
    """
    most = max(row["ranks"] for row in rows)
    both = [row | {"growth": GROWTHS[1]} for row in rows if row["ranks"] == most > 1]
    alone = {(r["growth"], r["sharding"]): r["rates"] for r in rows if r["ranks"] == 1}
    made = []
    for row in sorted([*rows, *both], key=lambda r: (r["sharding"], GROWTHS.index(r["growth"]))):
        ones = alone[row["growth"], row["sharding"]]
        shares = [rate / row["ranks"] / one for rate, one in zip(row["rates"], ones, strict=True)]
        made.append(row | {"efficiency": statistics.median(shares)})
    return made


def in_words(row: dict[str, Any]) -> str:
    """A row in a line, for the table of benchmarks/gpu_day.py."""
    rate = statistics.median(row["rates"])
    what = f"{row['ranks']} ranks, {row['sharding']}, {row['growth']}: {rate:,.0f} tokens/s"
    return f"{what}, efficiency {row['efficiency']:.0%}, {row['peak_bytes'] / 2**30:.2f} GiB"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = "| growth | sharding | ranks | rows a step | tokens/s | efficiency | memory a rank |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {r['growth']} | {r['sharding']} | {r['ranks']} | {r['rows_a_step']} "
        f"| {statistics.median(r['rates']):,.0f} | {r['efficiency']:.0%} "
        f"| {r['peak_bytes'] / 2**20:,.0f} MiB |"
        for r in rows
    ]
    return "\n".join(lines)


# ---- the command


def parsed() -> argparse.Namespace:
    """The flags; UserError for those that cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="by default the demo's small one")
    parser.add_argument("--shape", help="random weights of that shape, see shapes.py")
    parser.add_argument("--folder", type=Path, help="where these are kept")
    parser.add_argument("--ranks", type=int, nargs="+", default=default_ranks())
    parser.add_argument("--sharding", nargs="+", choices=SHARDINGS, default=["ddp"])
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    given.ranks = ranks = sorted({*given.ranks})
    gpus = torch.cuda.device_count()
    require(min(ranks) == 1, f"--ranks must have 1, the others are compared with it, got {ranks}")
    uneven = [n for n in ranks if max(ranks) % n]
    require(not uneven, f"--ranks must divide the most of them, {max(ranks)}: not {uneven}")
    require(not gpus or max(ranks) <= gpus, f"--ranks {max(ranks)}: this machine has {gpus} GPUs")
    require(given.steps > WARM, f"--steps must be above {WARM}, got {given.steps}")
    return given


def run(given: argparse.Namespace, temporary: Path) -> list[dict[str, Any]]:
    """Measure all cases in every round; a record for each case."""
    model = given.model or (None if given.shape else small_model())
    if given.shape:
        model = make(given.shape, ((given.folder or temporary) / given.shape).absolute())
        write_tokenizer(model)
    data, most = write_data(temporary, given.seq), max(given.ranks)
    threads = max(1, (os.cpu_count() or 1) // most)
    found: dict[Case, list[dict[str, float]]] = {}
    for number in range(given.rounds):
        for case in cases(given.ranks, given.sharding):
            found.setdefault(case, []).append(measure(given, case, model, data, threads))
            rate = found[case][-1]["tokens_per_second"]
            print(f"round {number + 1}: {case.growth}, {case.sharding}, {case.ranks} ranks: "
                  f"{rate:,.0f} tokens/s", flush=True)  # fmt: skip
    sizes = {"model": given.shape or model.name, "seq": given.seq, "steps": given.steps}
    where = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        {
            "growth": case.growth, "sharding": case.sharding, "ranks": case.ranks,
            "rows_a_step": given.rows * case.passes * case.ranks, **sizes, "on": where,
            "threads": threads, "rates": [one["tokens_per_second"] for one in runs],
            "peak_bytes": max(int(one["peak_bytes"]) for one in runs),
        }
        for case, runs in found.items()
    ]  # fmt: skip
    return with_efficiency(rows)


def main() -> None:
    """The command; a user's error is one line."""
    try:
        with tempfile.TemporaryDirectory() as temporary:
            rows = run(parsed(), Path(temporary))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for row in rows:
        record("scaling", row | {"shown": [in_words(row)]})
    print(table(rows))


if __name__ == "__main__":
    main()
