"""The parts of a merge that run the model: verification and calibration.

Verification compares the merged checkpoint with base + live adapter on the same rows. With p and q
their distributions of the next token at a supervised position, loss is the mean of -log of the true
token's probability, KL the mean of sum p log(p / q), in nats. One model is in memory at a time; of
the others, the output head and its inputs at up to MAX_TOKENS positions are kept, from which log p
is computed again in chunks of tokens.

A GGUF file runs in llama.cpp (qlora.merge.llamacpp), which tells the TOP most likely tokens of a
position, and the whole vocabulary where the true token is not among them. KL is then that of these
tokens, with the rest as one more: a lower bound. Without the wheel xllamacpp, transformers runs the
file's dequantized weights.

Calibration collects the second moments of the inputs of each adapted linear layer
(qlora.adapters.starts) in the model as trained, the base, mostly in 4 bits, with its live adapter.
Without data the model samples its own text, as LLM-QAT does (arXiv:2305.17888).
"""

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from qlora.adapters.files import attach
from qlora.adapters.format import AdapterFile
from qlora.adapters.live import load_live, load_plain
from qlora.adapters.lora import LoRALinear, lora_layers
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_base, load_tokenizer
from qlora.base.modules import output_head, vocabulary
from qlora.cli import Progress
from qlora.config import MAX_LENGTH, QuantConfig
from qlora.data.batches import length_batches
from qlora.data.chat_template import NO_LOSS
from qlora.data.chats import AS_IT_IS, reading_in
from qlora.data.rows import prepare_data, prepare_tokenizer
from qlora.errors import UserError, first_line
from qlora.fast.head import put_language_head, rows_and_head
from qlora.merge import llamacpp
from qlora.merge.streams import Calibration
from qlora.ops.loss import Head, chunk_rows

MAX_TOKENS = 4096
GGUF_TOKENS = 2048  # each a call of llama.cpp
TOP = 512  # the whole vocabulary of 49,152 takes 40 times as long a call
# for calibration: at least, and for each input of the widest layer (with fewer than 1 its moments
# are singular). Where all weights move, more than 8,192 lower the KL divergence by an eighth.
TOKENS, TOKENS_IN_SEQUENCE = (4096, 2), (16384, 4)
OWN_TEXT = "self"
OWN_LENGTH = 128
OWN_BATCH = 64
IN_LLAMACPP = "in llama.cpp"
DEQUANTIZED = "dequantized, in transformers"
INSTALL = "pip install xllamacpp"
ROUNDED = 1e-6  # a sum of probabilities in fp32 is this near to 1


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
    """between the live and the merged model; in llama.cpp a lower bound"""
    kl_base: float
    """between the live model and the base: how far the adapter moved it"""
    agreement: float
    """share of positions with the same most likely token in the live and the merged model"""
    program: str | None = None
    """that ran the merged model, where it is no checkpoint of transformers"""

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
    vocabulary: int | None = None,
    trust_remote_code: bool = False,
    adapter: Path | None = None,
) -> list[Any]:
    """Batches of the first rows of `data`, up to `max_tokens` supervised tokens, on the CPU.

    `adapter` is the folder of one whose run.yaml tells how chats are read.
    """
    reading = reading_in(adapter) if adapter else AS_IT_IS
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
    prepare_tokenizer(tokenizer)
    options: Any = {"max_length": MAX_LENGTH, "vocabulary": vocabulary, "reading": reading}
    rows, stats = prepare_data(data, tokenizer, split="evaluation", **options)
    for note in stats.notes:
        print(note)
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
    in_4_bits: bool = True  # whether the adapter was trained on a base in 4 bits
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    trust_remote_code: bool = False

    def measure(self, merged: Path) -> Verification:
        """Loss, KL and agreement of the checkpoint, or the one .gguf file, in the folder `merged`.

        Raises:
            UserError: llama.cpp, or without xllamacpp transformers, cannot run the .gguf file.
        """
        means, live, dtype = self._live
        loading: Any = {"dtype": dtype, "device_map": self.device}
        trusted: Any = {"trust_remote_code": self.trust_remote_code}
        program, model = None, None
        file = next(merged.glob("*.gguf"), None)
        if file and llamacpp.is_installed():
            program = IN_LLAMACPP
        elif file:
            program, model = DEQUANTIZED, _dequantized(file, loading)
        elif Checkpoint(merged).is_quantized:
            quant = QuantConfig(compute_dtype=self.compute_dtype)
            model = load_base(Checkpoint(merged), quant, device=self.device, **trusted)
        else:
            model = AutoModelForCausalLM.from_pretrained(merged, **loading, **trusted)
        if model is not None:
            _, loss, kl, same, tokens = _means(live, self._outputs(model, "Merged"))
        elif file:
            loss, kl, same, tokens = _means_in_llamacpp(live, self.examples, file, self.device)
        return Verification(
            rows=sum(len(batch["labels"]) for batch in self.examples),
            tokens=int(tokens),
            **means,
            loss_merged=loss,
            kl=kl,
            agreement=same,
            program=program,
        )

    @cached_property
    def _live(self) -> tuple[dict[str, float], list["_Outputs"], torch.dtype]:
        """loss_base, loss_live and kl_base; the live model's outputs; the dtype."""
        quant = replace(
            self.adapter.quantization, compute_dtype=self.compute_dtype, allow_unquantized=True
        )
        # not load_live: the base is measured before the adapter is attached
        known: Any = {"device": self.device, "trust_remote_code": self.trust_remote_code}
        model = load_plain(self.base, self.adapter, quant, self.in_4_bits, **known)
        base = list(self._outputs(model, "Base"))
        if vocabulary(model)[1] in self.adapter.subtracted:  # attaching changes it in place
            head = output_head(model)
            head.weight.data = head.weight.clone()
        attach(model, self.adapter)
        live = list(self._outputs(model, "Live adapter"))
        loss_live, loss_base, kl_base, *_ = _means(live, base)
        dtype = model.dtype
        del model, base
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        means = {"loss_base": loss_base, "loss_live": loss_live, "kl_base": kl_base}
        return means, live, dtype

    @torch.no_grad()
    def _outputs(self, model: PreTrainedModel, name: str) -> Iterator["_Outputs"]:
        """What the model computes for each batch."""
        put_language_head(model.eval().requires_grad_(False))
        for batch in Progress(self.examples, desc=name):
            ids, mask, labels = (
                batch[key].to(model.device) for key in ("input_ids", "attention_mask", "labels")
            )
            supervised = labels[:, 1:] != NO_LOSS
            rows, head = rows_and_head(model(input_ids=ids, attention_mask=mask).logits)
            yield _Outputs(rows[:, :-1][supervised], head, labels[:, 1:][supervised])


