"""Measure a tuned model on data: the loss, and its answers against those wanted.

    python -m qlora.evaluate --adapter out --data rows.jsonl
    python -m qlora.evaluate --adapter out --data rows.jsonl --limit 100 --no-generate
    python -m qlora.evaluate --model out-merged --data rows.jsonl

An adapter is measured beside its base. `--help` lists every flag.
"""

from qlora.cli import run
from qlora.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Evaluate, with torch imported only now: a mistake in the flags should not wait for it."""
    from qlora.apps.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    run(
        main,
        EvaluateConfig,
        prog="python -m qlora.evaluate",
        interrupted="nothing was written; run again, with --limit N for fewer rows",
    )
