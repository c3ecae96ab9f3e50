"""Chats -> the model's answers, in batches.

The prompt is the chat as its template writes it, with the mark that opens the assistant's turn;
the answer is what the model writes until it ends its turn. Prompts of different lengths are padded
on the left, with a mask, so that every answer begins at the same place; the padding is done here,
on ids, and the tokenizer stays as it is for others.

A turn ends at the tokens of the model's generation_config, at the tokenizer's eos, and at the token
that the chat template puts after an answer: that one is learned in training, and in many a base
model (Qwen2.5's, for one) it is neither of the others.

Left out: beams, and tools that are run.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.data.chat_template import PROBE, Rendering
from qlora.data.records import Chat
from qlora.errors import UserError

Message = Mapping[str, Any]
BATCH_ROWS = 32
BATCH_TOKENS = 8192  # read and written: keys and values of so many take 1 GB in an 8B model


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    progress: str = "",
) -> list[str]:
    """What the model answers to each chat, decoded, without special tokens.

    Args:
        chats: messages with `role` and `content`, the last of them the user's.
        max_new_tokens: an answer is cut there.
        temperature: 0 takes the most likely token; above, tokens are drawn from torch's generator.
        progress: what to call a progress bar on a terminal; none without.

    Raises:
        UserError: the chat template refuses a chat.
    """
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    settings = generation_settings(model, tokenizer, max_new_tokens, temperature)
    return generate(model, tokenizer, prompts, settings, progress=progress)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], tools: list[Any] | None = None
) -> list[int]:
    """Ids of a chat up to where the assistant has to write, as its template has it.

    A tokenizer without a template is read with the plain one of qlora.data.chat_template.
    """
    messages = [dict(message) for message in chat]
    text = Rendering(tokenizer, Chat(messages, tools, 0), prompt=True).full
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def generation_settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """Arguments of `model.generate`; what they leave open is as the model's own config says."""
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "use_cache": True,  # which is off in a model that is trained
        "eos_token_id": stop_ids(model, tokenizer) or None,
        "pad_token_id": _pad_id(tokenizer),
    }
    return settings | ({"temperature": temperature} if temperature > 0 else {})


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer."""
    own: Any = getattr(model, "generation_config", None)
    eos = own.eos_token_id if own is not None else None
    found = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    with suppress(UserError):  # a template that refuses these says so of the real chat
        text = Rendering(tokenizer, Chat(turn, None, 0)).full
        after = text.partition(PROBE)[2].lstrip()
        ids = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        found |= {i for i in ids[:1] if i in tokenizer.added_tokens_decoder}
    return sorted(found - {None})


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do: pads are masked."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in known if i is not None)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    *,
    progress: str = "",
) -> list[str]:
    """What the model writes after each prompt of ids, by these `generation_settings`.

    Prompts of like length go together, up to BATCH_ROWS and BATCH_TOKENS a batch.
    """
    found = [""] * len(prompts)
    hidden = None if progress else True  # None: where there is no terminal
    bar = tqdm(total=len(prompts), desc=progress, leave=False, disable=hidden)
    with bar, ready_to_write(model):
        for batch in _batches(prompts, settings["max_new_tokens"]):
            inputs = left_padded([prompts[i] for i in batch], settings["pad_token_id"])
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            ids = model.generate(**inputs, **settings)  # type: ignore[operator]
            if not model.config.is_encoder_decoder:  # whose output is the answer alone
                ids = ids[:, inputs["input_ids"].shape[1] :]
            for i, row in zip(batch, ids.tolist(), strict=True):
                found[i] = decode(tokenizer, row)
            bar.update(len(batch))
    return found


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """An answer's ids as text, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


@contextmanager
def ready_to_write(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block without dropout, and without a longest length of the model's own, of which
    transformers warns beside max_new_tokens; then as before, so that training can go on."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = copy.deepcopy(own)
    model.generation_config.max_length = None
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = own


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Places in `prompts`, the longest first: if memory does not do, it shows at once."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        rows = BATCH_TOKENS // (len(prompts[batch[0] if batch else i]) + max_new_tokens)
        if batch and len(batch) >= min(BATCH_ROWS, rows):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (B, T), each row at the right end."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
