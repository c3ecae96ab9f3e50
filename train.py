"""Fine-tune a language model with QLoRA: a frozen 4-bit base and a LoRA adapter.

    python train.py --model PATH_OR_HUB_NAME --data rows.jsonl --output-dir out --r 16
    python train.py --config configs/7b_12gb.yaml --learning-rate 1e-4

Writes the adapter, its tokenizer, run.yaml (a recipe for the same run) and the loss curve to the
output folder. `--help` lists every flag.
"""

from qlora.cli import run
from qlora.config import TrainConfig


def main(config: TrainConfig) -> None:
    """Train, importing torch only now, so that errors in flags are reported at once."""
    from qlora.training import train

    train(config)


if __name__ == "__main__":
    run(
        main,
        TrainConfig,
        prog="train.py",
        interrupted="--resume goes on from the last checkpoint, if there is one yet",
    )
