"""The cost of each kind of adapter per step on a 4-bit base, ours and PEFT's, in turn in one
process.

    python benchmarks/adapter_cost.py [--model base] [--rows 8] [--length 128] [--rounds 5]

Training steps (forward and backward): LoRA, LoRA with seven inactive adapters, DoRA; the same with
PEFT. Forward passes: the base, LoRA, merged LoRA, eight rows through four adapters in one pass, and
the same rows in four passes. Each case runs once per round; the table has the medians, relative to
LoRA. The default model is SmolLM2-135M-Instruct.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from results import record, small_model
from torch import Tensor

from qlora.adapters.apply import apply_lora, disable_adapter, mixed_batch, set_adapter
from qlora.adapters.fuse import merge_adapter
from qlora.adapters.targets import target_layers
from qlora.base.load import load_base
from qlora.config import LoraConfig

Way = Callable[[], Any]
NAMES = ["a1", "a2", "a3", "a4"]


def ours(base: str, ids: Tensor, *, use_dora: bool = False, inactive: int = 0) -> Way:
    """A training step with our adapter."""
    model = load_base(base)
    for i in range(inactive):
        apply_lora(model, LoraConfig(), adapter_name=f"idle_{i}")
    apply_lora(model, LoraConfig(use_dora=use_dora))
    return step(model, ids)


def pefts(base: str, ids: Tensor, *, use_dora: bool = False) -> Way:
    """A training step with PEFT's, on the same layers."""
    model = load_base(base)
    targets = target_layers(model, LoraConfig())
    config = peft.LoraConfig(r=16, lora_alpha=32, use_dora=use_dora, target_modules=targets)
    return step(peft.get_peft_model(model, config), ids)


def step(model: Any, ids: Tensor) -> Way:
    """Forward and backward."""
    model.config.use_cache = False
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    return run


def forwards(base: str, ids: Tensor) -> dict[str, Way]:
    """Cases that run one model with four adapters; each does its own set-up."""
    model: Any = load_base(base)
    for name in NAMES:
        apply_lora(model, LoraConfig(), adapter_name=name)
    model.eval()
    merged: Any = merge_adapter(apply_lora(load_base(base), LoraConfig()).eval())
    rows = [NAMES[i % 4] for i in range(len(ids))]

    def without() -> None:
        with disable_adapter(model):
            model(input_ids=ids)

    def one() -> None:
        set_adapter(model, NAMES[0])
        model(input_ids=ids)

    def mixed() -> None:
        with mixed_batch(model, rows):
            model(input_ids=ids)

    def one_by_one() -> None:
        for name in NAMES:
            set_adapter(model, name)
            model(input_ids=ids[[row == name for row in rows]])

    return {
        "forward, base": without,
        "forward, LoRA": one,
        "forward, LoRA merged": lambda: merged(input_ids=ids),
        "forward, four adapters mixed": mixed,
        "forward, four adapters in turn": one_by_one,
    }


def main() -> None:
    """Print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(small_model()))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(10, 1000, (given.rows, given.length), device=device)
    ways = {
        "step, LoRA": ours(given.model, ids),
        "step, LoRA and 7 inactive": ours(given.model, ids, inactive=7),
        "step, DoRA": ours(given.model, ids, use_dora=True),
        "step, PEFT's LoRA": pefts(given.model, ids),
        "step, PEFT's DoRA": pefts(given.model, ids, use_dora=True),
        **forwards(given.model, ids),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.rounds + 1):  # the first one warms up
        for name in [*ways][turn % len(ways) :] + [*ways][
            : turn % len(ways)
        ]:  # each case is first in some round
            run = ways[name]
            start = time.perf_counter()
            with torch.set_grad_enabled(name.startswith("step")):
                run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        lora = medians[f"{name.partition(',')[0]}, LoRA"]
        print(f"{name:32}{median * 1000:10.1f} ms {median / lora:8.2f}")
    sizes = {"rows": given.rows, "length": given.length, "rounds": given.rounds}
    record("adapter_cost", {"model": given.model.rpartition("/")[2], **sizes, "seconds": medians})


if __name__ == "__main__":
    main()
