"""Chat with a tuned model over several turns; answers are shown as they are generated.

Questions come from the terminal, or one per line from a file or a pipe; only the answers go to
standard output. --compare keeps two histories, one of the base and one of the adapter. On a wide
terminal the two answers are shown side by side, generated in one batch whose rows use the adapter
or not (qlora.adapters.apply.mixed_batch); on a narrow one, or with an adapter that cannot be mixed
by rows, one below the other.

Each answer encodes the whole history again: no keys and values are cached between turns. If it
exceeds the model's context, the oldest turns are dropped and the system message is kept.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import BaseStreamer

from qlora.adapters.apply import disable_adapter, mixed_batch
from qlora.adapters.live import ResolvedModel, resolve_model
from qlora.apps.terminal import SideBySide, printable
from qlora.base.modules import embedding_rows
from qlora.config import ChatConfig
from qlora.config.tasks import task_named
from qlora.data import generation
from qlora.data.encoding import require_vocabulary
from qlora.data.templates import apply_settings
from qlora.errors import UserError, require

Context = Callable[[], AbstractContextManager[None]]
Show = Callable[[Sequence[str], Sequence[bool]], object]  # (text of each row, which have ended)
WIDE = 96  # cells of a terminal that two columns of readable width need
HELP = """\
/reset         clear the conversation
/system TEXT   clear it and set the system message; without TEXT, remove that
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with a space is not a command."""
write_out = partial(print, end="", flush=True)  # to standard output, at once


def chat(config: ChatConfig) -> None:
    """Load the model, then answer --prompt, the terminal, or the lines of standard input."""
    with redirect_stdout(sys.stderr):  # standard output is for answers only
        resolved = resolve_model(config)
        session = ChatSession(config, resolved)
    if config.prompt is not None:
        session.run([f" {config.prompt}"])
    elif sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # adds editing and a history to input()
        note(f"{resolved.describe()}. /help lists the commands.")
        session.run(terminal_lines(), interactive=True)
    else:
        session.run(line.rstrip("\n") for line in sys.stdin)


def note(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr, flush=True)


def terminal_lines() -> Iterator[str]:
    """Lines typed on the terminal, up to Ctrl-D."""
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
    """A history, and the state of the model that generates its answers."""

    system: str | None = None  # the system message
    turns: list[tuple[str, str]] = field(default_factory=list)  # (question, answer)
    name: str = "with adapter"  # shown if there are two
    state: Context = nullcontext  # sets the state: with or without the adapter

    def messages(self, question: str, dropped: int = 0) -> list[dict[str, str]]:
        """The system message, the turns after the first `dropped`, and the question."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answer in self.turns[dropped:]:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": question}]

    def prompt(
        self, tokenizer: Tokenizer, question: str, longest: int | None
    ) -> tuple[list[int], int]:
        """Ids of `messages`, at most `longest`, and the number of old turns dropped for that."""
        for dropped in range(len(self.turns) + 1):
            ids = generation.prompt_ids(tokenizer, self.messages(question, dropped))
            if longest is None or len(ids) <= longest:
                del self.turns[:dropped]
                return ids, dropped
        raise UserError(
            f"this message has {len(ids):,} tokens; the model's context has {longest:,} beside "
            "the answer: shorten the message, or lower --max-new-tokens"
        )


