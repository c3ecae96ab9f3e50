"""The effect of rank, learning rate and targets: "LoRA Without Regret" (2025) on a small model.

    python benchmarks/quality.py --train dev.txt --test test.txt

Full fine-tuning, and LoRA of several ranks and targets, each at the learning rates around its best:
the loss on held-out rows after a fixed number of steps. A run is a JSON line in
results/quality.jsonl, and a recorded run is not repeated: the program can be interrupted and
restarted, with other questions, steps or seeds, and on another machine.

As in the article: alpha 32 / r, a constant rate without warm-up, one epoch at most. Adam has
torch's betas, no weight decay, no clipping; every run of a seed sees the same rows in the same
order. All start from the unquantized model, which full fine-tuning needs: master weights and
adapters in fp32, products in bf16. The data is the E2E NLG challenge in the LoRA paper's format for
GPT-2: lines `facts||sentence` without a chat template, with a loss on the sentence.

Different from the article: its "all layers" includes the output head, ours, as QLoRA's and PEFT's,
does not; full fine-tuning trains it (here it is tied to the embedding).
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from quality_picture import ONE_LAYER, best, by_rate, draw
from results import RESULTS, record, small_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlora.adapters.apply import apply_lora, trainable_parameters
from qlora.base.checkpoint import resolve
from qlora.base.modules import output_head
from qlora.config import LoraConfig
from qlora.data.batches import collator
from qlora.data.rows import prepare_tokenizer
from qlora.files import read_rows
from qlora.training import prepare_for_training
from qlora.training.run import default_learning_rate

FILE = RESULTS / "quality.jsonl"
TEST_ROWS = 64
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PLACES: dict[str, dict[str, Any]] = {
    "all": {},
    "attention": {"target_modules": ATTENTION},
    "mlp": {"target_modules": MLP},
    ONE_LAYER: {"target_modules": MLP, "layers_to_transform": (15,)},
}
# What to train, (place, r), each at all rates around its best. The places of the third question
# have the same number of parameters within 2.2 %.
QUESTIONS = {
    "rate": [("full", 0), ("all", 16)],
    "rank": [("all", 1), ("all", 64)],
    "place": [("all", 16), ("attention", 42), ("mlp", 26)],
}
# What to train for LONG times as many steps, at the best rate of r 16 and at a third of it: r 1
# suffers first from a high rate, and that is not to pass for a lack of capacity. One layer has few
# enough parameters for data to outgrow: 6,336 at r 1, for 46,000 tokens in 400 steps.
CAPACITY = [(ONE_LAYER, r) for r in (1, 16, 64)]
LONG = 4


@dataclass(frozen=True)
class Run:
    """One training run; equal runs give the same loss."""

    model: str
    place: str
    """full, or one of PLACES"""
    r: int
    learning_rate: float
    steps: int
    rows_per_step: int
    seed: int


# ---- the runs


def rate_of(k: int) -> float:
    """The k-th rate of the grid of quarter decades: 1e-4, 1.78e-4, 3.16e-4, 5.62e-4, 1e-3, ..."""
    return float(f"{10 ** (k / 4):.3g}")


def next_k(losses: Mapping[int, float]) -> int | None:
    """The rate to try next: in half decades until the best has a worse one on both sides, then
    halfway to those two, the better one first, until the best has both neighbours."""
    best = min(losses, key=lambda k: losses[k])
    for way in (1, -1):
        if not {best + way, best + 2 * way} & losses.keys():
            return best + 2 * way
    near = [k for k in (best + 1, best - 1) if k not in losses]
    return min(near, key=lambda k: losses[2 * k - best], default=None)


def start(folder: Path, *, full: bool) -> int:
    """The first rate: the default rule's for LoRA, a tenth of it for full fine-tuning."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    rate = default_learning_rate(config.model_type, config.hidden_size)
    return round(4 * math.log10(rate / 10 if full else rate))


def recorded() -> dict[Run, dict[str, Any]]:
    """Every run in the file, with its result."""
    rows = read_rows(FILE)
    return {Run(**{field.name: row[field.name] for field in fields(Run)}): row for row in rows}


def final_loss(row: Mapping[str, Any]) -> float:
    """Held-out loss at the end; infinite for a run that diverged."""
    loss = float(row["test_loss"][-1][1])
    return loss if math.isfinite(loss) else math.inf


# ---- data: ids and labels of the lines of an E2E file


