"""What the 4-bit merge knows of a layer's inputs: their second moments, from a run over data.

The model is the one that was trained, the 4-bit base with its live adapter. It reads some rows, and
for each adapted layer the sum of x x' over its input tokens is kept, (in, in). For all layers of a
7B model together these are 22 GB, so they are gathered for a group of layers at a time, as many as
MAX_BYTES holds, with one run for each group.

Where there are no rows to read, the model reads what it writes itself: text sampled from its first
token on is close enough to what it was trained on (arXiv:2305.17888 quantizes with it).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from qlora.adapter_files import attach, check_fits
from qlora.adapter_reader import AdapterFile
from qlora.base import load_base
from qlora.data import length_batches, prepare_data
from qlora.errors import UserError
from qlora.lora import LoRALinear, lora_layers

MIN_TOKENS = 8192  # more changed nothing that could be measured
TOKENS_PER_INPUT = 4  # of the widest layer: with fewer than 1 its moments are singular
OWN_TEXT = "self"
OWN_LENGTH = 128
OWN_BATCH = 64
MAX_LENGTH = 2048
MAX_BYTES = 4 << 30


class SecondMoments:
    """The second moments of each adapted layer's inputs. Ask in the model's order: it is cheap."""

    def __init__(self, model: PreTrainedModel, batches: list[Any], *, max_bytes: int = MAX_BYTES):
        self.model = model.eval()
        self.batches = batches
        self.groups = _groups(model, batches[0], max_bytes)
        self._gathered: dict[str, Tensor] = {}

    def of(self, layer: str) -> Tensor:
        """The sum of x x' over the inputs of `layer`, fp32 (in, in), on the model's device."""
        if layer not in self._gathered:
            group = next(group for group in self.groups if layer in group)
            self._gathered = {}  # the last group's memory goes before the next is taken
            self._gathered = _gather(self.model, self.batches, group)
        return self._gathered[layer]


def calibrate(
    adapter: AdapterFile,
    base_model: str,
    data: Sequence[str],
    tokenizer_folder: Any,
    *,
    device: str,
    trust_remote_code: bool = False,
) -> SecondMoments:
    """Second moments of `adapter`'s layers, live on `base_model`, over some of `data`.

    Args:
        data: what `prepare_data` reads, some of each; or OWN_TEXT.

    Raises:
        UserError: the data cannot be read, or the adapter does not fit.
    """
    from_model = list(data) == [OWN_TEXT]
    if not from_model:
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{tokenizer_folder} holds no tokenizer to calibrate with") from error
        read = [prepare_data(source, tokenizer, max_length=MAX_LENGTH) for source in data]
    model = load_base(
        base_model, adapter.quantization, device=device, trust_remote_code=trust_remote_code
    )
    check_fits(model, adapter)
    attach(model, adapter)
    model.eval()
    widest = max(layer.in_features for layer in _linear(model).values())
    tokens = max(MIN_TOKENS, TOKENS_PER_INPUT * widest)
    if from_model:
        return SecondMoments(model, own_text(model, tokens))
    chosen = []
    for rows, stats in read:
        every = max(1, stats.tokens * len(read) // tokens)
        chosen += [rows[i] for i in range(0, len(rows), every)]
    return SecondMoments(model, length_batches(chosen, tokenizer))


@torch.no_grad()
def own_text(model: PreTrainedModel, tokens: int) -> list[dict[str, Tensor]]:
    """At least `tokens` tokens that `model` writes from its first on, the same at every call."""
    config = model.generation_config
    ends = config.eos_token_id
    first = config.bos_token_id if config.bos_token_id is not None else ends
    first = first[0] if isinstance(first, list) else first or 0
    batches = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        rows = math.ceil(tokens / OWN_LENGTH)
        for done in tqdm(range(0, rows, OWN_BATCH), desc="Writing text of its own", leave=False):
            start = torch.full((min(OWN_BATCH, rows - done), 1), first, device=model.device)
            written = model.generate(  # type: ignore[operator]  # of a mixin that is not typed
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
            batches.append({"input_ids": written, "attention_mask": torch.ones_like(written)})
    return batches


def _groups(model: PreTrainedModel, batch: Any, max_bytes: int) -> list[dict[str, str]]:
    """Layers in the model's order, in groups whose moments fit; each with the first layer that
    reads the same input, which stands for it (q, k and v read one input, gate and up another).
    """
    leaders: dict[str, str] = {}
    last: list[tuple[Any, str]] = []

    def note(name: str, x: Tensor) -> None:
        leaders[name] = last[0][1] if last and last[0][0] is x else name
        last[:] = [(x, leaders[name])]

    layers = _linear(model)
    with _watching(layers, note):
        _run(model, batch)
    groups: list[dict[str, str]] = [{}]
    used = 0
    for name, layer in layers.items():
        leader = leaders.get(name, name)
        size = 4 * layer.in_features**2 if leader not in groups[-1].values() else 0
        if groups[-1] and used + size > max_bytes:
            groups.append({})
            leader, used, size = name, 0, 4 * layer.in_features**2
        groups[-1][name] = leader
        used += size
    return groups


def _gather(model: PreTrainedModel, batches: list[Any], group: dict[str, str]) -> dict[str, Tensor]:
    layers = _linear(model)
    leaders = {name: layers[name] for name in dict.fromkeys(group.values())}
    moments = {
        name: torch.zeros(layer.in_features, layer.in_features, device=model.device)
        for name, layer in leaders.items()
    }
    real = torch.empty(0)

    def add(name: str, x: Tensor) -> None:
        tokens = x[real] if x.shape[:-1] == real.shape else x.flatten(0, -2)
        tokens = tokens.float()
        moments[name].addmm_(tokens.T, tokens)

    with _watching(leaders, add):
        for batch in tqdm(batches, desc="Calibrating", leave=False):
            real = batch["attention_mask"].bool().to(model.device)
            _run(model, batch)
    return {name: moments[leader] for name, leader in group.items()}


def _linear(model: PreTrainedModel) -> dict[str, LoRALinear]:
    found = lora_layers(model).items()
    return {name: layer for name, layer in found if isinstance(layer, LoRALinear)}


@contextmanager
def _watching(layers: dict[str, LoRALinear], see: Any) -> Iterator[None]:
    """Inside the block, `see(name, x)` is called with each input of `layers`."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def _run(model: PreTrainedModel, batch: Any) -> None:
    """The model without its output head: nobody needs the logits."""
    model.base_model(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        use_cache=False,
    )
