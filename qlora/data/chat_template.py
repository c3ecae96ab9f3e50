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

Templates read different forms of tool calls, reasoning and missing text, and leave out the others
without a word: probes tell in which form a chat is shown whole.

Source: transformers' apply_chat_template (https://huggingface.co/docs/transformers/chat_templating).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import product, takewhile
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

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
ARGUMENT, MARK = "QloraArgument7f3a", "QloraMark7f3a"  # the same
TOOL_CALLS, TOOLS, REASONING = "tool calls", "tools", "reasoning"  # of `Rendering.lost`
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages

Span = tuple[int, int]  # [start, end)


def fallback_template(tokenizer: Tokenizer) -> str | None:
    """A plain chat template for a tokenizer without one; None if it has one.

    It renders `### User:\\n…\\n\\n### Assistant:\\n…<eos>`, after BOS if the tokenizer adds one.
    """
    if tokenizer.chat_template:
        return None
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if starts_with_bos else "") + FALLBACK_CHAT_TEMPLATE


class Ending(NamedTuple):
    """What a chat template writes after the last answer."""

    tokens: tuple[str, ...] = ()
    """the added tokens in it, such as the one that ends a turn"""
    opened: str = ""
    """a generation prompt that it writes without being asked for one"""


def ending_of(tokenizer: Tokenizer) -> Ending:
    """The ending of the tokenizer's chat template or the fallback template."""
    return _ending(
        tokenizer, fallback_template(tokenizer), str(tokenizer.chat_template), len(tokenizer)
    )


@lru_cache(maxsize=4)  # the last two arguments stand for what may change in the tokenizer
def _ending(tokenizer: Tokenizer, template: str | None, own: str, size: int) -> Ending:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": PROBE},
        {"role": "user", "content": "b"},
    ]

    def render(count: int, prompt: bool = False) -> str:
        return _rendered(tokenizer, template, talk[:count], None, prompt)

    added = [token for token in tokenizer.get_added_vocab() if token.strip()]
    either = "|".join(map(re.escape, added))
    tail = opened = ""
    with suppress(TemplateError, TypeError):  # one that rejects this chat may accept real ones
        tail = render(2).partition(PROBE)[2]
        if render(2) == render(2, prompt=True):
            # in parts, each of a token or line: it begins where the tail differs from what stands
            # there before a user's turn, or one before, if both have a token that begins turns
            parts, others = (
                re.split(rf"(?={either})|(?<=\n)" if added else r"(?<=\n)", text)
                for text in (tail, render(3).partition(PROBE)[2])
            )
            shared = _common_length(parts, others)
            begins = [t for t in re.findall(either, render(1)) if t != tokenizer.bos_token][:1]
            shared -= parts[:shared][-1:] == begins
            opened = "".join(parts[shared:])
            opened = opened if render(1, prompt=True).endswith(opened) else ""
    tail = tail.removesuffix(opened)
    return Ending(tuple(token for token in added if token in tail), opened)


def _rendered(
    tokenizer: Tokenizer, template: str | None, messages: Any, tools: Any, prompt: bool
) -> str:
    options: Any = {"add_generation_prompt": prompt, "tools": tools, "chat_template": template}
    if any(None in message.values() for message in messages):  # which apply_chat_template drops
        options |= tokenizer.special_tokens_map
        options["chat_template"] = tokenizer.get_chat_template(template, tools)
        return str(render_jinja_template([messages], **options)[0][0])
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


