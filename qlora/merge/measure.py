"""The parts of a merge that run the model: verification and calibration.

Verification compares the merged checkpoint with base + live adapter on the same rows. With p and q
their distributions of the next token at a supervised position, loss is the mean of -log of the true
token's probability, KL the mean of sum p log(p / q), in nats. One model is in memory at a time; of
the live one, log p at up to MAX_TOKENS positions is kept.

Calibration collects the second moments of the inputs of each adapted linear layer
(qlora.adapters.starts) in the model as trained, the 4-bit base with its live adapter. Without data
the model samples its own text, as LLM-QAT does (arXiv:2305.17888).
"""

import gc
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora.adapters.files import attach
from qlora.adapters.format import AdapterFile
from qlora.adapters.live import load_live
from qlora.adapters.lora import LoRALinear, lora_layers
from qlora.adapters.starts import SecondMoments
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_base, load_tokenizer
from qlora.config import MAX_LENGTH, QuantConfig
from qlora.data.chat_template import NO_LOSS
from qlora.data.rows import length_batches, prepare_data, prepare_tokenizer

MAX_TOKENS = 4096  # log p at that many positions takes 2 GB with a vocabulary of 128k
MIN_TOKENS = 8192  # for calibration: more made no measurable difference
TOKENS_PER_INPUT = 4  # of the widest layer: with fewer than 1 its moments are singular
OWN_TEXT = "self"
OWN_LENGTH = 128
OWN_BATCH = 64


# ---- verification ----


@dataclass(frozen=True)
class Verification:
    """Means over `tokens` supervised tokens of `rows` rows; losses and KL in nats."""

    rows: int
    tokens: int
    loss_base: float
    loss_live: float
    loss_merged: float
    kl: float
    """between the live and the merged model"""
    kl_base: float
    """between the live model and the base: how far the adapter moved it"""
    agreement: float
    """share of positions with the same most likely token in the live and the merged model"""

    @property
    def kept(self) -> float | None:
        """The share of training's gain in loss that the merged model has; None without a gain."""
        gain = self.loss_base - self.loss_live
        return (self.loss_base - self.loss_merged) / gain if gain > 0 else None


def read_examples(
    data: str,
    tokenizer_folder: Path,
    max_tokens: int = MAX_TOKENS,
    *,
    trust_remote_code: bool = False,
) -> list[Any]:
    """Batches of the first rows of `data`, up to `max_tokens` supervised tokens, on the CPU."""
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
    prepare_tokenizer(tokenizer)
    rows, _ = prepare_data(data, tokenizer, max_length=MAX_LENGTH)
    chosen: list[Any] = []
    tokens = 0
    for row in rows:
        tokens += sum(label != NO_LOSS for label in row["labels"])
        if chosen and tokens > max_tokens:
            break
        chosen.append(row)
    return length_batches(chosen, tokenizer)


