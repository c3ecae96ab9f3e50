"""Fine-tune a language model with QLoRA: a frozen 4-bit base and a LoRA adapter.

    python train.py --model PATH_OR_HUB_NAME --data rows.jsonl --output-dir out --r 16
    python train.py --config configs/7b_12gb.yaml --learning-rate 1e-4

Writes the adapter, its tokenizer, run.yaml (a recipe for the same run) and the loss curve to the
output folder. `--help` lists the flags. This is `qlora train`: qlora.training.train(config) does it
from Python.
"""

from qlora.__main__ import run

if __name__ == "__main__":
    run("train", prog="train.py")
