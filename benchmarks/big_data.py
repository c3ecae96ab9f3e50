"""Many rows, tokenized and packed twice: peak memory, seconds and rows a second.

    python benchmarks/big_data.py --rows 1000000

Generates a .jsonl file of prompts and answers of 10 to 200 words, or of plain text with --text, and
starts a process per run, which does what train.py does up to the packs: its imports, beside which
the file is hashed, and `prepare_rows` of qlora.training.run, without a model. The second finds the
rows of the first in the cache. Peak memory is the largest sum of the proportional set sizes of the
process and its workers, seen ten times a second: a page that several share is counted once. Mapped
pages of the cached rows count too, although the system may drop them. Seconds are from the start of
the process to the packs; `prepare_seconds` leave out the imports, and `rows_seconds` also the
packs and the opening of the model, which the first run may convert from .gguf.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.results import record, small_model

LENGTH = 1024
WORDS = "the of and to in is that it was for on are as with his they at be this from or had"

RUN = """
import sys, time, json
from qlora.__main__ import imported
from qlora.files import hash_beside
hash_beside([sys.argv[2]])
prepare_rows = imported("qlora.training.run:prepare_rows")
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_tokenizer
from qlora.config import DataConfig, TrainConfig
from qlora.data.batches import PackedRows
start = time.perf_counter()
model, data, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = TrainConfig(model, "out", DataConfig(data, max_length=length, long_rows="truncate"))
checkpoint = Checkpoint.open(model)
tokenizer = load_tokenizer(checkpoint)
opened = time.perf_counter()
prepared = prepare_rows(config, checkpoint, tokenizer)
rows = time.perf_counter() - opened
packs = PackedRows(prepared.rows, prepared.max_length)
print(packs.describe())
print(json.dumps({"prepare_seconds": time.perf_counter() - start, "rows_seconds": rows,
                  "tokens": prepared.counts["training"]["tokens"],
                  "fingerprint": prepared.counts["training"]["fingerprint"], "packs": len(packs)}))
"""


def main() -> None:
    """Generate, run twice and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--text", action="store_true", help="plain text, without a chat template")
    parser.add_argument("--model", help="by default the demo's model")
    args = parser.parse_args()
    model = args.model or str(small_model())
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        generate(data, args.rows, args.text)
        row = {"rows": args.rows, "kind": "text" if args.text else "chat"}
        row["file_bytes"] = data.stat().st_size
        cache = os.environ | {"QLORA_CACHE": str(Path(folder, "cache"))}
        first, second = (measured(model, data, cache) for _ in range(2))
        assert first["fingerprint"] == second["fingerprint"]
    row |= {"tokens": first["tokens"], "packs": first["packs"]}
    for name, run in (("first", first), ("second", second)):
        keys = ("seconds", "prepare_seconds", "rows_seconds", "peak_bytes")
        row |= {f"{name}_{key}": round(run[key], 2) for key in keys}
    row["rows_per_second"] = round(args.rows / first["rows_seconds"])
    print(json.dumps(row, indent=1))
    record("big_data", row)


def generate(path: Path, rows: int, is_text: bool) -> None:
    """Rows of random words, numbered so that no two are equal."""
    random.seed(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            words = random.choices(WORDS.split(), k=random.randint(10, 200))
            half = len(words) // 2
            prompt, answer = f"{i}: {' '.join(words[:half])}", " ".join(words[half:])
            row = {"text": f"{prompt} {answer}"} if is_text else {}
            file.write(json.dumps(row or {"prompt": prompt, "completion": answer}) + "\n")


def measured(model: str, data: Path, environment: dict[str, str]) -> dict[str, float]:
    """The figures of a fresh process."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-c", RUN, model, str(data), str(LENGTH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.1)
        lines = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(process.returncode)
    print("\n".join(lines[:-1]))
    figures = json.loads(lines[-1])
    return figures | {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def memory(pid: int) -> int:
    """Bytes of a process and its children, shared pages once."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