class _Outputs(NamedTuple):
    """The next token's distribution at the supervised positions of a batch."""

    rows: Tensor  # (tokens, dim), the head's input
    head: Head
    labels: Tensor  # (tokens,)


@torch.no_grad()
def _means(one: Iterable[_Outputs], other: Iterable[_Outputs]) -> tuple[float, ...]:
    """Means of -log p of the labels in each, of the KL between them, and of whether the most likely
    token is the same; and the number of tokens."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for p, q in zip(one, other, strict=True):
        for tokens in _chunks(p):
            log_p, log_q = (F.log_softmax(x.head.logits(x.rows[tokens]), -1) for x in (p, q))
            losses = (F.nll_loss(x, p.labels[tokens], reduction="sum") for x in (log_p, log_q))
            kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            same = (log_q.argmax(-1) == log_p.argmax(-1)).sum()
            sums += torch.stack([*losses, kl, same]).double().cpu()
        count += len(p.labels)
    return *(sums / count).tolist(), count


def _chunks(outputs: _Outputs) -> tuple[Tensor, ...]:
    """The indices of the tokens, in parts whose distributions fit in memory."""
    vocab = outputs.head.logits(outputs.rows[:1]).shape[-1]
    chunk = max(1, chunk_rows(outputs.rows.new_empty(vocab, 0)) // 4)  # six tensors of its size
    tokens = torch.arange(len(outputs.labels), device=outputs.labels.device)
    return tokens.split(chunk)  # type: ignore[no-any-return]


# ---- verification of a .gguf file ----


def _dequantized(file: Path, loading: Any) -> PreTrainedModel:
    """The model of a .gguf file in transformers, which dequantizes it."""
    print(f"Without the package xllamacpp, {file.name} is measured dequantized, in transformers:")
    print(f"llama.cpp itself also rounds each layer's inputs. {INSTALL} measures it there.")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True),
            **loading,
        )  # fmt: skip
    except (ValueError, NotImplementedError, KeyError) as error:  # of its parser
        raise UserError(
            f"transformers cannot read {file.name} ({first_line(error)}): {INSTALL} measures it "
            "in llama.cpp"
        ) from error
    return model


@torch.no_grad()
def _means_in_llamacpp(
    live: Iterable[_Outputs], examples: list[Any], file: Path, device: str
) -> tuple[float, ...]:
    """Means of the loss of `file`, of the KL from `live` to it and of whether the most likely token
    is the same; and the number of tokens."""
    sums = torch.zeros(3, dtype=torch.float64)
    prefixes = [
        ids[:end]  # pads are on the right
        for batch in examples
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        for end in (labels[1:] != NO_LOSS).nonzero()[:, 0] + 1
    ]
    longest = max(map(len, prefixes))
    remaining = iter(prefixes)
    bar = Progress(total=len(prefixes), desc="Merged, in llama.cpp")
    with bar, llamacpp.LlamaCpp(file, context=longest + 1, device=device) as model:
        for p, tokens in ((one, tokens) for one in live for tokens in _chunks(one)):
            log_ps = F.log_softmax(p.head.logits(p.rows[tokens]), -1).double().cpu()
            labels = p.labels[tokens].tolist()
            for log_p, label, prefix in zip(log_ps, labels, remaining, strict=False):
                ids, log_q = model.next_token(prefix.tolist(), TOP)
                if label not in ids:
                    ids, log_q = model.next_token(prefix.tolist(), len(log_p))
                kl = _kl_of_top(log_p, torch.tensor(ids), torch.tensor(log_q).double())
                same = ids[0] == int(log_p.argmax())
                sums += torch.tensor([-log_q[ids.index(label)], kl, same]).double()
                bar.update()
    return *(sums / len(prefixes)).tolist(), len(prefixes)


def _kl_of_top(log_p: Tensor, ids: Tensor, log_q: Tensor) -> float:
    """KL of log_p (vocab,) to the log-probabilities log_q of `ids`, the rest as one more token."""
    known = ids < len(log_p)  # a file may have more rows than the model
    log_p, log_q = log_p[ids[known]], log_q[known]
    kl = (log_p.exp() * (log_p - log_q)).sum()
    rest_p, rest_q = (max(0.0, 1 - float(x.exp().sum())) for x in (log_p, log_q))
    if rest_p > ROUNDED:
        kl += rest_p * math.log(rest_p / max(rest_q, ROUNDED))
    return float(kl)


# ---- calibration ----


def calibrate(
    adapter: AdapterFile,
    base: str | Checkpoint,
    data: Sequence[str],
    tokenizer_folder: Path,
    *,
    device: str,
    tokens: int | None = None,
    in_sequence: bool = True,
    in_4_bits: bool = True,
    vocabulary: int | None = None,
    trust_remote_code: bool = False,
) -> Calibration:
    """Moments of `adapter`'s layers, live on `base`, over rows spread over `data`.

    Args:
        data: sources for `prepare_data`, each for an equal share of tokens; or OWN_TEXT.
        tokens: about how many; None: as many as the widest layer needs.
        in_sequence: whether `chose` will tell the weights, for a grid of integers.
        in_4_bits: whether `adapter` was trained on the base in 4 bits.
        vocabulary: the rows of the model's embedding, for `prepare_data`.

    Raises:
        UserError: the data cannot be read, or the adapter does not fit.
    """
    samples_text = list(data) == [OWN_TEXT]
    if not samples_text:  # read first: loading the model takes longer
        tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
        prepare_tokenizer(tokenizer)
        limits: Any = {"max_length": MAX_LENGTH, "vocabulary": vocabulary}
        limits["reading"] = reading_in(adapter.folder)
        sources = [prepare_data(source, tokenizer, **limits) for source in data]
        for note in (note for _, stats in sources for note in stats.notes):
            print(note)
    trusted = trust_remote_code
    live: Any = {"in_4_bits": in_4_bits, "device": device, "trust_remote_code": trusted}
    model = load_live(base, adapter, **live)
    layers = {n: layer for n, layer in lora_layers(model).items() if isinstance(layer, LoRALinear)}
    widest = max(layer.shape[1] for layer in layers.values())
    least, of_input = TOKENS_IN_SEQUENCE if in_sequence else TOKENS
    tokens = tokens or max(least, of_input * widest)
    if samples_text:
        batches: list[Any] = own_text(model, tokens)
    else:
        chosen = []
        for rows, stats in sources:
            step = max(1, stats.tokens * len(sources) // tokens)
            chosen += [rows[i] for i in range(0, len(rows), step)]
        batches = length_batches(chosen, tokenizer)
    return Calibration(model, batches, layers, in_sequence=in_sequence)


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
        for done in Progress(range(0, rows, OWN_BATCH), desc="Sampling calibration text"):
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
