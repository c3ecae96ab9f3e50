"""What the 4-bit merge knows of a layer's inputs: their second moments, from a run over data.

The model is the one that was trained, the 4-bit base with its live adapter. It reads some rows, and
qlora.moments adds up the inputs of each adapted linear layer.

Where there are no rows to read, the model reads what it writes itself: text sampled from its first
token on is close enough to what it was trained on (arXiv:2305.17888 quantizes with it).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from qlora.adapter_files import attach
from qlora.adapter_fits import check_fits
from qlora.adapter_reader import AdapterFile
from qlora.base import load_base
from qlora.data import length_batches, prepare_data
from qlora.errors import UserError
from qlora.lora import LoRALinear, lora_layers
from qlora.moments import SecondMoments

MIN_TOKENS = 8192  # more changed nothing that could be measured
TOKENS_PER_INPUT = 4  # of the widest layer: with fewer than 1 its moments are singular
OWN_TEXT = "self"
OWN_LENGTH = 128
OWN_BATCH = 64
MAX_LENGTH = 2048


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
    found = lora_layers(model).items()
    layers = {name: layer for name, layer in found if isinstance(layer, LoRALinear)}
    widest = max(layer.shape[1] for layer in layers.values())
    tokens = max(MIN_TOKENS, TOKENS_PER_INPUT * widest)
    if from_model:
        return SecondMoments(model, own_text(model, tokens), layers)
    chosen = []
    for rows, stats in read:
        every = max(1, stats.tokens * len(read) // tokens)
        chosen += [rows[i] for i in range(0, len(rows), every)]
    return SecondMoments(model, length_batches(chosen, tokenizer), layers)


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
