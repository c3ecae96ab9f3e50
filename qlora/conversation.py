"""Turns of a chat with a model, and its answer as it is being written.

The whole history is read again for each answer; keys and values are not kept from turn to turn.
Where a history no longer fits into what the model reads, its oldest turns go, the system message
stays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qlora.errors import UserError
from qlora.generation import (
    decode,
    left_padded,
    prompt_ids,
    ready_to_write,
)

Show = Callable[[Sequence[str], Sequence[bool]], object]


@dataclass
class Conversation:
    """The system message and the turns so far: a question and its answer, each."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, question: str) -> list[dict[str, str]]:
        """As a chat template takes them, the question last."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for said, answer in self.turns:
            found.append({"role": "user", "content": said})
            found.append({"role": "assistant", "content": answer})
        return [*found, {"role": "user", "content": question}]

    def prompt(
        self, tokenizer: PreTrainedTokenizerBase, question: str, room: int | None
    ) -> tuple[list[int], int]:
        """Ids of it all, at most `room`, and how many turns were forgotten for that.

        Raises:
            UserError: the question alone does not fit, or the chat template refuses it.
        """
        kept = Conversation(self.system, list(self.turns))
        ids = prompt_ids(tokenizer, kept.messages(question))
        while room is not None and len(ids) > room:
            if not kept.turns:
                raise UserError(
                    f"this message has {len(ids):,} tokens, and the model reads {room:,} beside "
                    "its answer: shorten it, or lower --max-new-tokens"
                )
            kept.turns.pop(0)
            ids = prompt_ids(tokenizer, kept.messages(question))
        forgotten = len(self.turns) - len(kept.turns)
        self.turns = kept.turns
        return ids, forgotten


class AnswerStreamer(BaseStreamer):
    """Shows the texts of a batch's rows at each token; transformers' own takes one row."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rows: int, stop: Sequence[int], show: Show
    ) -> None:
        self.tokenizer, self.stop, self._show = tokenizer, set(stop), show
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        self.texts = [""] * rows
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt (B, T) first, then the next token of each row (B,)."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for row, token in enumerate(value.flatten().tolist()):
            self.ended[row] = self.ended[row] or token in self.stop
            if not self.ended[row]:  # behind an end there are pads
                self.ids[row].append(token)
                text = decode(self.tokenizer, self.ids[row])
                self.texts[row] = text.rstrip("\ufffd")  # of a character that is not whole yet
        self._show(self.texts, self.ended)

    def end(self) -> None:
        """Everything is written, or time is up."""
        self.ended = [True] * len(self.ended)
        self.texts = [decode(self.tokenizer, ids) for ids in self.ids]
        self._show(self.texts, self.ended)


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    show: Show,
) -> tuple[list[str], bool]:
    """The model's answer to each prompt, shown as it grows, and whether Ctrl-C cut them short.

    Args:
        settings: those of qlora.generation.
        show: called with the texts so far, and with which of them are at an end.

    Raises:
        UserError: the GPU's memory does not do.
    """
    inputs = left_padded(prompts, settings["pad_token_id"])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    streamer = AnswerStreamer(tokenizer, len(prompts), settings["eos_token_id"] or (), show)
    try:
        with ready_to_write(model):
            model.generate(**inputs, **settings, streamer=streamer)  # type: ignore[operator]
    except KeyboardInterrupt:
        streamer.end()
        return streamer.texts, True
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory ran out: /reset forgets the turns so far, and a lower "
            "--max-new-tokens needs less"
        ) from error
    return streamer.texts, False
