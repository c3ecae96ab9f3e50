"""Does the merged checkpoint answer like base + live adapter? Measured, not assumed.

Both models read the same rows. At every supervised position the live model gives a distribution p
over the next token and the merged one q: loss is the mean of -log of the token that really comes,
KL the mean of sum p log(p / q), in nats. The models are held one after the other; what is kept of
the live one is log p at up to MAX_TOKENS positions.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora.adapter_files import AdapterFile, load_adapter
from qlora.adapters import disable_adapter
from qlora.base import load_base
from qlora.checkpoint import Checkpoint
from qlora.data import length_batches, prepare_data
from qlora.errors import UserError, first_line

MAX_TOKENS = 4096  # log p of so many positions over a vocabulary of 128k takes 2 GB
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Verification:
    """Losses and KL are means over `tokens` supervised tokens of `rows` rows, in nats."""

    rows: int
    tokens: int
    loss_base: float
    loss_live: float
    loss_merged: float
    kl: float
    agreement: float
    """share of the tokens for which live and merged model hold the same next token most likely"""

    @property
    def kept(self) -> float:
        """The share of the loss that training gained which the merged model has too."""
        gain = self.loss_base - self.loss_live
        return (self.loss_base - self.loss_merged) / gain if gain else 1.0

    def table(self) -> str:
        """A small table for the terminal."""
        return (
            f"\nMeasured on {self.rows} rows, {self.tokens} supervised tokens:\n"
            f"  {'':24}{'loss':>9}{'gain kept':>12}{'KL to live':>13}{'same top token':>17}\n"
            f"  {'4-bit base':24}{self.loss_base:9.4f}\n"
            f"  {'base + live adapter':24}{self.loss_live:9.4f}{1:12.2%}\n"
            f"  {'merged':24}{self.loss_merged:9.4f}{self.kept:12.2%}{self.kl:13.6f}"
            f"{self.agreement:17.2%}"
        )


def read_examples(data: str, tokenizer_folder: Path) -> list[Any]:
    """Batches of the first rows of `data`, up to MAX_TOKENS supervised tokens, on the CPU."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{tokenizer_folder} holds no tokenizer to verify with: {first_line(error)}"
        ) from error
    rows, _ = prepare_data(data, tokenizer, max_length=MAX_LENGTH)
    chosen: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        tokens += sum(label != -100 for label in row["labels"])
        if chosen and tokens > MAX_TOKENS:
            break
        chosen.append(row)
    return length_batches(chosen, tokenizer)


def verify_merge(
    adapter: AdapterFile,
    base_model: str,
    merged: Path,
    examples: list[Any],
    *,
    device: str,
    trust_remote_code: bool = False,
) -> Verification:
    """Measure the checkpoint in `merged` against `adapter` live on `base_model`.

    Both compute in the dtype of `device`, also where training was done in another.
    """
    quant = replace(adapter.quantization, compute_dtype="auto", allow_unquantized=True)
    live_model = load_base(base_model, quant, device=device, trust_remote_code=trust_remote_code)
    with disable_adapter(load_adapter(live_model, adapter.folder)):
        base = list(_log_probs(live_model, examples, "Base", keep=False))
    live = list(_log_probs(live_model, examples, "Live adapter"))
    dtype = live_model.dtype
    del live_model
    _free()
    if Checkpoint(merged).is_quantized:
        merged_model = load_base(
            str(merged), quant, device=device, trust_remote_code=trust_remote_code
        )
    else:
        merged_model = AutoModelForCausalLM.from_pretrained(
            merged, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code
        )
    kl = loss_merged = 0.0
    same = 0
    pairs = zip(live, _log_probs(merged_model, examples, "Merged"), strict=True)
    for (_, live_log_p), (nll, log_q) in pairs:
        loss_merged += nll
        same += int((log_q.argmax(-1) == live_log_p.argmax(-1)).sum())
        kl += float(F.kl_div(log_q, live_log_p, reduction="sum", log_target=True))
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in examples)
    return Verification(
        rows=sum(len(batch["labels"]) for batch in examples),
        tokens=tokens,
        loss_base=sum(nll for nll, _ in base) / tokens,
        loss_live=sum(nll for nll, _ in live) / tokens,
        loss_merged=loss_merged / tokens,
        kl=kl / tokens,
        agreement=same / tokens,
    )


@torch.no_grad()
def _log_probs(
    model: PreTrainedModel, batches: list[Any], name: str, *, keep: bool = True
) -> Iterator[tuple[float, Tensor]]:
    """For each batch the summed -log p of the real tokens, and log p (tokens, vocab) on the CPU."""
    model.eval()
    for batch in tqdm(batches, desc=name, leave=False):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mask = batch["labels"][:, 1:] != -100
        log_p = F.log_softmax(logits[:, :-1][mask].float(), dim=-1)
        nll = F.nll_loss(log_p, batch["labels"][:, 1:][mask], reduction="sum")
        yield float(nll), log_p.cpu() if keep else torch.empty(0)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