@dataclass
class Verifier:
    """Measures merged checkpoints against `adapter` live on `base`; the latter run once.

    All models compute in `compute_dtype`, by default that of `device`, not of training.
    """

    adapter: AdapterFile
    base: str | Checkpoint
    examples: list[Any]
    _: KW_ONLY
    device: str
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    trust_remote_code: bool = False

    def measure(self, merged: Path) -> Verification:
        """Loss, KL and agreement of the checkpoint in the folder `merged`."""
        means, live, dtype = self._live
        loading: Any = {"trust_remote_code": self.trust_remote_code}
        if Checkpoint(merged).is_quantized:
            quant = QuantConfig(compute_dtype=self.compute_dtype)
            model = load_base(Checkpoint(merged), quant, device=self.device, **loading)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                merged, dtype=dtype, device_map=self.device, **loading
            )
        kl = loss = 0.0
        same = 0
        for log_p, (nll, log_q) in zip(live, self._log_probs(model, "Merged"), strict=True):
            loss += nll
            same += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            kl += _kl(log_p, log_q)
        tokens = sum(map(len, live))
        return Verification(
            rows=sum(len(batch["labels"]) for batch in self.examples),
            tokens=tokens,
            **means,
            loss_merged=loss / tokens,
            kl=kl / tokens,
            agreement=same / tokens,
        )

    @cached_property
    def _live(self) -> tuple[dict[str, float], list[Tensor], torch.dtype]:
        """loss_base, loss_live and kl_base; each batch's log p (tokens, vocab); the dtype."""
        quant = replace(
            self.adapter.quantization, compute_dtype=self.compute_dtype, allow_unquantized=True
        )
        # not load_live: the base is measured before the adapter is attached
        trusted = self.trust_remote_code
        model = load_base(self.base, quant, device=self.device, trust_remote_code=trusted)
        base = deque(self._log_probs(model, "Base"))
        attach(model, self.adapter)
        sums = dict.fromkeys(("loss_base", "loss_live", "kl_base"), 0.0)
        live = []
        for nll, log_p in self._log_probs(model, "Live adapter"):
            nll_base, log_base = base.popleft()  # popped to free it early
            sums["loss_base"] += nll_base
            sums["loss_live"] += nll
            sums["kl_base"] += _kl(log_p, log_base)
            live.append(log_p)
        dtype = model.dtype
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = sum(map(len, live))
        return {name: total / tokens for name, total in sums.items()}, live, dtype

    @torch.no_grad()
    def _log_probs(self, model: PreTrainedModel, name: str) -> Iterator[tuple[float, Tensor]]:
        """Of each batch: sum of -log p of the true tokens; log p (tokens, vocab) on the CPU."""
        model.eval()
        for batch in tqdm(self.examples, desc=name, leave=False):
            ids, mask, labels = (
                batch[key].to(model.device) for key in ("input_ids", "attention_mask", "labels")
            )
            supervised = labels[:, 1:] != NO_LOSS
            logits = model(input_ids=ids, attention_mask=mask).logits
            logits = logits[:, :-1][supervised]  # (B, T, vocab) -> (tokens, vocab)
            log_p = F.log_softmax(logits.float(), dim=-1)
            nll = F.nll_loss(log_p, labels[:, 1:][supervised], reduction="sum")
            yield float(nll), log_p.cpu()


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    return float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))


# ---- calibration ----


def calibrate(
    adapter: AdapterFile,
    base: str | Checkpoint,
    data: Sequence[str],
    tokenizer_folder: Path,
    *,
    device: str,
    trust_remote_code: bool = False,
) -> SecondMoments:
    """Second moments of `adapter`'s layers, live on `base`, over rows spread over `data`.

    Args:
        data: sources for `prepare_data`, each for an equal share of tokens; or OWN_TEXT.

    Raises:
        UserError: the data cannot be read, or the adapter does not fit.
    """
    samples_text = list(data) == [OWN_TEXT]
    if not samples_text:  # read first: loading the model takes longer
        tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
        prepare_tokenizer(tokenizer)
        sources = [prepare_data(source, tokenizer, max_length=MAX_LENGTH) for source in data]
    model = load_live(base, adapter, device=device, trust_remote_code=trust_remote_code)
    layers = {n: layer for n, layer in lora_layers(model).items() if isinstance(layer, LoRALinear)}
    widest = max(layer.shape[1] for layer in layers.values())
    tokens = max(MIN_TOKENS, TOKENS_PER_INPUT * widest)
    if samples_text:
        return SecondMoments(model, own_text(model, tokens), layers)
    chosen = []
    for rows, stats in sources:
        step = max(1, stats.tokens * len(sources) // tokens)
        chosen += [rows[i] for i in range(0, len(rows), step)]
    return SecondMoments(model, length_batches(chosen, tokenizer), layers)


@torch.no_grad()
def own_text(model: PreTrainedModel, tokens: int) -> list[dict[str, Tensor]]:
    """At least `tokens` tokens that `model` samples after its bos token, with a fixed seed."""
    config = model.generation_config
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    first = first[0] if isinstance(first, list) else first or 0
    batches = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        rows = math.ceil(tokens / OWN_LENGTH)
        for done in tqdm(range(0, rows, OWN_BATCH), desc="Sampling calibration text", leave=False):
            start = torch.full((min(OWN_BATCH, rows - done), 1), first, device=model.device)
            ids = model.generate(  # type: ignore[operator]  # of a mixin that is not typed
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=OWN_LENGTH - 1,
                min_new_tokens=OWN_LENGTH - 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=first,
            )
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches
