"""Updates that bf16 adapters lose to rounding, and their effect: fp32, bf16, compensated bf16.

    python benchmarks/adapter_dtype.py --seeds 0 1 2
    python benchmarks/adapter_dtype.py --train dev.txt --test test.txt --steps 300 --seeds 0 1

Without data: one linear layer is trained toward itself plus a low-rank change; its loss is relative
to the initial loss. With data: SmolLM2-135M-Instruct in NF4, computing in bf16, on E2E's lines
`facts||sentence`. All three start from the same bf16 values; the rate decays to zero. An update is
lost where the gradient is not zero and the parameter does not change in the step.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from datasets import disable_progress_bars
from nf4_against_16bit import as_jsonl
from results import record, small_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from qlora.adapters.apply import apply_lora
from qlora.adapters.lora import LoRALinear
from qlora.base.checkpoint import resolve
from qlora.base.load import load_base
from qlora.config import LoraConfig, QuantConfig
from qlora.data.batches import collator, length_batches
from qlora.data.rows import prepare_data, prepare_tokenizer
from qlora.training import prepare_for_training
from qlora.training.optimizers import join, keep_updates

WAYS = ("fp32", "bf16", "bf16 kept")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_8bit": bnb.optim.AdamW8bit,
    "adamw_32bit": bnb.optim.AdamW,
    "adamw_torch": torch.optim.AdamW,
}
MAX_LENGTH = 128
HELD_OUT = 48  # rows


class Run:
    """A model's adapters, trained in one of the three ways, with counts of lost updates."""

    def __init__(self, model: nn.Module, way: str, given: argparse.Namespace) -> None:
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.given = given
        plain = OPTIMIZERS[given.optim](self.named.values(), lr=given.learning_rate, weight_decay=0)
        self.optimizer = keep_updates(plain) if way == "bf16 kept" else plain
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, given.steps)
        self.lost: list[dict[str, float]] = []

    def values(self) -> dict[str, Tensor]:
        """Copies of the parameters as the optimizer sees them."""
        found = {}
        for name, p in self.named.items():
            lower = getattr(self.optimizer, "lower", {}).get(p)
            flat = p.detach().reshape(-1)
            found[name] = flat.clone() if lower is None else join(flat, lower[0])
        return found

    def step(self) -> None:
        """Take one step; some steps are compared with their parameters before."""
        nn.utils.clip_grad_norm_(self.named.values(), 0.3)
        looked_at = len(self.lost) * self.given.steps // 20 <= self.schedule.last_epoch
        before = self.values() if looked_at else {}
        self.optimizer.step()
        if looked_at:
            after, lost, count = self.values(), {"A": 0, "B": 0}, {"A": 0, "B": 0}
            for name, p in self.named.items():
                side, wanted = "A" if "lora_A" in name else "B", p.grad.reshape(-1) != 0
                lost[side] += int((wanted & (before[name] == after[name].to(before[name]))).sum())
                count[side] += int(wanted.sum())
            self.lost.append({side: lost[side] / max(1, count[side]) for side in lost})
        self.optimizer.zero_grad()
        self.schedule.step()

    def lost_shares(self) -> dict[str, list[float]]:
        """Lost share of A's and B's updates, in each twentieth of the run."""
        return {side: [round(row[side], 4) for row in self.lost] for side in ("A", "B")}


