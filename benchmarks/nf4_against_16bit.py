"""The cost of quantizing the base: QLoRA on NF4 against LoRA on the unquantized model.

    python benchmarks/nf4_against_16bit.py --train dev.txt --test test.txt

Same data, steps, seed and initial adapter; the loss on held-out rows before and after. The data is
the E2E NLG challenge, lines `facts||sentence`. The model is SmolLM2-135M-Instruct from a 4-bit GGUF
file, so "16 bits" means that file dequantized.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import record, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qlora.adapters.apply import apply_lora
from qlora.base.checkpoint import Checkpoint, resolve
from qlora.base.load import compute_dtype, load_base
from qlora.base.modules import ModelState
from qlora.config import DataConfig, QuantConfig, TrainConfig
from qlora.data.rows import prepare_data, prepare_tokenizer
from qlora.training import prepare_for_training
from qlora.training.run import rate_from_rule
from qlora.training.trainer import make_trainer

MAX_LENGTH = 256


def as_jsonl(source: Path, target: Path, rows: int) -> Path:
    """Every n-th line of an E2E file as prompt and completion."""
    lines = source.read_text(encoding="utf-8").splitlines()
    chosen = lines[:: max(1, len(lines) // rows)][:rows]
    pairs = (line.split("||", 1) for line in chosen)
    text = "".join(json.dumps({"prompt": f, "completion": s}) + "\n" for f, s in pairs)
    target.write_text(text, encoding="utf-8")
    return target


def load(config: TrainConfig, *, quantized: bool) -> Any:
    """The base in NF4, or unquantized, in the same compute dtype."""
    if quantized:
        return load_base(config.model, config.quant)
    checkpoint = Checkpoint(resolve(config.model))
    dtype = compute_dtype(config.quant, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype)
    model.qlora_state = ModelState(fingerprint=checkpoint.fingerprint, quant=QuantConfig())
    return model


def measure(config: TrainConfig, *, quantized: bool) -> tuple[float, float]:
    """Held-out loss before and after training."""
    model = load(config, quantized=quantized)
    apply_lora(model, config.lora, generator=torch.Generator().manual_seed(config.seed))
    config = replace(config, learning_rate=config.learning_rate or rate_from_rule(model))
    prepare_for_training(model, gradient_checkpointing=False)
    tokenizer = AutoTokenizer.from_pretrained(resolve(config.model))
    prepare_tokenizer(tokenizer)
    rows, _ = prepare_data(config.data.data, tokenizer, max_length=MAX_LENGTH)
    held_out, _ = prepare_data(str(config.data.eval_data), tokenizer, max_length=MAX_LENGTH)
    Path(config.output_dir).mkdir(parents=True)
    trainer = make_trainer(config, model, tokenizer, rows, held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def main() -> None:
    """Run both, print a table, and record it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--learning-rate", type=float)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = as_jsonl(given.train, folder / "train.jsonl", given.steps * given.rows_per_step)
        test = as_jsonl(given.test, folder / "test.jsonl", 128)
        config = TrainConfig(
            model=str(small_model()),
            output_dir=str(folder / "nf4"),
            data=DataConfig(str(train), str(test), MAX_LENGTH),
            per_device_train_batch_size=given.rows_per_step,
            gradient_accumulation_steps=1,
            max_steps=given.steps,
            eval_steps=10 * given.steps,
            save_steps=10 * given.steps,
            lr_scheduler_type=given.schedule,
            learning_rate=given.learning_rate,
        )
        nf4 = measure(config, quantized=True)
        plain = measure(replace(config, output_dir=str(folder / "plain")), quantized=False)
    print(f"\n{'':12}{'before':>9}{'after':>9}")
    for label, (before, after) in (("NF4", nf4), ("16-bit", plain)):
        print(f"{label:12}{before:9.4f}{after:9.4f}")
    print(f"after training NF4 is {nf4[1] / plain[1] - 1:+.2%} from 16-bit")
    record(
        "nf4_against_16bit",
        {
            "model": "SmolLM2-135M-Instruct",
            "steps": given.steps,
            "rows_per_step": given.rows_per_step,
            "schedule": given.schedule,
            "learning_rate": given.learning_rate or "rule",
            "nf4": {"before": nf4[0], "after": nf4[1]},
            "16bit": {"before": plain[0], "after": plain[1]},
            "relative": nf4[1] / plain[1] - 1,
        },
    )


if __name__ == "__main__":
    main()
