"""Prompts -> the model's answers, in batches; and rows as questions with the answer they have.

The prompt is the chat as its template renders it with a generation prompt; the answer is what the
model generates until it ends its turn. Prompts of a batch are padded on the left with an attention
mask. Any id can pad: a tokenizer without a pad token, which tokenizer.pad refuses, stays as it is.

A turn ends at the eos tokens of the model's generation_config, at the tokenizer's eos, and at the
token that the chat template puts after an answer: that one is learned in training, and in many base
models (Qwen2.5's, for one) it is neither of the others.

Left out: beam search, and running tools.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data.chat_template import NO_LOSS, PROBE, Rendering
from qlora.data.records import Chat
from qlora.errors import UserError

Message = Mapping[str, Any]
BATCH_ROWS = 32
BATCH_TOKENS = 8192  # prompt and answer: keys and values of so many take 1 GB in an 8B model


class Question(NamedTuple):
    """A row split before its last answer, as token ids."""

    prompt: list[int]
    answer: list[int]
    request: str = ""
    """the user's last words"""
    max_new_tokens: int = 0
    """longest answer, where it differs from row to row"""


def question_of(row: Mapping[str, Any], task: str) -> Question:
    """A row as `Objective.encode` returns it, split; the prompt of a text row is empty."""
    ids, labels = row["input_ids"], row["labels"]
    if task == "seq2seq":
        return Question(ids, labels)
    start, end = last_answer(labels)
    return Question(ids[:start], ids[start:end])


def last_answer(labels: Sequence[int]) -> tuple[int, int]:
    """[start, end) of the last run of labels with loss."""
    end = max((i for i, label in enumerate(labels) if label != NO_LOSS), default=-1) + 1
    return max((i for i in range(end) if labels[i] == NO_LOSS), default=-1) + 1, end


def answers(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    chats: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    progress: str = "",
) -> list[str]:
    """The model's answer to each chat, decoded, without special tokens.

    Args:
        chats: messages with `role` and `content`, the last of them the user's.
        temperature: 0 takes the most likely token; above, tokens are drawn from torch's generator.
        progress: title of a progress bar on a terminal; none without.

    Raises:
        UserError: the chat template refuses a chat.
    """
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    settings = generation_settings(model, tokenizer, max_new_tokens, temperature)
    return generate(model, tokenizer, prompts, settings, progress=progress)


def prompt_ids(
    tokenizer: Tokenizer, chat: Sequence[Message], tools: list[Any] | None = None
) -> list[int]:
    """Ids of a chat with the generation prompt, by the chat template or the fallback template."""
    messages = [dict(message) for message in chat]
    text = Rendering(tokenizer, Chat(messages, tools, 0), prompt=True).full
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def generation_settings(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """Arguments of `model.generate`; the model's generation_config gives the others."""
    pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # any will do: pads are masked
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "use_cache": True,  # off in a model being trained
        "eos_token_id": stop_ids(model, tokenizer) or None,
        "pad_token_id": next(i for i in pad_ids if i is not None),
    }
    return settings | ({"temperature": temperature} if temperature > 0 else {})


def stop_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer."""
    config: Any = getattr(model, "generation_config", None)
    eos = config.eos_token_id if config is not None else None
    ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    with suppress(UserError):  # a template that refuses this is reported for the real chat
        after = Rendering(tokenizer, Chat(turn, None, 0)).full.partition(PROBE)[2].lstrip()
        first = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"][:1]
        ids |= {i for i in first if i in tokenizer.added_tokens_decoder}
    return sorted(ids - {None})


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    *,
    progress: str = "",
) -> list[str]:
    """The model's answer to each prompt of ids, by these `generation_settings`.

    Prompts of similar length share a batch, up to BATCH_ROWS and BATCH_TOKENS.
    """
    texts = [""] * len(prompts)
    hidden = None if progress else True  # None: tqdm hides it where there is no terminal
    bar = tqdm(total=len(prompts), desc=progress, leave=False, disable=hidden)
    with bar, generation_mode(model):
        for batch in _batches(prompts, settings["max_new_tokens"]):
            inputs = left_padded([prompts[i] for i in batch], settings["pad_token_id"])
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            ids = model.generate(**inputs, **settings)  # type: ignore[operator]
            if not model.config.is_encoder_decoder:  # (B, T + new) -> (B, new)
                ids = ids[:, inputs["input_ids"].shape[1] :]
            for i, row in zip(batch, ids.tolist(), strict=True):
                texts[i] = decode(tokenizer, row)
            bar.update(len(batch))
    return texts


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Indices into `prompts`, the longest first: if memory runs out, it does so at once."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        rows = BATCH_TOKENS // (len(prompts[batch[0] if batch else i]) + max_new_tokens)
        if batch and len(batch) >= min(BATCH_ROWS, rows):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T), each prompt at the right end."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without the model's own max_length, of which transformers warns beside
    max_new_tokens; restored afterwards, so that training can go on."""
    was_training, config = model.training, model.generation_config
    model.eval()
    model.generation_config = copy.deepcopy(config)
    model.generation_config.max_length = None
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = config


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """An answer's ids as text, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
