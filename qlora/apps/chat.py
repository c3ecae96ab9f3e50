"""Talk to a tuned model, in several turns, with answers shown as they are generated.

Questions come from the terminal, or one a line from a file or a pipe; only the answers go to
standard output. The history is kept, and --compare keeps one for each of base and adapter. On a
wide terminal the two stand side by side, generated in one batch whose rows use the adapter or not
(qlora.adapters.apply.mixed_batch); on a narrow one, and with an adapter that cannot be mixed by
rows, one below the other.

The whole history is read again for each answer: keys and values are not cached between turns. Where
it no longer fits into the model's context, the oldest turns are dropped; the system message stays.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import BaseStreamer

from qlora.adapters.apply import disable_adapter, mixed_batch
from qlora.adapters.live import ResolvedModel, resolve_model
from qlora.apps.terminal import SideBySide, printable
from qlora.config import ChatConfig
from qlora.data.generation import (
    decode,
    generation_mode,
    generation_settings,
    left_padded,
    prompt_ids,
)
from qlora.errors import UserError

Context = Callable[[], AbstractContextManager[None]]
Show = Callable[[Sequence[str], Sequence[bool]], object]
NARROW = 96  # cells of a terminal, below which two columns are too narrow to read
HELP = """\
/reset         forget the turns so far
/system TEXT   forget them, and use this system message; without TEXT none
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with a space is no command."""


def chat(config: ChatConfig) -> None:
    """Load the model, then answer --prompt, the terminal, or the lines of standard input."""
    with redirect_stdout(sys.stderr):  # standard output is for answers
        resolved = resolve_model(config)
        session = Chat(config, resolved)
    if config.prompt is not None:
        session.run([f" {config.prompt}"])
    elif sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing and a history
        note(f"{resolved.describe()}. /help lists the commands.")
        session.run(typed(), interactive=True)
    else:
        session.run(line.rstrip("\n") for line in sys.stdin)


def note(text: str) -> None:
    """Print to standard error."""
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
class Conversation:
    """One state of the model with its own history."""

    system: str | None = None
    """system message"""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """question and answer of each"""
    name: str = "answer"
    state: Context = nullcontext
    """context in which the model generates"""

    def messages(self, question: str, dropped: int = 0) -> list[dict[str, str]]:
        """The system message, the turns but the first `dropped`, and the question."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answer in self.turns[dropped:]:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": question}]

    def prompt(
        self, tokenizer: Tokenizer, question: str, longest: int | None
    ) -> tuple[list[int], int]:
        """Ids of `messages`, at most `longest`, and how many old turns were dropped for that.

        Raises:
            UserError: the question alone does not fit, or the chat template refuses it.
        """
        for dropped in range(len(self.turns) + 1):
            ids = prompt_ids(tokenizer, self.messages(question, dropped))
            if longest is None or len(ids) <= longest:
                del self.turns[:dropped]
                return ids, dropped
        raise UserError(
            f"this message has {len(ids):,} tokens, and the model takes {longest:,} with its "
            "answer: shorten it, or lower --max-new-tokens"
        )


