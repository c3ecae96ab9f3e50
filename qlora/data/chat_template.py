"""A chat -> its text as the template renders it, spans with loss, and token ids with labels.

Loss is on all that the model has to generate for each assistant turn: from the end of the
generation prompt up to and including the token at which generation stops.

Most templates have no {% generation %} marks, from which transformers computes a mask. So the whole
chat is rendered once, as a string; turn i starts where the rendering of the messages before it,
with a generation prompt, ends. That fails if a template renders a turn differently depending on
what follows (Qwen3.5's prompt opens a thought that earlier turns lack; Mistral moves the tools to
the last user turn). Then the turn's text is replaced by a probe, and the turn lies between the
parts before and after the probe. The string is tokenized once, and spans of characters become
spans of tokens by their offsets: tokenized piece by piece, the ids at the boundaries would differ.

A turn gets a row of its own, which ends with it, where the rest of the chat changes what is
learned: it does not follow its generation prompt (Qwen3.5, Mistral's tools), its reasoning is left
out (Qwen3), or it ends in a token at which generation does not stop (gpt-oss writes <|end|> for
<|return|>). So n turns may take n rows, whose tokens grow as n^2 / 2; the alternative, to learn the
last turn only, is `train_on="last"`. Without an end token (GLM-4.5), the special token that begins
the next turn ends it.

The last turn follows the generation prompt. Where that opens a thought which the rendered turn
lacks (DeepSeek-R1), the thought is put in, empty if there is none; where it closes the thought, and
the turn has reasoning, the template's `enable_thinking` is turned on.

Source: transformers' apply_chat_template (https://huggingface.co/docs/transformers/chat_templating).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data.chats import AS_TEXT, REASONING_KEYS, Chat
from qlora.data.templates import (
    ARGUMENT,
    PROBE,
    REASONING,
    REJECTIONS,
    RESULTS,
    SWITCH,
    SYSTEM,
    TEXT,
    TOOL_CALLS,
    TOOLS,
    common_length,
    ending_of,
    fallback_template,
    forms,
    is_answer,
    last_word,
    name_of,
    probed,
    reasoning_in,
    rendered,
    replaced,
    special_tokens,
    text_of,
    with_content,
    without_reasoning,
    wrappings,
)
from qlora.errors import UserError, first_line

NO_LOSS = -100  # the label that torch's cross entropy ignores
MARK = "QloraMark7f3a"  # replaces a text that a template would change
FAULTS = (TEXT, TOOL_CALLS, RESULTS)  # without these a chat is not trained on

Span = tuple[int, int]  # [start, end)


# ---- a chat as its template renders it


class Rendering:
    """A chat rendered by the tokenizer's template or the fallback template, which may reject it.

    `messages` are the chat's, in the one of their `forms` of which the template shows most;
    `hidden` are the turns whose reasoning it leaves out. `full` is the text of all messages; with
    `prompt` it ends in the generation prompt, otherwise it does not.

    Raises:
        UserError: the template rejects every form, or leaves out a tool call or result.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat, *, prompt: bool = False) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.template, self.ending = fallback_template(tokenizer), ending_of(tokenizer)
        self.tools = chat.tools
        self.switches: dict[str, Any] = {}  # for the template
        self.marked: tuple[Any, dict[str, Any], str] | None = None  # message, with MARK, its text
        self._spans: dict[int, Span | None] = {}
        self.not_found: int | None = None  # a turn without a span
        self.unprompted: set[int] = set()  # turns after another text than their prompt
        self.messages, self.full, probes = self._best_form(prompt)
        self.hidden = {i for what, i in probes if what == REASONING}
        self.left_out = {what for what, _ in probes if what not in (TEXT, REASONING, "JSON")}
        if fault := next((what for what in FAULTS[1:] if what in self.left_out), None):
            # trained on such a turn, the model would learn silence, or to invent the result
            calls = [call for message in self.messages for call in message.get("tool_calls") or ()]
            name = name_of(calls[-1]) if fault == TOOL_CALLS else "its result"
            raise UserError(
                f"the model's chat template leaves out an answer ({name!r}), the call "
                "of a tool: write it as text, or use a template that renders it"
                if fault == TOOL_CALLS
                else "the model's chat template leaves out a tool's result: write it as a user's "
                "message, or use a template that renders it"
            )
        if not prompt and (turns := learned_turns(chat)) and turns[-1] == len(self.messages) - 1:
            self._follow_prompt(turns[-1])

    @property
    def lost(self) -> set[str]:
        """What the template leaves out: "tools", "system message", "reasoning"."""
        thoughts = self.hidden.intersection(learned_turns(self.chat))
        return self.left_out | ({REASONING} if thoughts else set())

    def _best_form(self, prompt: bool) -> tuple[list[dict[str, Any]], str, set[tuple[str, int]]]:
        """The messages in the form of which most is shown, their text, and what is not shown."""
        failed: Exception | None = None
        found: list[Any] = []
        best: Any = None
        given = [self._without_end(message) for message in self.chat.messages]
        as_texts = [False, True] if any(AS_TEXT in message for message in given) else [False]
        for as_text, parts, tools in product(as_texts, (False, True), wrappings(self.chat.tools)):
            self.tools = tools
            for messages in forms(given, parts, as_text):
                try:
                    text = self._render(messages, prompt)
                    lost = self._probes_lost(messages, text, prompt)
                    found.append((messages, text, lost, tools))
                except REJECTIONS as error:
                    # the template's own words rather than those of an error in it
                    said = type(error) is TemplateError and type(failed) is not TemplateError
                    failed = error if failed is None or said else failed
                    continue
                if not lost:
                    return messages, text, lost
            best = min(found, key=lambda form: len(form[2]), default=None)
            if best and not {what for what, _ in best[2]}.intersection((*FAULTS, TOOLS)):
                break
        if best is None:
            raise UserError(
                f"the model's chat template rejects the chat: {first_line(failed or TypeError())} "
                "Change its messages to ones that the template accepts"
            ) from failed
        messages, text, lost, self.tools = best
        return messages, text, lost

    def _render(
        self, messages: list[dict[str, Any]], prompt: bool = False, tools: Any = None
    ) -> str:
        text = ""
        if self.marked:
            message, marked, text = self.marked
            messages = [marked if m is message else m for m in messages]
        tools = tools or self.tools
        full = rendered(
            self.tokenizer, self.template, messages, tools, prompt, **self.switches
        ).replace(MARK, text)
        return full if prompt else full.removesuffix(self.ending.opened)

    def _without_end(self, message: dict[str, Any]) -> dict[str, Any]:
        """An answer without the end token that the template writes after it."""
        ends, text = self.ending.tokens, str(message.get("content") or "").rstrip()
        ends = (*ends, self.tokenizer.eos_token or "") if ends else ()
        end = next((end for end in ends if end and text.endswith(end)), None)
        if end is None or end == text or message["role"] != "assistant":
            return message
        return self._without_end({**message, "content": text.removesuffix(end).rstrip()})

    def _probes_lost(
        self, messages: list[dict[str, Any]], full: str, prompt: bool
    ) -> set[tuple[str, int]]:
        """What the template leaves out of `messages`, found by rendering probes in its place; and
        the index of the message."""
        texts = [(i, m) for i, m in enumerate(messages) if text_of(m).strip()]
        words = {"user": TEXT, "assistant": TEXT, "system": SYSTEM}
        lost = {
            (words[m["role"]], i)
            for i, m in texts
            if m["role"] in words and last_word(m) not in full
        }
        changed, tools, probes = probed(messages, self.tools)
        text = self._part(changed, prompt=prompt, tools=tools) if probes else None
        if text is None:
            return lost
        lost |= {what for probe, what in probes.items() if probe not in text}
        # JSON within a string, or Python's repr of a mapping
        quoted = any(mark in text for mark in (f'\\"{ARGUMENT}', f"{{'{ARGUMENT}"))
        return lost | {("JSON", -1)} if quoted else lost

    def _follow_prompt(self, i: int) -> None:
        """Render the last turn so that it follows the generation prompt, if it does not."""
        message, prompt = self.messages[i], self._part(self.messages[:i], prompt=True)
        thought = reasoning_in(message)
        if prompt is None or (self.full.startswith(prompt) and i not in self.hidden):
            return
        if thought and prompt.rstrip().endswith("</think>") and self._can_think():
            self.switches = {"enable_thinking": True}
            opened = self._part(self.messages[:i], prompt=True) or prompt
            if opened == prompt:
                self.switches = {}
            self.full, prompt = self._render(self.messages), opened
            if self.full.startswith(prompt):
                return
        bare, answer = (
            without_reasoning(message),
            text_of(message).rpartition("</think>")[2].strip(),
        )
        ways = [({**bare, **dict.fromkeys(REASONING_KEYS, MARK)}, thought)]
        if prompt.rstrip().endswith("<think>"):
            whole = f"<think>\n{thought}\n</think>\n\n{answer.strip()}"
            ways.append((with_content(bare, MARK), whole))
        for marked, text in ways:
            self.marked = message, marked, text
            full = self._part(self.messages) or ""
            if full.startswith(prompt) and thought in full:
                self.full, self.hidden = full, self.hidden - {i}
                return
        self.marked = None
        if not self.full.startswith(prompt):
            messages = [*self.messages[:i], bare]
            full = self._part(messages) or ""
            start = self._start(i, prompt)
            if thought and full.startswith(prompt):  # the prompt closes the thought
                self.messages, self.full, self.hidden = messages, full, self.hidden | {i}
            elif start and self.full[:start].endswith(prompt[-8:]):
                # once a call is answered, gpt-oss drops the reasoning before it: the prompt has it
                self.full = prompt + self.full[start:]
            elif start and self.ending.opens.strip() and prompt.endswith(self.ending.opens):
                # after a tool's result, Gemma 4's prompt opens a thought: it is closed at once
                self.full = prompt + self.ending.begins + self.full[start:]

    def _can_think(self) -> bool:
        """Whether the template has a switch for reasoning that nobody has set."""
        template = str(self.tokenizer.chat_template)
        return "enable_thinking" in template and SWITCH.format("enable_thinking") not in template

    def _part(
        self, messages: list[dict[str, Any]], prompt: bool = False, tools: Any = None
    ) -> str | None:
        """Some messages, rendered; None if there are none or the template rejects them."""
        try:
            return self._render(messages, prompt, tools) if messages else None
        except REJECTIONS:
            return None

    # ---- spans

    def with_spans(self) -> tuple[str, list[Span]] | None:
        """The text to tokenize and its spans with loss, in characters; None if one is not found.

        If the last turn has no end token, the one at which generation stops is inserted.
        """
        text, messages, spans = self.full, self.messages, []
        for i in learned_turns(self.chat):
            span, word = self.span(i), last_word(messages[i])
            if span is None:
                self.not_found = i
                return None
            if word not in text[slice(*span)]:
                # trained on such a turn, for example of tool calls, the model would learn silence
                raise UserError(
                    f"the model's chat template leaves out an answer ({word[:60]!r}): write it as "
                    "text that the template renders, or fix the template"
                )
            spans.append(span)
        if (stop := self._missing_stop(i, spans[-1])) is not None:
            start, end = spans[-1]
            text, spans[-1] = text[:end] + stop + text[end:], (start, end + len(stop))
        return text, spans

    def _missing_stop(self, i: int, span: Span) -> str | None:
        """The token to insert after turn i; None if it ends in one, or the tokenizer has none."""
        text, eos = self.full[slice(*span)], self.tokenizer.eos_token or ""
        if self.ending.marks and not text.endswith(last_word(self.messages[i])):
            return None
        stop = self.ending.stops.get("call" if self.messages[i].get("tool_calls") else "text")
        ends = (*filter(None, [eos, stop]), *special_tokens(self.tokenizer))
        stop = eos if self.ending.marks else stop or eos
        return None if text.rstrip().endswith(ends) or not stop else stop

    def fit(self, i: int) -> int:
        """How far turn i is as generated: 0, it is not found; 1, it follows another text than its
        generation prompt; 2, it follows that, and its reasoning is left out; 3, it is whole."""
        if self.span(i) is None:
            return 0
        return 1 if i in self.unprompted else 3 - (i in self.hidden)

    def span(self, i: int) -> Span | None:
        """The characters of `full` that the model has to generate in turn i; None if not found, or
        if they are not what it generates when the turn is the last."""
        if i not in self._spans:
            self._spans[i] = self._span(i)
        return self._spans[i]

    def _span(self, i: int) -> Span | None:
        messages, full = self.messages, self.full
        prompt = self._part(messages[:i], prompt=True)
        follows = prompt is not None and full.startswith(prompt)
        if prompt is not None and not follows:
            self.unprompted.add(i)
        turn = full if i + 1 == len(messages) else self._part(messages[: i + 1])
        if prompt is not None and follows and turn and full.startswith(turn.rstrip()):
            return self._ended(i, len(prompt), len(turn.rstrip()))
        start = len(prompt) if prompt is not None and follows else self._start(i, prompt)
        end = self._end(i)
        return None if start is None or end is None else self._ended(i, start, end)

    def _start(self, i: int, prompt: str | None = None) -> int | None:
        """Where turn i begins if no prompt tells: its text and reasoning are replaced by probes."""
        messages, full = self.messages, self.full
        probe = with_content(messages[i], PROBE)
        history = self._part(messages[:i]) or ""
        if (prompt or "").startswith(history):  # behind the last header before the first difference
            header = (prompt or "").removeprefix(history)
            others = probe | {k: PROBE for k in REASONING_KEYS if k in probe}
            probed = self._part([*messages[:i], others, *messages[i + 1 :]]) or ""
            same = full[: common_length(probed, full)]
            if header and header in same:
                return same.rindex(header) + len(header)
        probed = self._part([*messages[:i], probe, *messages[i + 1 :]]) or ""
        before, found, _ = probed.partition(PROBE)
        # `before` may depend on the text (empty think tags): start where the two differ
        start = common_length(before, full)
        if not found or (start < len(before) and not full[:start].startswith(history)):
            return None
        return start

    def _end(self, i: int) -> int | None:
        """Where turn i ends: after its end token, which follows the text if no message follows."""
        messages: Sequence[dict[str, Any]] = self.messages
        probe: dict[str, Any] = with_content(messages[i], PROBE)
        if messages[i].get("tool_calls") and not text_of(messages[i]).strip():
            *calls, last = messages[i]["tool_calls"]
            probe = {**messages[i], "tool_calls": [*calls, replaced(last, name=PROBE)]}
        probed = self._part([*messages[:i], probe, *messages[i + 1 :]]) or ""
        _, found, after = probed.partition(PROBE)
        if not found or not self.full.endswith(after):
            return None
        end = len(self.full) - len(after)
        tail = (self._part([*messages[:i], probe]) or "").partition(PROBE)[2].rstrip()
        if after.startswith(tail):
            return end + len(tail)
        # Phi-3 ends the whole chat with eos, too: the turn ends in the first tokens of the tail, if
        # nothing but tokens follows there (not the rest of a tool call)
        either = "|".join(
            map(re.escape, [t for t in self.tokenizer.get_added_vocab() if t in tail])
        )
        for token in reversed(list(re.finditer(either, tail)) if either else []):
            own, others = tail[: token.end()], re.sub(either, "", tail[token.end() :])
            if after.startswith(own) and not others.strip():
                return end + len(own)
        return None

    def _ended(self, i: int, start: int, end: int) -> Span | None:
        """The span with the token that begins the next turn, if the template ends turns with none;
        None if that is no token, and so the turn has no end here."""
        rest, eos = self.full[end:], self.tokenizer.eos_token
        is_last = i + 1 == len(self.messages)
        if self.ending.marks or is_last or self.full[start:end].rstrip().endswith(eos or "\0"):
            return start, end
        blanks = len(rest) - len(rest.lstrip())
        nexts = [t for t in special_tokens(self.tokenizer) if rest.startswith(t, blanks)]
        if nexts:
            return start, end + blanks + len(max(nexts, key=len))
        return None if eos else (start, end)


