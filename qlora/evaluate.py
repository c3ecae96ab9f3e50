"""Measure a tuned model on data: the loss, and its answers against those wanted.

    python -m qlora.evaluate --adapter out --data rows.jsonl
    python -m qlora.evaluate --adapter out --data rows.jsonl --limit 100 --no-generate
    python -m qlora.evaluate --model out-merged --data rows.jsonl

An adapter is measured beside its base. `--help` lists every flag.
"""

from qlora.__main__ import run

if __name__ == "__main__":
    run("evaluate", prog="python -m qlora.evaluate")
