"""A chat -> its text as the template renders it, spans with loss, and token ids with labels.

Loss is on all that the model has to generate for each assistant turn: from the end of the
generation prompt up to and including the turn's end token, so that it learns to stop.

Most templates have no {% generation %} marks, from which transformers computes a mask. So the whole
chat is rendered once, as a string; turn i starts where the rendering of the messages before it,
with a generation prompt, ends. That fails if a template renders a turn differently depending on
what follows (Qwen3 strips the thinking of earlier turns; Mistral moves the tools to the last user
turn). Then the turn's text is replaced by a probe, and the turn lies between the parts before and
after the probe. The string is tokenized once, and spans of characters become spans of tokens by
their offsets: tokenized piece by piece, the ids at the boundaries would differ.

Source: transformers' apply_chat_template (https://huggingface.co/docs/transformers/chat_templating).
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data.records import Chat
from qlora.errors import UserError, first_line

NO_LOSS = -100  # the label that torch's cross entropy ignores
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ eos_token or '' if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
PROBE = "QloraProbe7f3a"  # replaces a turn's text; no white space for templates to trim

Span = tuple[int, int]  # [start, end)


def fallback_template(tokenizer: Tokenizer) -> str | None:
    """A plain chat template for a tokenizer without one; None if it has one.

    It renders `### User:\\n…\\n\\n### Assistant:\\n…<eos>`, after BOS if the tokenizer adds one.
    """
    if tokenizer.chat_template:
        return None
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts_with_bos else "") + FALLBACK_CHAT_TEMPLATE


class Rendering:
    """A chat rendered by the tokenizer's template or the fallback template, which may reject it.

    `full` is the text of all messages; with `prompt` it ends in the generation prompt.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat, *, prompt: bool = False) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.template = fallback_template(tokenizer)
        try:
            self.full = self._render(chat.messages, prompt)
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the model's chat template rejects the chat: {first_line(error)} Change its "
                "messages to ones that the template accepts"
            ) from error

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        options: Any = {"tokenize": False, "add_generation_prompt": prompt}
        options |= {"tools": self.chat.tools, "chat_template": self.template}
        return str(self.tokenizer.apply_chat_template(messages, **options))

    def _part(self, messages: list[dict[str, Any]], prompt: bool = False) -> str | None:
        """Some messages, rendered; None if there are none or the template rejects them."""
        try:
            return self._render(messages, prompt) if messages else None
        except (TemplateError, TypeError):
            return None

    def with_spans(self) -> tuple[str, list[Span]] | None:
        """The text to tokenize and its spans with loss, in characters; None if one is not found.

        If the last turn has no end token, eos is inserted.
        """
        text, messages, spans = self.full, self.chat.messages, []
        for i in range(self.chat.first, len(messages)):
            if not is_answer(messages[i]):
                continue
            span, word = self._span(i), _last_word(messages[i])
            if span is None:
                return None
            if word not in text[slice(*span)]:
                # trained on such a turn, for example of tool calls, the model would learn silence
                raise UserError(
                    f"the model's chat template leaves out an answer ({word[:60]!r}): write it as "
                    "text that the template renders, or fix the template"
                )
            spans.append(span)
        (start, end), eos = spans[-1], self.tokenizer.eos_token
        if eos and word and text[start:end].endswith(word) and not word.endswith(eos):
            text = text[:end] + eos + text[end:]
            spans[-1] = (start, end + len(eos))
        return text, spans

    def _span(self, i: int) -> Span | None:
        """The characters of `full` that the model has to generate in turn i; None if not found."""
        messages, full = self.chat.messages, self.full
        prompt = self._part(messages[:i], prompt=True)
        if prompt is not None and not full.startswith(prompt):
            prompt = None
        turn = full if i + 1 == len(messages) else self._part(messages[: i + 1])
        if prompt is not None and turn is not None and full.startswith(turn.rstrip()):
            return len(prompt), len(turn.rstrip())
        # the turn renders differently inside the chat and at its end: replace its text by the probe
        probe = {**messages[i], "content": PROBE}
        probed = self._part([*messages[:i], probe, *messages[i + 1 :]]) or ""
        before, probe_text, after = probed.partition(PROBE)
        if not probe_text or not full.endswith(after):
            return None
        if prompt is not None:
            start = len(prompt)
        else:  # `before` may depend on the text (empty think tags): start where the two differ
            start, history = _common_length(before, full), self._part(messages[:i]) or ""
            if start < len(before) and not full[:start].startswith(history):
                return None
        # the turn's end token is what follows the text if no message follows the turn
        end = len(full) - len(after)
        tail = (self._part([*messages[:i], probe]) or "").partition(PROBE)[2].rstrip()
        if not after.startswith(tail):  # Phi-3 ends the whole chat with eos: keep the turn's own
            blanks = len(tail) - len(tail.lstrip())
            tokens = self.tokenizer.get_added_vocab()
            ends = [token for token in tokens if tail.startswith(token, blanks)]
            tail = tail[:blanks] + max(ends, key=len, default="")
        return start, end + (len(tail) if after.startswith(tail) else 0)


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return sum(takewhile(bool, (x == y for x, y in zip(a, b, strict=False))))


def _last_word(message: Mapping[str, Any]) -> str:
    """The last word of a turn's text; without text, the name of the last tool called."""
    if words := str(message.get("content", "")).split():
        return words[-1]
    call = message["tool_calls"][-1]
    return str(call.get("function", call).get("name", ""))


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's, with text or tool calls."""
    content = message.get("content", "").strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(content)


def tokenize(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Ids of a rendered chat, whose BOS the template writes, and labels with loss on the spans."""
    options: Any = {"add_special_tokens": False, "verbose": False}
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, **options)
    ids = list(encoded["input_ids"])
    has_loss = [False] * len(ids)
    if tokenizer.is_fast:
        for i, (low, high) in enumerate(encoded["offset_mapping"]):
            # a token may begin just before its span ("[/INST]| yes" with the space in the token);
            # outside is a lone space before it, (start, start) with byte-level BPE's trim_offsets
            has_loss[i] = any(
                low < end and high > start and (low >= start or text[start:high].strip())
                for start, end in spans
            )
    else:  # no offsets: a boundary is where the ids of the text up to it differ from `ids`
        for span in spans:
            before = [tokenizer(text[:end], **options)["input_ids"] for end in span]
            first, last = (_common_length(ids, part) for part in before)
            has_loss[first:last] = [True] * (last - first)
    return ids, [i if on else NO_LOSS for i, on in zip(ids, has_loss, strict=True)]