def renderings(tokenizer: Tokenizer, chat: Chat) -> list[Rendering]:
    """The chat in one rendering, or in several that each learn some of its turns: where the rest of
    the chat changes what is learned of a turn, one ends after it."""
    whole, messages = Rendering(tokenizer, chat), chat.messages
    for i in reversed(learned_turns(chat)):
        if whole.fit(i) == 3:
            continue
        users = (k for k in range(i, len(messages)) if messages[k]["role"] == "user")
        for end in dict.fromkeys((next(users, len(messages)), i + 1)):
            if end == len(messages):
                continue
            first = replace(chat, messages=messages[:end])
            head = Rendering(tokenizer, first)
            if head.fit(i) > whole.fit(i):
                rest = replace(chat, first=max(chat.first, end))
                others = renderings(tokenizer, rest) if learned_turns(rest) else []
                return [*renderings(tokenizer, first), *others]
    return [whole]


def learned_turns(chat: Chat) -> list[int]:
    """Indices of the messages with loss."""
    turns = range(chat.first, len(chat.messages))
    return [i for i in turns if i not in chat.no_loss and is_answer(chat.messages[i])]


# ---- tokens


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
            first, last = (common_length(ids, part) for part in before)
            has_loss[first:last] = [True] * (last - first)
    return ids, [i if on else NO_LOSS for i, on in zip(ids, has_loss, strict=True)]
