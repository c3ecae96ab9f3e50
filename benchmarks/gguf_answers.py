"""Right answers of GGUF files in llama.cpp, on the demo's test rows.

    python benchmarks/gguf_answers.py a.gguf b.gguf [--lora adapter.gguf] [--rows 50]

Each request goes through the file's own chat template, at temperature 0. An answer is right if it
is exactly the wanted command (demo/score.py), as in the demo.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from results import ROOT, record

from qlora.cli import Progress
from qlora.merge.llamacpp import LlamaCpp

sys.path.append(str(ROOT))  # demo/ is not part of the installed package
from demo.__main__ import MAX_NEW_TOKENS
from demo.score import exact_match

CONTEXT = 512  # the longest request has 60 tokens


def main() -> None:
    """Print a row for each file, and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--lora", type=Path, help="a LoRA-GGUF to add to each file")
    parser.add_argument("--rows", type=int, default=50)
    words = parser.parse_args()
    lines = (ROOT / "demo" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines[: words.rows]]
    print(f"| file | MB | right of {len(chats)} | seconds |\n|---|---|---|---|")
    for file in words.files:
        started, right = time.perf_counter(), 0
        with LlamaCpp(file, context=CONTEXT, lora=words.lora) as model:
            for request, wanted in Progress(chats, desc=file.name):
                right += exact_match(model.answer([request], MAX_NEW_TOKENS), wanted["content"])
        row = {
            "file": file.name,
            "lora": words.lora and words.lora.name,
            "bytes": file.stat().st_size,
            "right": right,
            "rows": len(chats),
            "xllamacpp": version("xllamacpp"),
            "seconds": round(time.perf_counter() - started, 1),
        }
        size = row["bytes"] / 1e6
        print(f"| {file.name} | {size:.0f} | {right} | {row['seconds']} |", flush=True)
        record("gguf_answers", row)


if __name__ == "__main__":
    main()
