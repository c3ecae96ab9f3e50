"""A chat -> the text its template makes of it, the parts with loss, and token ids with labels.

What is supervised: all that the model has to write after the generation prompt, for each assistant
turn, and the turn's end token, so that it learns to stop; not the line break after that token.

How the turns are found. Most templates carry no {% generation %} marks, so the mask cannot come
from transformers alone. The whole chat is rendered once, as a string; where turn i starts is where
the rendering of the messages before it, with a generation prompt, ends. That fails where a template
writes the same turn differently depending on what follows (Qwen3 strips the thinking of earlier
turns; Mistral moves the tools to the last user turn). There the turn's text is swapped for a probe,
and the turn is what lies between the part before and the part after the probe. The string is
tokenized once, and the characters' spans are carried over to tokens by their offsets: tokenizing
piece by piece gives other ids at the seams.

Source: transformers' apply_chat_template (https://huggingface.co/docs/transformers/chat_templating).
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora.data.records import Chat
from qlora.errors import UserError, first_line

NO_LOSS = -100  # the label that torch's cross entropy ignores
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ eos_token or '' if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
PROBE = "QloraProbe7f3a"  # stands in for a turn's text; no white space for templates to trim


# ---- messages -> text and the spans with loss


def fallback_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A plain chat template for a tokenizer that has none; None for one that has its own.

    It renders `### User:\\n…\\n\\n### Assistant:\\n…<eos>`, after the BOS token where the tokenizer
    adds one itself.
    """
    if tokenizer.chat_template:
        return None
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts_with_bos else "") + FALLBACK_CHAT_TEMPLATE


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    same = (x == y for x, y in zip(a, b, strict=False))
    return sum(takewhile(bool, same))


class Rendering:
    """One chat as the template writes it, whole or in part.

    `full` is the whole, with the mark that opens an answer behind it if `prompt`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: Chat, *, prompt: bool = False
    ) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.template = fallback_template(tokenizer)
        try:
            self.full = self._render(chat.messages, prompt)
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the model's chat template refuses it: {first_line(error)} Change the messages "
                "to what the template takes"
            ) from error

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=self.chat.tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )

    def part(self, messages: list[dict[str, Any]], prompt: bool = False) -> str | None:
        """Rendering of some messages; None where the template refuses them, or there are none."""
        try:
            return self._render(messages, prompt) if messages else None
        except (TemplateError, TypeError):
            return None

    def span(self, i: int) -> tuple[int, int] | None:
        """Characters [start, end) of `full` that the model has to write in turn i."""
        messages = self.chat.messages
        prompt = self.part(messages[:i], prompt=True)
        turn = self.full if i + 1 == len(messages) else self.part(messages[: i + 1])
        starts = prompt is not None and self.full.startswith(prompt)
        ends = turn is not None and self.full.startswith(turn.rstrip())
        if prompt is None or turn is None or not (starts and ends):
            return self._probed_span(i, prompt if starts else None)
        return len(prompt), len(turn.rstrip())

    def _probed_span(self, i: int, prompt: str | None) -> tuple[int, int] | None:
        """The same, where the turn is written differently in the whole chat and at its end."""
        messages, full = self.chat.messages, self.full
        probe = {**messages[i], "content": PROBE}
        before, found, after = (
            self.part([*messages[:i], probe, *messages[i + 1 :]]) or ""
        ).partition(PROBE)
        if not found or not full.endswith(after):
            return None
        # what comes before the text may depend on the text (empty think tags): then up to there
        start = _shared(before, full) if prompt is None else len(prompt)
        history = self.part(messages[:i]) or ""
        if prompt is None and start < len(before) and not full[:start].startswith(history):
            return None
        # the end token is what follows the text when nothing follows the turn
        end = len(full) - len(after)
        tail = (self.part([*messages[:i], probe]) or "").partition(PROBE)[2].rstrip()
        if not after.startswith(tail):  # Phi-3 ends the whole chat with eos: keep the turn's own
            blank = len(tail) - len(tail.lstrip())
            marks = [
                mark for mark in self.tokenizer.get_added_vocab() if tail.startswith(mark, blank)
            ]
            tail = tail[:blank] + max(marks, key=len, default="")
        return start, end + (len(tail) if after.startswith(tail) else 0)

    def with_spans(self) -> tuple[str, list[tuple[int, int]]] | None:
        """The text to tokenize and its spans with loss; an end token is put in if there is none."""
        text, spans = self.full, []
        messages = self.chat.messages
        turns = [i for i in range(self.chat.first, len(messages)) if is_answer(messages[i])]
        for i in turns:
            span = self.span(i)
            if span is None:
                return None
            if (word := _last_word(messages[i])) not in text[slice(*span)]:
                # tool calls, or text that it wants in another form: trained on, it teaches silence
                raise UserError(
                    f"the model's chat template leaves out an answer ({word[:60]!r}): write it as "
                    "text that the template shows, or mend the template"
                )
            spans.append(span)
        (start, end), eos = spans[-1], self.tokenizer.eos_token
        word = _last_word(messages[turns[-1]])  # which may be its own eos already
        if eos and word and text[start:end].endswith(word) and not word.endswith(eos):
            text = text[:end] + eos + text[end:]
            spans[-1] = (start, end + len(eos))
        return text, spans


def _last_word(message: Mapping[str, Any]) -> str:
    """The last word of a turn's text, or else the name of the last tool it calls."""
    if words := str(message.get("content", "")).split():
        return words[-1]
    call = message["tool_calls"][-1]
    return str(call.get("function", call).get("name", ""))


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether the message is an assistant's and says something."""
    said = message.get("content", "").strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(said)


# ---- text -> token ids and labels


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Ids of the rendered chat (which has its own BOS), and labels for the spans."""
    if tokenizer.is_fast:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        learned = [any(_in_span(text, token, span) for span in spans) for token in offsets]
    else:  # no offsets: a span's end is as many tokens in as the text up to there has in common
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        learned = [False] * len(ids)
        for start, end in spans:
            first, last = (
                _shared(ids, tokenizer(text[:at], add_special_tokens=False)["input_ids"])
                for at in (start, end)
            )
            learned[first:last] = [True] * (last - first)
    return ids, [i if on else NO_LOSS for i, on in zip(ids, learned, strict=True)]


def _in_span(text: str, token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether the token at those characters says something of the span.

    A token may begin just before the span ("[/INST]| yes" with the space in the token). Byte-level
    tokenizers with trim_offsets give a lone space before the span as (start, start): not in it.
    """
    (low, high), (start, end) = token, span
    return low < end and high > start and (low >= start or bool(text[start:high].strip()))