class ChatSession:
    """A causal language model, and one conversation with it, or two with --compare."""

    def __init__(self, config: ChatConfig, resolved: ResolvedModel) -> None:
        positions = resolved.checkpoint.max_positions
        kind = f"a {task_named(resolved.task).kind}"
        fault = f"{resolved.what} is {kind}: chat needs a causal language model. Use qlora.evaluate"
        require(resolved.task == "causal-lm", fault)
        if positions is not None and config.max_new_tokens >= positions:
            raise UserError(
                f"--max-new-tokens {config.max_new_tokens} leaves no tokens for a question: lower "
                f"it, the model's context has {positions:,} for question and answer together"
            )
        self.longest = None if positions is None else positions - config.max_new_tokens  # prompt
        self.tokenizer = resolved.load_tokenizer()
        apply_settings(self.tokenizer, config)
        if not self.tokenizer.chat_template:
            note("The model has no chat template: turns are written as `### User:` and so on.")
        self.model = resolved.load()
        self.settings = generation.generation_settings(
            self.model, self.tokenizer, config.max_new_tokens, config.temperature
        )
        torch.manual_seed(torch.seed() if config.seed is None else config.seed)
        self.conversations = [Conversation(config.system)]
        self.mixed: Context | None = None  # both states in one batch, if the adapter supports it
        if config.compare:
            without = partial(disable_adapter, self.model)
            base = Conversation(config.system, name="base", state=without)
            self.conversations.insert(0, base)
            mixed = partial(mixed_batch, self.model, [None, "default"])
            with suppress(UserError), mixed():
                self.mixed = mixed

    def run(self, lines: Iterable[str], *, interactive: bool = False) -> None:
        """Answer and execute lines; if `interactive`, continue after errors and Ctrl-C."""
        for line in lines:
            try:
                if line.startswith("/"):
                    if line.split()[0] == "/exit":
                        return
                    self.execute(line)
                elif line.strip() and self.answer(line.strip()):
                    raise KeyboardInterrupt
            except (UserError, KeyboardInterrupt) as error:
                if not interactive:
                    raise
                if isinstance(error, UserError):
                    note(f"error: {error}")

    def execute(self, line: str) -> None:
        """Execute /reset, /system or /help."""
        command, _, text = line.partition(" ")
        if command not in ("/reset", "/system", "/help"):
            raise UserError(f"unknown command {command}: use /reset, /system, /exit or /help")
        if command == "/help":
            note(HELP)
            return
        for conversation in self.conversations:
            conversation.turns.clear()
            if command == "/system":
                conversation.system = text.strip() or None
        note("The conversation is cleared.")

    def answer(self, question: str) -> bool:
        """Print and keep the answers; True after Ctrl-C, which ends them early."""
        prompts, compares = [], len(self.conversations) > 1
        ask = partial(stream, self.model, self.tokenizer, settings=self.settings)
        for conversation in self.conversations:
            ids, dropped = conversation.prompt(self.tokenizer, question, self.longest)
            require_vocabulary([ids], self.tokenizer, embedding_rows(self.model))
            prompts.append(ids)
            if dropped:
                name = f" ({conversation.name})" if compares else ""
                note(f"The model's context is full: dropped the oldest {dropped} turn(s){name}.")
        width = shutil.get_terminal_size().columns
        if self.mixed and width >= WIDE and sys.stdout.isatty():
            columns = SideBySide([c.name for c in self.conversations], width, write_out)
            with self.mixed():
                texts, interrupted = ask(prompts, show=columns.show)
        else:
            texts, interrupted = [], False
            for conversation, prompt in zip(self.conversations, prompts, strict=True):
                if compares:
                    write_out(f"── {conversation.name} ──\n")
                with conversation.state():
                    text, stopped = ask([prompt], show=GrowingText())
                write_out("\n")
                texts += text
                interrupted |= stopped
        for conversation, answer in zip(self.conversations, texts, strict=True):
            if answer.strip():  # some templates reject a turn without text
                conversation.turns.append((question, answer))
        return interrupted


@dataclass
class GrowingText:
    """Shows one text as it grows; trailing white space is held back until more text follows."""

    shown: int = 0

    def __call__(self, texts: Sequence[str], ended: Sequence[bool]) -> None:
        """Print what was added to the text."""
        text = (printable(texts[0]) if sys.stdout.isatty() else texts[0]).rstrip()
        write_out(text[self.shown :])
        self.shown = max(self.shown, len(text))


class AnswerStreamer(BaseStreamer):
    """Shows the text of each row of a batch; transformers' TextStreamer is limited to one row."""

    def __init__(self, tokenizer: Tokenizer, rows: int, stop: Sequence[int], show: Show) -> None:
        self.tokenizer, self.stop, self._show = tokenizer, set(stop), show
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        self.texts = [""] * rows
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt (B, T) first, then the next token of each row (B,)."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for row, token in enumerate(value.flatten().tolist()):
            self.ended[row] = self.ended[row] or token in self.stop
            if not self.ended[row]:  # after the end only pads follow
                self.ids[row].append(token)
                text = generation.decode(self.tokenizer, self.ids[row])
                self.texts[row] = text.rstrip("\ufffd")  # of an incomplete character
        self._show(self.texts, self.ended)

    def answers(self) -> list[str]:
        """Each answer as the content of a message in a history."""
        return [generation.in_history(self.tokenizer, ids) for ids in self.ids]

    def end(self) -> None:
        """Called after the last token; also after Ctrl-C."""
        self.ended = [True] * len(self.ended)
        self.texts = [generation.decode(self.tokenizer, ids) for ids in self.ids]
        self._show(self.texts, self.ended)


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    show: Show,
) -> tuple[list[str], bool]:
    """The model's answer to each prompt, shown as it grows, as a history has it; and whether Ctrl-C
    cut them short."""
    inputs = generation.left_padded(prompts, settings["pad_token_id"], model.device)
    streamer = AnswerStreamer(tokenizer, len(prompts), settings["eos_token_id"] or (), show)
    try:
        with generation.generation_mode(model):
            model.generate(**inputs, **settings, streamer=streamer)  # type: ignore[operator]
    except KeyboardInterrupt:
        streamer.end()
        return streamer.answers(), True
    except torch.OutOfMemoryError as error:  # an interactive chat continues
        raise UserError(
            "the GPU's memory ran out: /reset clears the conversation, and a lower "
            "--max-new-tokens needs less"
        ) from error
    return streamer.answers(), False