class Rendering:
    """A chat rendered by the tokenizer's template or the fallback template, which may reject it.

    `messages` are the chat's, in the one of their `_forms` of which the template shows most;
    `lost` names what it leaves out: "tools", "reasoning". `full` is the text of all messages;
    with `prompt` it ends in the generation prompt, otherwise it does not.

    Raises:
        UserError: the template rejects every form, or leaves out a tool call.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat, *, prompt: bool = False) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.template, self.ending = fallback_template(tokenizer), ending_of(tokenizer)
        self.thought: Mapping[str, Any] | None = None  # the message that _keep_reasoning rewrote
        failed: Exception | None = None
        forms = []
        for messages in _forms([self._without_end(message) for message in chat.messages]):
            try:
                forms.append((messages, self._render(messages, prompt), self._lost(messages)))
            except (TemplateError, TypeError) as error:
                failed = failed or error
                continue
            if not forms[-1][-1]:
                break
        if not forms:
            raise UserError(
                f"the model's chat template rejects the chat: {first_line(failed or TypeError())} "
                "Change its messages to ones that the template accepts"
            ) from failed
        self.messages, self.full, self.lost = min(forms, key=lambda form: len(form[-1]))
        if TOOL_CALLS in self.lost:
            # trained on such a turn, the model would learn silence
            calls = [call for message in self.messages for call in message.get("tool_calls") or ()]
            raise UserError(
                f"the model's chat template leaves out an answer ({_name(calls[-1])!r}), the call "
                "of a tool: write it as text, or use a template that renders it"
            )
        if REASONING in self.lost:
            self._keep_reasoning(prompt)

    def _render(
        self, messages: list[dict[str, Any]], prompt: bool = False, tools: Any = None
    ) -> str:
        if thought := self.thought:
            messages = [{**m, "content": MARK} if m is thought else m for m in messages]
        text = _rendered(self.tokenizer, self.template, messages, tools or self.chat.tools, prompt)
        text = text.replace(MARK, thought["content"]) if thought else text
        return text if prompt else text.removesuffix(self.ending.opened)

    def _without_end(self, message: dict[str, Any]) -> dict[str, Any]:
        """An answer without the end token that the template writes after it."""
        ends, text = self.ending.tokens, str(message.get("content") or "").rstrip()
        ends = (*ends, self.tokenizer.eos_token or "") if ends else ()
        end = next((end for end in ends if end and text.endswith(end)), None)
        if end is None or end == text or message["role"] != "assistant":
            return message
        return self._without_end({**message, "content": text.removesuffix(end).rstrip()})

    def _lost(self, messages: list[dict[str, Any]]) -> set[str]:
        """What the template leaves out of `messages`, found by rendering probes in its place."""
        probed, tools, probes = _probed(messages, self.chat.tools)
        text = self._part(probed, tools=tools) if probes else None
        if text is None:
            return set()
        lost = {what for probe, what in probes.items() if probe not in text}
        # JSON within a string, or Python's repr of a mapping
        quoted = any(mark in text for mark in (f'\\"{ARGUMENT}', f"{{'{ARGUMENT}"))
        return lost | {"JSON"} if quoted else lost

    def _keep_reasoning(self, prompt: bool) -> None:
        """Render the last reasoning as the model generates it, where the template of a reasoning
        model (DeepSeek-R1, QwQ) cuts it off every answer: the answer's text is put in afterwards.
        """
        last = _last_reasoning(self.messages)
        message = self.messages[last]
        content = str(message.get("content") or "")
        thought, answer = reasoning_in(message), content.rpartition("</think>")[2]
        thought = f"<think>\n{thought}\n</think>\n\n"
        before = self._part(self.messages[:last], prompt=True) or ""
        if before.rstrip().endswith("<think>"):
            self.thought = {**message, "content": thought + answer.strip()}
            self.messages = [*self.messages[:last], self.thought, *self.messages[last + 1 :]]
            self.full, self.lost = self._render(self.messages, prompt), self.lost - {REASONING}

    def _part(
        self, messages: list[dict[str, Any]], prompt: bool = False, tools: Any = None
    ) -> str | None:
        """Some messages, rendered; None if there are none or the template rejects them."""
        try:
            return self._render(messages, prompt, tools) if messages else None
        except (TemplateError, TypeError):
            return None

    def with_spans(self) -> tuple[str, list[Span]] | None:
        """The text to tokenize and its spans with loss, in characters; None if one is not found.

        If the last turn has no end token, eos is inserted.
        """
        text, messages, spans = self.full, self.messages, []
        for i in range(self.chat.first, len(messages)):
            if i in self.chat.no_loss or not is_answer(messages[i]):
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
        messages, full = self.messages, self.full
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
    if words := str(message.get("content") or "").split():
        return words[-1]
    return _name(message["tool_calls"][-1])


def learned_turns(chat: Chat) -> list[int]:
    """Indices of the messages with loss."""
    turns = range(chat.first, len(chat.messages))
    return [i for i in turns if i not in chat.no_loss and is_answer(chat.messages[i])]


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's, with text or tool calls."""
    content = (message.get("content") or "").strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(content)


