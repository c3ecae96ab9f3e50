"""The memory that ten often tuned models take, by `train.py --plan`, without a GPU or weights.

    python benchmarks/plan_table.py [MODEL ...]     prints their rows
    python benchmarks/plan_table.py --write         writes the table into README.md

The settings are train.py's defaults with one row a micro-batch and gradient accumulation: rank 16
on all linear layers, bf16 adapter, paged 8-bit AdamW, gradient checkpointing. Sizes are those of
the published config.json files. Nothing is measured on a GPU.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapes import SHAPES, llama3, sizes
from transformers import Gemma3TextConfig, Phi3Config, PretrainedConfig, Qwen3Config

from qlora.config import DataConfig, TrainConfig
from qlora.plan.estimate import Planner
from qlora.plan.fit import Fitter

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks/plan_table.py -->", "<!-- end of plan_table -->"
LENGTHS, CARDS = (1024, 2048, 4096), (8, 12, 16, 24)
GIB = 1 << 30
MODELS: dict[str, PretrainedConfig] = {
    "Qwen2.5-0.5B": SHAPES["qwen2.5-0.5b"],
    "Llama-3.2-1B": SHAPES["llama3.2-1b"],
    "Llama-3.2-3B": llama3(3072, 8192, 28, 24, 8, tied=True, factor=32.0),
    "Phi-3.5-mini": Phi3Config(**sizes(3072, 8192, 32, 32, 32, 32064, 131072), pad_token_id=32000),
    "Qwen3-4B": Qwen3Config(
        **sizes(2560, 9728, 36, 32, 8, 151936, 40960, theta=1e6, tied=True), head_dim=128
    ),
    "Gemma-3-4B (text)": Gemma3TextConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, vocab_size=262208, max_position_embeddings=131072,
        sliding_window=1024,
    ),
    "Mistral-7B": SHAPES["mistral-7b"],
    "Qwen2.5-7B": SHAPES["qwen2.5-7b"],
    "Llama-3.1-8B": SHAPES["llama3.1-8b"],
    "Qwen3-8B": SHAPES["qwen3-8b"],
}  # fmt: skip


def row(name: str, cards: Sequence[int] = CARDS) -> str:
    """The line of the table: the peak at each of LENGTHS, the longest row on each card."""
    with tempfile.TemporaryDirectory() as folder:
        MODELS[name].save_pretrained(folder)
        settings: dict[str, Any] = {"per_device_train_batch_size": 1, "plan": True}
        config = TrainConfig(folder, "out", DataConfig("rows.jsonl"), gpu_memory="8GiB", **settings)
        fitter = Fitter(Planner(config))
    peaks = [fitter.plan({"max_length": tokens}) for tokens in LENGTHS]
    cells = [name, *(f"{p.peak_bytes / GIB:.1f}" if p is not None else "" for p in peaks)]
    for card in cards:
        fitter.budget = card * GIB
        tokens = fitter.longest_row()
        is_all = tokens == fitter.source.longest
        cells.append(f"{tokens:,}{' (all)' * is_all}" if tokens else "–")
    return "| " + " | ".join(cells) + " |"


def table(names: Sequence[str]) -> str:
    """The markdown of the table."""
    head = ["model", *(f"{n:,} tokens" for n in LENGTHS), *(f"longest on {n} GiB" for n in CARDS)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head))]
    return "\n".join([*lines, *map(row, names)])


def main() -> None:
    """Print the rows, or write all into the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {json.dumps([*MODELS])}")
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    given = parser.parse_args()
    if unknown := {*given.models} - {*MODELS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    if not given.write:
        print(table(given.models or [*MODELS]))
        return
    made = table([*MODELS])
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
