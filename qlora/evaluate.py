"""Loss and answers of a model: `python -m qlora.evaluate --adapter out --data rows.jsonl`."""

from qlora.__main__ import run

if __name__ == "__main__":
    run("evaluate", prog="python -m qlora.evaluate")