# ---- what templates read: tool calls, tools and reasoning


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name and arguments of a tool call or tool, which may be wrapped as a `function`."""
    return call.get("function") or call


def _name(call: Mapping[str, Any]) -> str:
    return str(_function(call).get("name", ""))


def _replaced(call: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A tool call or tool with changes in its function."""
    function = {**_function(call), **changes}
    return {**call, "function": function} if call.get("function") else function


def _arguments(call: Mapping[str, Any]) -> Any:
    """The arguments of a call, as an object if they are one or JSON of one."""
    given = _function(call).get("arguments")
    with suppress(ValueError):
        parsed = json.loads(given or "{}") if isinstance(given, str) else given
        given = parsed if isinstance(parsed, Mapping) else given
    return given


def reasoning_in(message: Mapping[str, Any]) -> str:
    """The reasoning of an answer: under a key of its own, or in its text before `</think>`."""
    given = (message.get(name) for name in REASONING_KEYS)
    if thought := next((text for text in given if isinstance(text, str) and text.strip()), ""):
        return thought.strip()
    head, _, _ = str(message.get("content") or "").rpartition("</think>")
    return head.strip().removeprefix("<think>").strip()


def _last_reasoning(messages: Sequence[Mapping[str, Any]]) -> int:
    """The index of the last answer with reasoning, -1 if a user's turn follows it or none has one.

    Templates leave out the reasoning before the last user's turn, as the model will not see it.
    """
    for i in reversed(range(len(messages))):
        if messages[i]["role"] == "user":
            break
        if messages[i]["role"] == "assistant" and reasoning_in(messages[i]):
            return i
    return -1


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages as given, and then in the other forms that templates read.

    - missing text: no `content` or "", and None beside tool calls
    - reasoning under its own or each of its names
    - arguments of tool calls as an object or as JSON of it
    """

    def changed(
        message: dict[str, Any], types: Any, names: bool, text: str | None
    ) -> dict[str, Any]:
        calls, thought = message.get("tool_calls"), reasoning_in(message)
        message = {key: value for key, value in message.items() if value is not None}
        if names and any(name in message for name in REASONING_KEYS):
            message |= dict.fromkeys(REASONING_KEYS, thought)
        if text != "as given":
            message.setdefault("content", "")
        if calls and text is None:
            message["content"] = message["content"] or None
        if calls and types:
            message["tool_calls"] = [_with_arguments(call, types) for call in calls]
        return message

    seen: list[list[dict[str, Any]]] = []
    for change in product((None, dict, str), (False, True), ("as given", "", None)):
        form = [changed(message, *change) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def _with_arguments(call: Mapping[str, Any], types: Any) -> dict[str, Any]:
    if "arguments" not in _function(call):
        return dict(call)
    arguments = _arguments(call)
    if types is str and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return _replaced(call, arguments=arguments)


def _probed(
    messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[dict[str, Any]], list[Any] | None, dict[str, str]]:
    """Messages and tools with probes in place of names, arguments and the last reasoning; and of
    each probe what it stands for."""
    probes: dict[str, str] = {}

    def probe(what: str, text: str = PROBE) -> str:
        probes[name := f"{text}{len(probes)}x"] = what
        return name

    def probed(call: Mapping[str, Any]) -> dict[str, Any]:
        changes: dict[str, Any] = {"name": probe(TOOL_CALLS)}
        given = _function(call).get("arguments")
        if isinstance(_arguments(call), Mapping):
            arguments = {probe(TOOL_CALLS, ARGUMENT): "a"}
            changes["arguments"] = json.dumps(arguments) if isinstance(given, str) else arguments
        return _replaced(call, **changes)

    messages = [
        {**m, "tool_calls": list(map(probed, m["tool_calls"]))} if m.get("tool_calls") else m
        for m in messages
    ]
    if (last := _last_reasoning(messages)) >= 0:
        message, name = messages[last], probe(REASONING)
        head, end, tail = str(message.get("content") or "").rpartition("</think>")
        texts = {key: name for key in REASONING_KEYS if key in message}
        if end:
            texts["content"] = (
                head.replace(reasoning_in({"content": head + end}), name) + end + tail
            )
        messages[last] = {**message, **texts}
    if tools and all(isinstance(tool, Mapping) for tool in tools):
        tools = [_replaced(tool, name=probe(TOOLS)) for tool in tools]
    return messages, tools, probes


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