class Chat:
    """A model, and a conversation with each of its one or two states.

    Raises:
        UserError: it is no causal language model, or has no space for a question.
    """

    def __init__(self, config: ChatConfig, resolved: ResolvedModel) -> None:
        positions = resolved.checkpoint.max_positions
        if resolved.task != "causal-lm":
            raise UserError(
                f"{resolved.what} is for {resolved.task}: only a causal language model can chat"
            )
        if positions is not None and config.max_new_tokens >= positions:
            raise UserError(
                f"--max-new-tokens {config.max_new_tokens} leaves no space for a question: the "
                f"model takes {positions:,} tokens, question and answer together"
            )
        self.config = config
        self.longest = None if positions is None else positions - config.max_new_tokens  # prompt
        self.tokenizer = resolved.load_tokenizer()
        if not self.tokenizer.chat_template:
            note("The model has no chat template: turns are written as `### User:` and so on.")
        self.model = resolved.load()
        if config.seed is None:
            torch.seed()
        else:
            torch.manual_seed(config.seed)
        self.conversations = [Conversation(config.system)]
        self.mixed: Context | None = None  # all states in one batch, where the adapter can
        if config.compare:
            without = partial(disable_adapter, self.model)
            self.conversations = [
                Conversation(config.system, name="base", state=without),
                Conversation(config.system, name="with adapter"),
            ]
            mixed = partial(mixed_batch, self.model, [None, "default"])
            with suppress(UserError), mixed():
                self.mixed = mixed

    def run(self, lines: Iterable[str], *, interactive: bool = False) -> None:
        """Answer questions and obey commands, up to the last line or /exit.

        Args:
            interactive: continue after an error or Ctrl-C.
        """
        for line in lines:
            try:
                if line.startswith("/"):
                    if line.split()[0] == "/exit":
                        return
                    self.obey(line)
                elif line.strip() and self.answer(line.strip()) and not interactive:
                    raise KeyboardInterrupt
            except UserError as error:
                if not interactive:
                    raise
                note(f"error: {error}")
            except KeyboardInterrupt:  # before the answer began
                if not interactive:
                    raise

    def obey(self, line: str) -> None:
        """A command but /exit."""
        command, _, text = line.partition(" ")
        if command not in ("/reset", "/system", "/help"):
            raise UserError(f"unknown command {command}: wanted /reset, /system, /exit or /help")
        if command == "/help":
            note(HELP)
            return
        for conversation in self.conversations:
            conversation.turns.clear()
            if command == "/system":
                conversation.system = text.strip() or None
        note("The turns so far are forgotten.")

    def answer(self, question: str) -> bool:
        """Print the answers; True after Ctrl-C, which keeps what was generated by then.

        Raises:
            UserError: the question is too long, or the chat template refuses it.
        """
        prompts = [self._prompt(conversation, question) for conversation in self.conversations]
        width = shutil.get_terminal_size().columns
        if self.mixed and width >= NARROW and sys.stdout.isatty():
            columns = SideBySide([c.name for c in self.conversations], width, write_out)
            with self.mixed():
                texts, interrupted = self.generate(prompts, columns.show)
        else:
            texts, interrupted = [], False
            for conversation, prompt in zip(self.conversations, prompts, strict=True):
                if len(self.conversations) > 1:
                    write_out(f"── {conversation.name} ──\n")
                with conversation.state():
                    text, stopped = self.generate([prompt], Running())
                write_out("\n")
                texts += text
                interrupted |= stopped
        for conversation, answer in zip(self.conversations, texts, strict=True):
            if answer.strip():  # a template may refuse a turn without text
                conversation.turns.append((question, answer))
        return interrupted

    def _prompt(self, conversation: Conversation, question: str) -> list[int]:
        """Ids of the conversation and the question; notes how many turns were dropped."""
        ids, dropped = conversation.prompt(self.tokenizer, question, self.longest)
        if dropped:
            turns = "turn no longer fits" if dropped == 1 else f"{dropped} turns no longer fit"
            whose = f" ({conversation.name})" if len(self.conversations) > 1 else ""
            note(f"The oldest {turns} into the model's context: forgotten{whose}.")
        return ids

    def generate(self, prompts: Sequence[Sequence[int]], show: Show) -> tuple[list[str], bool]:
        """The answers to prompts, shown as they grow, and whether Ctrl-C cut them short."""
        longest, temperature = self.config.max_new_tokens, self.config.temperature
        settings = generation_settings(self.model, self.tokenizer, longest, temperature)
        return stream(self.model, self.tokenizer, prompts, settings, show)


@dataclass
class Running:
    """Shows one growing text; white space waits for what follows it."""

    shown: int = 0

    def __call__(self, texts: Sequence[str], ended: Sequence[bool]) -> None:
        """Print what is new of the text."""
        text = (printable(texts[0]) if sys.stdout.isatty() else texts[0]).rstrip()
        write_out(text[self.shown :])
        self.shown = max(self.shown, len(text))


def write_out(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class AnswerStreamer(BaseStreamer):
    """Shows the texts of a batch's rows at each token; transformers' TextStreamer takes one row."""

    def __init__(self, tokenizer: Tokenizer, rows: int, stop: Sequence[int], show: Show) -> None:
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
            if not self.ended[row]:  # only pads follow
                self.ids[row].append(token)
                text = decode(self.tokenizer, self.ids[row])
                self.texts[row] = text.rstrip("\ufffd")  # of an incomplete character
        self._show(self.texts, self.ended)

    def end(self) -> None:
        """All is generated, or generation was interrupted."""
        self.ended = [True] * len(self.ended)
        self.texts = [decode(self.tokenizer, ids) for ids in self.ids]
        self._show(self.texts, self.ended)


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    show: Show,
) -> tuple[list[str], bool]:
    """The model's answer to each prompt, shown as it grows, and whether Ctrl-C cut them short.

    Args:
        settings: `generation_settings`.
        show: called with the texts so far, and which of them have ended.

    Raises:
        UserError: GPU out of memory; raised here, so that an interactive chat continues.
    """
    inputs = left_padded(prompts, settings["pad_token_id"])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    streamer = AnswerStreamer(tokenizer, len(prompts), settings["eos_token_id"] or (), show)
    try:
        with generation_mode(model):
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
