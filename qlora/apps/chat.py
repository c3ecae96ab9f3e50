"""Talk to a tuned model.

    python -m qlora.chat --adapter out
    python -m qlora.chat --adapter out --compare        its base's answers, too
    python -m qlora.chat --model out-merged
    python -m qlora.chat --adapter out --prompt "Turn off the light in the kitchen."

Questions come from the terminal, or one a line from a file or a pipe; then nothing but the answers
is on standard output. The history is kept, and --compare keeps one for each of the two.

On a wide terminal the two are written beside each other, in one batch whose rows go through the
adapter or past it (qlora.adapters.apply.mixed_batch); on a narrow one, and with an adapter that
cannot be mixed by rows, one under the other.

Turns of a chat with a model, and its answer as it is being written.

The whole history is read again for each answer; keys and values are not kept from turn to turn.
Where a history no longer fits into what the model reads, its oldest turns go, the system message
stays.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qlora.adapters.apply import disable_adapter, mixed_batch
from qlora.adapters.live import ResolvedModel, resolve_model
from qlora.apps.terminal import Columns, printable
from qlora.config import ChatConfig
from qlora.data.generation import (
    decode,
    generation_settings,
    left_padded,
    prompt_ids,
    ready_to_write,
)
from qlora.errors import UserError

Context = Callable[[], AbstractContextManager[None]]
NARROW = 96  # cells of a terminal, below which two columns are too thin to read
HELP = """\
/reset         forget the turns so far
/system TEXT   forget them, and go by this system message; without TEXT by none
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with a space is no command."""


def chat(config: ChatConfig) -> None:
    """Load the model and talk."""
    with redirect_stdout(sys.stderr):  # on standard output an answer stands alone
        found = resolve_model(config)
        talk = load(config, found)
    if config.prompt is not None:
        talk.go_through([f" {config.prompt}"])
    elif sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # from now on input() can be edited, and remembers
        note(f"{found.describe()}. /help says what there is to type.")
        talk.go_through(typed(), patient=True)
    else:
        talk.go_through(line.rstrip("\n") for line in sys.stdin)


def load(config: ChatConfig, found: ResolvedModel) -> "Chat":
    """The model with whom it is talked.

    Raises:
        UserError: it does not write text, or leaves no room for a question.
    """
    longest = found.checkpoint.max_positions
    if found.task != "causal-lm":
        raise UserError(f"{found.what} is for {found.task}: only a causal language model can chat")
    if longest is not None and config.max_new_tokens >= longest:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a question: the model "
            f"takes {longest:,} tokens, question and answer together"
        )
    tokenizer = found.load_tokenizer()
    if not tokenizer.chat_template:
        note("The model has no chat template: turns are written as `### User:`, `### Assistant:`.")
    model = found.load()
    if config.seed is None:
        torch.seed()
    else:
        torch.manual_seed(config.seed)
    speakers = [Speaker("answer", Conversation(config.system), nullcontext)]
    mixed: Context | None = None
    if config.compare:
        base = Speaker("base", Conversation(config.system), partial(disable_adapter, model))
        speakers = [base, replace(speakers[0], name="with adapter")]
        both = partial(mixed_batch, model, [None, "default"])
        with suppress(UserError), both():
            mixed = both
    room = None if longest is None else longest - config.max_new_tokens
    return Chat(config, model, tokenizer, speakers, room, mixed)


def note(text: str) -> None:
    """What is no answer."""
    print(text, file=sys.stderr, flush=True)


def typed() -> Iterator[str]:
    """Lines from the terminal, up to Ctrl-D."""
    while True:
        try:
            print(flush=True)
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D leaves")


@dataclass
class Speaker:
    """Who answers."""

    name: str
    conversation: "Conversation"
    speaking: Context
    """what the model is put into for it"""


@dataclass
class Chat:
    """A model, and one or two speakers that it is."""

    config: ChatConfig
    model: Any
    tokenizer: Any
    speakers: list[Speaker]
    room: int | None
    """tokens of the longest prompt"""
    mixed: Context | None = None
    """what lets all speakers answer in one batch, where that can be"""

    def go_through(self, lines: Iterable[str], *, patient: bool = False) -> None:
        """Answer questions and obey commands, to the end or /exit.

        Args:
            patient: go on after an error or Ctrl-C.
        """
        for line in lines:
            try:
                if line.startswith("/"):
                    if line.split()[0] == "/exit":
                        return
                    self.obey(line)
                elif line.strip() and self.answer(line.strip()) and not patient:
                    raise KeyboardInterrupt
            except UserError as error:
                if not patient:
                    raise
                note(f"error: {error}")
            except KeyboardInterrupt:  # before the answer began
                if not patient:
                    raise

    def obey(self, line: str) -> None:
        """A command but /exit."""
        command, _, text = line.partition(" ")
        if command not in ("/reset", "/system", "/help"):
            raise UserError(f"unknown command {command}: wanted /reset, /system, /exit or /help")
        if command == "/help":
            note(HELP)
            return
        for speaker in self.speakers:
            speaker.conversation.turns.clear()
            if command == "/system":
                speaker.conversation.system = text.strip() or None
        note("The turns so far are forgotten.")

    def answer(self, question: str) -> bool:
        """Print what each speaker answers; True after Ctrl-C, which keeps what was said by then.

        Raises:
            UserError: the question is too long, or the chat template refuses it; nobody answers.
        """
        prompts = [self.prompt_of(speaker, question) for speaker in self.speakers]
        width = shutil.get_terminal_size().columns
        if self.mixed and width >= NARROW and sys.stdout.isatty():
            columns = Columns(len(self.speakers), width, write_out)
            columns.heading([speaker.name for speaker in self.speakers])
            with self.mixed():
                texts, interrupted = self.write(prompts, columns.show)
        else:
            texts, interrupted = [], False
            for speaker, prompt in zip(self.speakers, prompts, strict=True):
                if len(self.speakers) > 1:
                    write_out(f"── {speaker.name} ──\n")
                with speaker.speaking():
                    found, stopped = self.write([prompt], Running())
                write_out("\n")
                texts += found
                interrupted |= stopped
        for speaker, text in zip(self.speakers, texts, strict=True):
            if text.strip():  # a template may refuse a turn without text
                speaker.conversation.turns.append((question, text))
        return interrupted

    def prompt_of(self, speaker: Speaker, question: str) -> list[int]:
        """The ids that `speaker` answers to."""
        ids, forgotten = speaker.conversation.prompt(self.tokenizer, question, self.room)
        if forgotten:
            turns = "turn no longer fits" if forgotten == 1 else f"{forgotten} turns no longer fit"
            whose = f" ({speaker.name})" if len(self.speakers) > 1 else ""
            note(f"The oldest {turns} into what the model reads, and so is forgotten{whose}.")
        return ids

    def write(self, prompts: Sequence[Sequence[int]], show: Any) -> tuple[list[str], bool]:
        """The answers to prompts, shown as they grow, and whether Ctrl-C cut them short."""
        longest, temperature = self.config.max_new_tokens, self.config.temperature
        settings = generation_settings(self.model, self.tokenizer, longest, temperature)
        return write(self.model, self.tokenizer, prompts, settings, show)


@dataclass
class Running:
    """A text that goes on where it was; white space waits for what comes behind it."""

    shown: int = 0

    def __call__(self, texts: Sequence[str], ended: Sequence[bool]) -> None:
        """Print what is new of the one text."""
        text = (printable(texts[0]) if sys.stdout.isatty() else texts[0]).rstrip()
        write_out(text[self.shown :])
        self.shown = max(self.shown, len(text))


def write_out(text: str) -> None:
    """To the terminal, or wherever the answers go."""
    sys.stdout.write(text)
    sys.stdout.flush()


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
        settings: those of qlora.data.generation.
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
