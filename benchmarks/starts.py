"""Initial and trained loss of each initialisation, also on the bases that other programs use.

    python benchmarks/starts.py --steps 24

SmolLM2-135M-Instruct and the demo's data: initial held-out loss and KL from the 16-bit model,
seconds of the initialisation, and held-out loss after some steps. An adapter whose base was changed
is measured three times: as trained, as a plain adapter on the plain NF4 base, and on the 16-bit
base, as other programs load it.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import record, small_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import attach
from qlora.adapters.format import read_adapter
from qlora.base.checkpoint import resolve
from qlora.base.load import load_base
from qlora.config import DataConfig, LoraConfig, QuantConfig, TrainConfig
from qlora.data.batches import length_batches
from qlora.data.rows import prepare_data, prepare_tokenizer
from qlora.training import train

DATA = Path(__file__).parent.parent / "demo"
QUANT = QuantConfig(compute_dtype="fp32")
STARTS: dict[str, dict[str, Any]] = {
    "true": {"init_lora_weights": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "loftq T=1": {"init_lora_weights": "loftq"},
    "loftq T=5": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


def read(name: str) -> list[Any]:
    """The demo's rows, in batches."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(small_model())))
    prepare_tokenizer(tokenizer)
    rows, _ = prepare_data(str(DATA / name), tokenizer, max_length=256)
    return length_batches(rows, tokenizer)


@torch.no_grad()
def log_probs(model: Any, batches: list[Any]) -> tuple[float, list[Tensor]]:
    """The loss per supervised token, and the log-probabilities of the vocabulary."""
    model.eval()
    found, loss, tokens = [], 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        log_p = F.log_softmax(logits[:, :-1][labels != -100].float(), dim=-1)
        loss += float(F.nll_loss(log_p, labels[labels != -100], reduction="sum"))
        tokens += len(log_p)
        found.append(log_p)
    return loss / tokens, found


def start(lora: LoraConfig, held_out: list[Any], wanted: list[Tensor]) -> dict[str, float]:
    """Loss and KL of the model with a new adapter."""
    model = load_base(str(small_model()), QUANT)
    data = read("train.jsonl")[::3] if lora.init_lora_weights == "eva" else None
    began = time.perf_counter()
    apply_lora(model, lora, generator=torch.Generator().manual_seed(0), data=data)
    seconds = time.perf_counter() - began
    loss, found = log_probs(model, held_out)
    pairs = zip(wanted, found, strict=True)
    kl = sum(float(F.kl_div(q, p, reduction="sum", log_target=True)) for p, q in pairs)
    return {"seconds": seconds, "loss": loss, "kl": kl / sum(map(len, wanted))}


def learn(lora: LoraConfig, folder: Path, steps: int, rate: float | None) -> None:
    """Train a short run; its adapter is saved in `folder`."""
    data = DataConfig(str(DATA / "train.jsonl"), max_length=256)
    settings = {"max_steps": steps, "save_steps": steps, "per_device_train_batch_size": 4}
    config = TrainConfig(str(small_model()), str(folder), data, lora=lora, quant=QUANT)
    settings |= {"gradient_accumulation_steps": 1, "learning_rate": rate, "samples": 0}
    train(replace(config, **settings, gradient_checkpointing=False))


def losses(folder: Path, held_out: list[Any]) -> dict[str, float]:
    """Held-out loss of the adapter in `folder` on each base that it may be loaded onto."""
    adapter = read_adapter(folder)
    places = {"as trained": (adapter, True)}
    if adapter.subtracted:
        plain = replace(adapter, subtracted={})
        places |= {"over plain NF4": (plain, True), "over 16 bits": (plain, False)}
    found = {}
    for place, (own, in_4_bits) in places.items():
        model: Any = load_base(str(small_model()), QUANT) if in_4_bits else full()
        attach(model, own)
        found[place] = log_probs(model, held_out)[0]
    return found


def full() -> Any:
    """The model before quantization."""
    return AutoModelForCausalLM.from_pretrained(resolve(str(small_model())), dtype=torch.float32)


def main() -> None:
    """Print and record each initialisation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, default=32)
    parser.add_argument("--learning-rate", type=float)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    held_out = read("test.jsonl")
    loss, wanted = log_probs(full(), held_out)
    lines = [f"{'16 bits':10} loss {loss:.4f}"]
    for name in given.starts:
        lora = LoraConfig(r=given.r, lora_alpha=given.lora_alpha, **STARTS[name])
        row: dict[str, Any] = {"start": start(lora, held_out, wanted), "learned": {}}
        if given.steps:
            with tempfile.TemporaryDirectory() as folder:
                learn(lora, Path(folder) / "run", given.steps, given.learning_rate)
                row["learned"] = losses(Path(folder) / "run", held_out)
        lines.append(
            "{:10} loss {loss:.4f}, KL {kl:.5f}, {seconds:5.1f} s".format(name, **row["start"])
            + "".join(f"; {place} {loss:.4f}" for place, loss in row["learned"].items())
        )
        settings = {key: vars(given)[key] for key in ("steps", "r", "lora_alpha", "learning_rate")}
        record("starts", {"model": "SmolLM2-135M-Instruct", "init": name, **settings, **row})
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
