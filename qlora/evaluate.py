"""Evaluate a fine-tuned model on data: loss, and answers compared with the expected ones.

    python -m qlora.evaluate --adapter out --data rows.jsonl
    python -m qlora.evaluate --adapter out --data rows.jsonl --limit 100 --no-generate
    python -m qlora.evaluate --model out-merged --data rows.jsonl

An adapter is compared with its base. `--help` lists the flags.
"""

from qlora.__main__ import run

if __name__ == "__main__":
    run("evaluate", prog="python -m qlora.evaluate")