def encode(line: str, tokenizer: Any) -> dict[str, list[int]]:
    """`facts||sentence` -> input_ids, and labels on the sentence and its end alone."""
    facts, sentence = line.split("||", 1)
    prompt = tokenizer(f"{facts} ||")["input_ids"]
    answer = [*tokenizer(f" {sentence.strip()}")["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def batches(rows: Sequence[Any], *, steps: int, size: int, seed: int) -> Iterator[list[Any]]:
    """Batches in a random order, epoch after epoch; rows are sorted by length within 8 batches."""
    generator = torch.Generator().manual_seed(seed)
    pool: list[Any] = []
    ready: list[list[Any]] = []
    for _ in range(steps):
        if not ready:
            while len(pool) < 8 * size:
                pool += [rows[i] for i in torch.randperm(len(rows), generator=generator)]
            window = sorted(pool[: 8 * size], key=lambda row: len(row["input_ids"]))
            del pool[: 8 * size]
            mixed = torch.randperm(8, generator=generator).tolist()
            ready = [window[i * size : (i + 1) * size] for i in mixed]
        yield ready.pop()


# ---- a run


def load(folder: Path, run: Run, device: str) -> PreTrainedModel:
    """The unquantized model in fp32, with the trained parameters of the run."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    if run.place != "full":
        config = LoraConfig(r=run.r, lora_alpha=32, adapter_dtype="fp32", **PLACES[run.place])
        apply_lora(model, config, generator=torch.Generator().manual_seed(run.seed))
    return prepare_for_training(model, gradient_checkpointing=False)


def answer_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross-entropy of the supervised tokens, and their number.

    Rows are padded on the right of a causal model, so no mask is needed; logits are computed only
    for supervised tokens, which saves a small model a fifth of its computation.
    """
    device = model.device
    input_ids, labels = batch["input_ids"].to(device), batch["labels"][:, 1:].to(device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.get_decoder()(input_ids=input_ids).last_hidden_state[:, :-1]
        logits = output_head(model)(hidden[labels != -100])
    labels = labels[labels != -100]
    return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)


@torch.no_grad()
def evaluate(model: PreTrainedModel, test: Sequence[Mapping[str, Tensor]]) -> float:
    """Loss per supervised token, in nats."""
    found = [answer_loss(model, batch) for batch in test]
    return float(sum(loss for loss, _ in found)) / sum(tokens for _, tokens in found)


class Lab:
    """The state that runs share: model, data, and earlier records."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.folder = resolve(given.model or str(small_model()))
        self.name = Path(given.model).name if given.model else "SmolLM2-135M-Instruct"
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        prepare_tokenizer(tokenizer)
        self.collate = collator(tokenizer)
        self.train, lines = (
            [encode(line, tokenizer) for line in path.read_text(encoding="utf-8").splitlines()]
            for path in (given.train, given.test)
        )
        lines = lines[:: max(1, len(lines) // TEST_ROWS)][:TEST_ROWS]
        lines.sort(key=lambda row: len(row["input_ids"]))  # less padding
        self.test = [self.collate(lines[i : i + 8]) for i in range(0, len(lines), 8)]

    def loss(self, place: str, r: int, k: int, *, times: int = 1) -> float:
        """Held-out loss after `times` the steps at the k-th rate, from the records or a new run."""
        given = self.given
        steps = times * given.steps
        run = Run(self.name, place, r, rate_of(k), steps, given.rows_per_step, given.seed)
        row = recorded().get(run)
        if row is None:
            row = self.measure(run)
            record(FILE.stem, {**asdict(run), **row})
            print(f"{place:16} r {r:<4}{rate_of(k):10.2g}{final_loss(row):9.4f}", flush=True)
        return final_loss(row)

    def best_k(self, place: str, r: int) -> int:
        """The best rate of the grid."""
        losses: dict[int, float] = {}
        k = start(self.folder, full=place == "full")
        while k is not None:
            losses[k] = self.loss(place, r, k)
            k = next_k(losses)
        return min(losses, key=lambda k: losses[k])

    def rows(self) -> list[dict[str, Any]]:
        """Every run of this model, batch size and seed, new or recorded."""
        own = (self.name, self.given.rows_per_step, self.given.seed)
        found = recorded().items()
        return [row for run, row in found if (run.model, run.rows_per_step, run.seed) == own]

    def measure(self, run: Run) -> dict[str, Any]:
        """Train; the held-out loss after 25, 50, 100, 200, ... steps and the last."""
        model = load(self.folder, run, self.given.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0, fused=True)
        curve, seen = [], 0
        order = batches(self.train, steps=run.steps, size=run.rows_per_step, seed=run.seed)
        for step, rows in enumerate(order, start=1):
            loss, tokens = answer_loss(model, self.collate(rows))
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += tokens
            if step == run.steps or (step >= 25 and math.log2(step / 25).is_integer()):
                curve.append((step, evaluate(model, self.test)))
        trained = trainable_parameters(model)[0]
        return {"parameters": trained, "trained_tokens": seen, "test_loss": curve}


def main() -> None:
    """Perform all runs that are not recorded, print a table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", help="by default SmolLM2-135M-Instruct, out of its wheel")
    questions = [*QUESTIONS, "capacity"]
    parser.add_argument("--questions", nargs="+", choices=questions, default=questions)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    lab = Lab(given)
    for question in given.questions:
        for place, r in QUESTIONS.get(question, ()):
            lab.best_k(place, r)
    if "capacity" in given.questions:
        k = lab.best_k(ONE_LAYER, 16)
        for lower in (0, 2):
            for place, r in CAPACITY:
                lab.loss(place, r, k - lower, times=LONG)
    rows = lab.rows()
    print(f"\n{'':24}{'best rate':>10}{'loss':>9}   after {given.steps} steps")
    for place, r in sorted({(row["place"], row["r"]) for row in rows}):
        if curve := by_rate(rows, place, r, given.steps):
            rate, loss = best(curve)
            print(f"{place:16} r {r:<6}{rate:10.3g}{loss:9.4f}")
    draw(rows, FILE.with_suffix(".png"), steps=given.steps)


if __name__ == "__main__":
    main()
