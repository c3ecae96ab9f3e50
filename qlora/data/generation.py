"""Prompts -> generated answers, in batches; and rows -> a prompt and its expected answer.

A prompt is a chat as its template renders it with a generation prompt. The prompts of a batch are
padded on the left with an attention mask, so any id can be the pad: the tokenizer needs no pad
token, and is not changed.

An answer ends at the eos tokens of the model's generation_config, at the tokenizer's eos, and at
the token that the chat template writes after an answer: the model is trained to generate that one,
and in many base models (for example Qwen2.5) it is neither of the others.

Left out: beam search, and running tools.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.cli import Progress
from qlora.data.chat_template import NO_LOSS, Rendering
from qlora.data.chats import Chat
from qlora.data.templates import PROBE, ending_of, special_tokens
from qlora.errors import UserError
from qlora.files import GENERATION, ids_in

Message = Mapping[str, Any]
BATCH_ROWS = 32
BATCH_TOKENS = 8192  # of prompts and answers: their keys and values take 1 GB in an 8B model


class Question(NamedTuple):
    """A row split before its last answer, as token ids."""

    prompt: list[int]
    answer: list[int]
    request: str = ""  # text of the last user message
    max_new_tokens: int = 0  # limit of the generated answer, where each row has its own


def question_of(row: Mapping[str, Any], task: str) -> Question:
    """Split a row of `Objective.encode`; the prompt of a `text` row is empty."""
    ids, labels = row["input_ids"], row["labels"]
    if task == "seq2seq":
        return Question(ids, labels)
    end = max((i for i, label in enumerate(labels) if label != NO_LOSS), default=-1) + 1
    start = max((i for i in range(end) if labels[i] == NO_LOSS), default=-1) + 1
    return Question(ids[:start], ids[start:end])


def answers(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    chats: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> list[str]:
    """The model's answer to each chat, decoded, without special tokens.

    Args:
        chats: messages with `role` and `content`, ending with the user's.
        temperature: 0 is greedy decoding; above 0, torch's global generator draws the tokens.

    Raises:
        UserError: the chat template rejects a chat.
    """
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    settings = generation_settings(model, tokenizer, max_new_tokens, temperature)
    return generate(model, tokenizer, prompts, settings)


def prompt_ids(
    tokenizer: Tokenizer, chat: Sequence[Message], tools: list[Any] | None = None
) -> list[int]:
    """Ids of a chat with the generation prompt, by the chat template or the fallback template."""
    messages = [dict(message) for message in chat]
    text = Rendering(tokenizer, Chat(messages, tools, 0), prompt=True).full
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def generation_settings(
    model: PreTrainedModel, tokenizer: Tokenizer, max_new_tokens: int, temperature: float = 0.0
) -> dict[str, Any]:
    """Arguments of `model.generate`; the model's generation_config sets the others."""
    embedding: Any = model.get_input_embeddings()
    pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # pads are masked
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "use_cache": True,  # training turns it off in the config
        "eos_token_id": stop_ids(model, tokenizer) or None,
        "pad_token_id": next(i for i in pad_ids if i is not None and i < embedding.weight.shape[0]),
    }
    return settings | ({"temperature": temperature} if temperature > 0 else {})


def stop_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that end an answer."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted(ids_in(eos) | taught_stop_ids(tokenizer))


def taught_stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that training teaches to end an answer with: the tokenizer's eos, and the
    tokens with which its chat template ends an answer and a tool call, or begins the next turn."""
    ids = ids_in(tokenizer.eos_token_id)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    with suppress(UserError):  # a template that rejects this chat may accept real ones
        after = Rendering(tokenizer, Chat(turn, None, len(turn))).full.partition(PROBE)[2].lstrip()
        first = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"][:1]
        ids |= {i for i in first if i in tokenizer.added_tokens_decoder}
    stops = ending_of(tokenizer).stops.values()
    return ids | {i for i, t in tokenizer.added_tokens_decoder.items() if t.content in stops}


def in_history(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A generated answer as the content of a message: without its reasoning, which templates leave
    out of earlier turns, and without special tokens."""
    begins, text = ending_of(tokenizer).begins, str(tokenizer.decode(list(ids)))
    if not begins or begins not in text:
        return decode(tokenizer, ids)
    text = text.rpartition(begins)[2]
    for token in special_tokens(tokenizer):
        text = text.replace(token, "")
    return text


def describe_stops(
    tokenizer: Tokenizer | None, known: Collection[int], taught: Iterable[int]
) -> str:
    """A line on the tokens of `taught` that the base's `known` ones lack; empty if none."""

    def names(ids: Iterable[int]) -> str:
        words = tokenizer.convert_ids_to_tokens(sorted(ids)) if tokenizer else sorted(ids)
        return ", ".join(map(str, words))

    new = set(taught).difference(known)
    beside = f", beside the base's {names(known)}" if known else ""
    return f"answers end at {names(new)}{beside} ({GENERATION})" if new else ""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    *,
    progress: str = "",
) -> list[str]:
    """The model's decoded answer to each prompt (token ids), with these `generation_settings`.

    A batch holds prompts of similar length, up to BATCH_ROWS and BATCH_TOKENS; the longest come
    first, so that a lack of memory shows at once. `progress` is the title of a progress bar; ""
    shows none.
    """
    batches: list[list[int]] = []  # of indices into `prompts`
    most = 0  # rows in the last batch, whose first prompt is the longest
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if not batches or len(batches[-1]) >= most:
            most = min(BATCH_ROWS, BATCH_TOKENS // (len(prompts[i]) + settings["max_new_tokens"]))
            batches.append([])
        batches[-1].append(i)
    texts = [""] * len(prompts)
    bar = Progress(total=len(prompts), desc=progress, disable=not progress)
    with bar, generation_mode(model):
        for batch in batches:
            batch_prompts = [prompts[i] for i in batch]
            inputs = left_padded(batch_prompts, settings["pad_token_id"], model.device)
            ids = model.generate(**inputs, **settings)  # type: ignore[operator]
            if not model.config.is_encoder_decoder:  # (B, T + new) -> (B, new)
                ids = ids[:, inputs["input_ids"].shape[1] :]
            for i, row in zip(batch, ids.tolist(), strict=True):
                texts[i] = decode(tokenizer, row)
            bar.update(len(batch))
    return texts


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T), with pads before each prompt."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    both = torch.tensor([ids, mask], device=device)  # (2, B, T)
    return {"input_ids": both[0], "attention_mask": both[1]}


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and no max_length in the generation_config, which transformers warns of beside
    max_new_tokens; both are restored afterwards, so that training can continue."""
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
    """Ids as text, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
