"""Memory of a run on a CPU over many steps, with evaluations, checkpoints and logs.

    PYTHONPATH=tests python tests/reliability/memory.py --steps 2000 [--trace]

Every 100 steps it prints the resident memory (RSS) of the process, and that of its own, without
mapped files. Its proportional share (PSS) is no measure: when another process ends, the share of
the libraries that both had mapped grows. --trace also prints what Python has allocated since step
100, by line; it makes a run slower and its memory larger.
"""

import argparse
import gc
import os
import random
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from conftest import quick_config, tiny_model, tiny_tokenizer, write_rows
from transformers import TrainerCallback

from qlora.config import DataConfig
from qlora.training import run
from qlora.training.trainer import AdapterTrainer

FIRST, EVERY = 100, 100  # steps: the memory that others are compared with, and between two looks
MOST = 1.02  # times the first


class Watch(TrainerCallback):
    """Records (step, RSS, own memory) in bytes at the end of every EVERY steps."""

    def __init__(self, trace: bool) -> None:
        self.trace, self.first = trace, None
        self.process, self.seen = psutil.Process(), list[tuple[int, int, int]]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if not step or step % EVERY:
            return
        memory = self.process.memory_info()
        own = memory.rss - memory.shared
        self.seen.append((step, memory.rss, own))
        print(f"step {step}: RSS {memory.rss:,}, own {own:,} bytes", flush=True)
        if self.trace:
            gc.collect()
            now = tracemalloc.take_snapshot()
            for line in now.compare_to(self.first, "lineno")[:8] if self.first else ():
                print(f"    {line}")
            self.first = self.first or now


def watch_run(folder: Path, *, steps: int, trace: bool = False) -> list[tuple[int, int, int]]:
    """Train a tiny model in `folder` for `steps` steps; (step, RSS, own memory) of each look."""
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    draw, words = random.Random(0), ["red", "tree", "water", "stone", "seven"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 8))) for _ in range(97)]
    rows = [{"messages": [
        {"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]},
    ]} for text in texts]  # fmt: skip
    data = write_rows(folder / "rows.jsonl", rows)
    held_out = write_rows(folder / "held_out.jsonl", rows[:4])
    settings: Any = {
        "data": DataConfig(str(data), str(held_out), max_length=128), "max_steps": steps + 1,
        "per_device_train_batch_size": 2, "eval_steps": 20, "save_steps": 50,
        "gradient_checkpointing": False, "max_bad_steps": steps,
    }  # fmt: skip
    config = quick_config(folder / "base", data, folder / "out", **settings)
    watch, create = Watch(trace), AdapterTrainer.create_optimizer

    def watched(self: Any, *given: Any) -> Any:
        if watch not in self.callback_handler.callbacks:
            self.add_callback(watch)
        return create(self, *given)

    if trace:
        tracemalloc.start(8)
    with patch.object(AdapterTrainer, "create_optimizer", watched):
        run.train(config)
    return watch.seen


def growth(seen: list[tuple[int, int, int]]) -> tuple[float, float]:
    """RSS and own memory at the last look, as shares of those at step FIRST."""
    _, rss, own = next(look for look in seen if look[0] == FIRST)
    return seen[-1][1] / rss, seen[-1][2] / own


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--trace", action="store_true")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a number that the run keeps
    with tempfile.TemporaryDirectory() as folder:
        rss, own = growth(watch_run(Path(folder), steps=given.steps, trace=given.trace))
    print(f"after {given.steps} steps against after {FIRST}: RSS {rss:.4f}, own {own:.4f}")
    sys.exit(max(rss, own) > MOST)


if __name__ == "__main__":
    main()