def rounded_start(model: nn.Module, way: str) -> nn.Module:
    """Set the same bf16 initial values, in the dtype of this way."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
            p.data = p.data.float() if way == "fp32" else p.data
    return model


# ---- a layer ----


def regression(way: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train W + scaling B A toward W plus a change of rank 8 with a tenth of W's norm."""
    draw = torch.Generator().manual_seed(seed)
    size, rank = 256, 8
    frozen = nn.Linear(size, size, bias=False).requires_grad_(False)
    frozen.weight.copy_(torch.randn(size, size, generator=draw) / size**0.5)
    factors = (torch.randn(*shape, generator=draw) for shape in ((size, rank), (rank, size)))
    change = torch.mm(*factors) * 0.1 / (rank * size) ** 0.5
    layer = LoRALinear(frozen)
    layer.add_adapter("default", LoraConfig(r=16, lora_alpha=32), generator=draw)
    layer.active_adapters = ("default",)
    run = Run(rounded_start(layer, way), way, given)
    losses = []
    for _ in range(given.steps):
        x = torch.randn(64, size, generator=draw)
        loss = F.mse_loss(layer(x), F.linear(x, frozen.weight + change))
        loss.backward()
        run.step()
        losses.append(float(loss.detach()))
    tenth = max(1, given.steps // 10)
    start = float((change @ change.T).trace() / size)
    ends = [sum(losses[i : i + tenth]) / tenth / start for i in range(0, given.steps, tenth)]
    return {"loss": ends, "lost": run.lost_shares()}


# ---- a model ----


def batches(rows: Any, tokenizer: Any, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows in a random order, epoch after epoch."""
    draw, collate = torch.Generator().manual_seed(seed), collator(tokenizer)
    while True:
        order = torch.randperm(len(rows), generator=draw).tolist()
        for i in range(0, len(order) - size + 1, size):
            yield collate([rows[j] for j in order[i : i + size]])


@torch.no_grad()
def held_out_loss(model: Any, found: list[Any]) -> float:
    """Loss per supervised token."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in found:
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(loss_of(model, batch)) * count
        tokens += count
    model.train()
    return total / tokens


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss over the supervised tokens, without keeping logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return model(**inputs).loss  # type: ignore[no-any-return]


def language_model(way: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss before, at each half, and after."""
    model: Any = load_base(str(small_model()), QuantConfig(compute_dtype="bf16"))
    dtype = "fp32" if way == "fp32" else "bf16"
    lora = LoraConfig(r=given.r, lora_alpha=32, adapter_dtype=dtype)
    apply_lora(model, lora, generator=torch.Generator().manual_seed(seed))
    prepare_for_training(rounded_start(model, way), gradient_checkpointing=False)
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(small_model())))
    prepare_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as name:
        sources = [as_jsonl(given.train, Path(name) / "a.jsonl", 2000)]
        sources += [as_jsonl(given.test, Path(name) / "b.jsonl", HELD_OUT)]
        rows, held = (prepare_data(str(s), tokenizer, max_length=MAX_LENGTH)[0] for s in sources)
    held_out = length_batches(held, tokenizer)
    run, train_losses = Run(model, way, given), []
    evaluated = [held_out_loss(model, held_out)]
    supply = batches(rows, tokenizer, given.rows, seed)
    for step in range(1, given.steps + 1):
        loss = loss_of(model, next(supply))
        loss.backward()
        run.step()
        train_losses.append(float(loss.detach()))
        if step % max(1, given.steps // 2) == 0:
            evaluated.append(held_out_loss(model, held_out))
    half = max(1, given.steps // 2)
    train = [sum(train_losses[i : i + half]) / half for i in range(0, given.steps, half)]
    return {"loss": evaluated, "train": train, "lost": run.lost_shares()}


def main() -> None:
    """Print and record each way and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--optim", default="adamw_8bit", choices=list(OPTIMIZERS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    settings = {n: vars(given)[n] for n in ("steps", "rows", "r", "learning_rate", "optim")}
    for seed in given.seeds:
        for way in given.ways:
            began = time.perf_counter()
            row = (language_model if given.train else regression)(way, seed, given)
            row["loss"] = [round(loss, 5) for loss in row["loss"]]
            seconds = round(time.perf_counter() - began, 1)
            on = "SmolLM2-135M-Instruct" if given.train else "a layer"
            print(json.dumps({"way": way, "seed": seed, "seconds": seconds, **row}), flush=True)
            record("adapter_dtype", {"on": on, "way": way, "seed": seed, **settings, **row})


if __name__ == "__main__":
    main()
