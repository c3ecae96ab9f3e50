"""What chat templates read, and what they write at the end of a turn.

Templates read different forms of a chat, and leave out the others without a word: arguments of tool
calls as an object or as JSON of it, content as text or as a list of parts, missing content as "",
null or no key, reasoning under one of several names. `forms` lists them; `probed` puts probes in
place of what may be left out, so that a rendering tells whether it is there. `ending_of` tells how
a template ends turns. `set_switches` changes a template's defaults.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import product, takewhile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2.exceptions import TemplateError, TemplateRuntimeError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from qlora.data.chats import AS_TEXT, REASONING_KEYS
from qlora.data.readers import JSON
from qlora.errors import UserError, did_you_mean, require, some

PROBE = "QloraProbe7f3a"  # replaces a turn's text; no white space for templates to trim
ARGUMENT = "QloraArgument7f3a"  # the same
TEXT, TOOL_CALLS, RESULTS = "text", "tool calls", "tool results"  # what a template may leave out
TOOLS, SYSTEM, REASONING = "tools", "system message", "reasoning"  # the same
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ eos_token or '' if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
REJECTIONS = (TemplateError, TypeError, AttributeError, ValueError)
MAX_SECONDS = 20  # of the processor, for a rendering; a long chat takes milliseconds
TOO_SLOW: set[str] = set()  # templates
Message = Mapping[str, Any]


def function_of(call: Message) -> Message:
    """The name and arguments of a tool call or tool, which may be wrapped as a `function`."""
    return call.get("function") or call


def name_of(call: Message) -> str:
    """The name of the called tool."""
    return str(function_of(call).get("name", ""))


def replaced(call: Message, **changes: Any) -> dict[str, Any]:
    """A tool call or tool with changes in its function."""
    function = {**function_of(call), **changes}
    return {**call, "function": function} if call.get("function") else function


def _arguments(call: Message) -> Any:
    """The arguments of a call, as an object if they are one or JSON of one."""
    given = function_of(call).get("arguments")
    with suppress(ValueError):
        parsed = JSON.decode(given or "{}") if isinstance(given, str) else given
        given = parsed if isinstance(parsed, Mapping) else given
    return given


def text_of(message: Message) -> str:
    """The content of a message, which may be in parts of text."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return str(content)


def reasoning_in(message: Message) -> str:
    """The reasoning of an answer: under a key of its own, or in its text before `</think>`."""
    given = (message.get(name) for name in REASONING_KEYS)
    if thought := next((text for text in given if isinstance(text, str) and text.strip()), ""):
        return thought.strip()
    head, _, _ = text_of(message).rpartition("</think>")
    return head.strip().removeprefix("<think>").strip()


def without_reasoning(message: Message) -> dict[str, Any]:
    """An answer without its reasoning."""
    bare = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if "</think>" in text_of(bare):
        bare["content"] = text_of(bare).rpartition("</think>")[2].lstrip()
    return bare


def forms(
    messages: list[dict[str, Any]], parts: bool = False, as_text: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """The messages as given, and then in the other forms that templates read.

    - missing text: no `content` or "", and None beside tool calls
    - reasoning under its own or each of its names
    - arguments of tool calls as an object or as JSON of it

    Args:
        parts: content as a list of parts.
        as_text: tool calls that were written as text, as that text.
    """

    def changed(
        message: dict[str, Any], types: Any, names: bool, text: str | None
    ) -> dict[str, Any]:
        calls, thought = message.get("tool_calls"), reasoning_in(message)
        message = {key: value for key, value in message.items() if value is not None}
        if (written := message.pop(AS_TEXT, None)) and as_text and message.pop("tool_calls"):
            calls, message["content"] = None, written
        if names and any(name in message for name in REASONING_KEYS):
            message |= dict.fromkeys(REASONING_KEYS, thought)
        if text != "as given":
            message.setdefault("content", "")
        if calls and text is None:
            message["content"] = message["content"] or None
        if calls and types:
            message["tool_calls"] = [_with_arguments(call, types) for call in calls]
        if parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    seen: list[list[dict[str, Any]]] = []
    for change in product((None, dict, str), (False, True), ("as given", "", None)):
        form = [changed(message, *change) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def _with_arguments(call: Message, types: Any) -> dict[str, Any]:
    if "arguments" not in function_of(call):
        return dict(call)
    arguments = _arguments(call)
    if types is str and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return replaced(call, arguments=arguments)


def wrappings(tools: list[Any] | None) -> list[list[Any] | None]:
    """Tools as given, and with or without `function` around each."""
    if not tools or not all(isinstance(tool, Mapping) for tool in tools):
        return [tools]
    others = [
        function_of(tool) if tool.get("function") else {"type": "function", "function": tool}
        for tool in tools
    ]
    return [tools, others]


def with_content(message: Message, text: str) -> dict[str, Any]:
    """The message with another text, in parts if its own is."""
    is_parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if is_parts else text}


def probed(
    messages: Sequence[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[dict[str, Any]], list[Any] | None, dict[str, tuple[str, int]]]:
    """Messages and tools with probes in place of names, arguments, reasoning, the system message
    and tool results; and of each probe what it stands for, and the index of its message."""
    probes: dict[str, tuple[str, int]] = {}

    def probe(what: str, i: int, text: str = PROBE) -> str:
        probes[name := f"{text}{len(probes)}x"] = what, i
        return name

    def call_probed(call: Message, i: int) -> dict[str, Any]:
        changes: dict[str, Any] = {"name": probe(TOOL_CALLS, i)}
        given = function_of(call).get("arguments")
        if isinstance(_arguments(call), Mapping):
            arguments = {probe(TOOL_CALLS, i, ARGUMENT): "a"}
            changes["arguments"] = json.dumps(arguments) if isinstance(given, str) else arguments
        return replaced(call, **changes)

    result: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        changed = dict(message)
        if message.get("tool_calls"):
            changed["tool_calls"] = [call_probed(call, i) for call in message["tool_calls"]]
        if message["role"] in ("tool", "system") and text_of(message).strip():
            name = probe(RESULTS if message["role"] == "tool" else SYSTEM, i)
            changed = with_content(changed, name)
        if message["role"] == "assistant" and reasoning_in(message):
            name = probe(REASONING, i)
            head, end, tail = text_of(message).rpartition("</think>")
            changed |= {key: name for key in REASONING_KEYS if key in message}
            if end:
                head = head.replace(reasoning_in({"content": head + end}), name)
                changed = with_content(changed, head + end + tail)
        result.append(changed)
    if tools and all(isinstance(tool, Mapping) for tool in tools):
        tools = [replaced(tool, name=probe(TOOLS, -1)) for tool in tools]
    return result, tools, probes


def is_answer(message: Message) -> bool:
    """Whether a message is the assistant's, with text or tool calls."""
    content = text_of(message).strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(content)


def last_word(message: Message) -> str:
    """The last word of a turn's text; without text, the name of the last tool called."""
    if words := text_of(message).split():
        return words[-1]
    return name_of(message["tool_calls"][-1])


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return sum(takewhile(bool, (x == y for x, y in zip(a, b, strict=False))))


# ---- how a template ends turns


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
    marks: bool = True
    """whether it ends an answer with anything"""
    stops: Mapping[str, str] = {}
    """the tokens at which generation stops: "text", after an answer; "call", after tool calls"""
    begins: str = ""
    """what it writes between the reasoning of an answer and its text, as far as it also stands
    before a text without reasoning"""
    opens: str = ""
    """what it writes before reasoning, and not before a text without any"""


def ending_of(tokenizer: Tokenizer) -> Ending:
    """The ending of the tokenizer's chat template or the fallback template."""
    return _ending(
        tokenizer, fallback_template(tokenizer), str(tokenizer.chat_template), len(tokenizer)
    )


@lru_cache(maxsize=4)  # the last two arguments stand for what may change in the tokenizer
def _ending(tokenizer: Tokenizer, template: str | None, own: str, size: int) -> Ending:
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": PROBE},
        {"role": "user", "content": "b"},
    ]

    in_parts = [with_content({**m, "content": []}, m["content"]) for m in talk]
    for chat in (talk, in_parts):
        with suppress(*REJECTIONS):
            if PROBE in rendered(tokenizer, template, chat, None, False):
                talk = chat
                break

    def render(count: int, prompt: bool = False) -> str:
        return rendered(tokenizer, template, talk[:count], None, prompt)

    added = [token for token in tokenizer.get_added_vocab() if token.strip()]
    either = "|".join(map(re.escape, added))
    rejected, tail, opened = True, "", ""
    with suppress(*REJECTIONS):  # one that rejects this chat may accept real ones
        tail, rejected = render(2).partition(PROBE)[2], False
        if render(2) == render(2, prompt=True):
            # in parts, each of a token or line: it begins where the tail differs from what stands
            # there before a user's turn, or one before, if both have a token that begins turns
            parts, others = (
                re.split(rf"(?={either})|(?<=\n)" if added else r"(?<=\n)", text)
                for text in (tail, render(3).partition(PROBE)[2])
            )
            shared = common_length(parts, others)
            begins = [t for t in re.findall(either, render(1)) if t != tokenizer.bos_token][:1]
            shared -= parts[:shared][-1:] == begins
            opened = "".join(parts[shared:])
            opened = opened if render(1, prompt=True).endswith(opened) else ""
    tail = tail.removesuffix(opened)
    marks = rejected or bool(tail.strip())
    stops = _stops(tokenizer, template, talk, marks)
    answers = opens = ""
    with suppress(*REJECTIONS):
        thought = {**talk[1], **dict.fromkeys(REASONING_KEYS, ARGUMENT)}
        text = rendered(tokenizer, template, [talk[0], thought], None, False)
        between = text.partition(ARGUMENT)[2].partition(PROBE)[0]
        before, head = text.partition(ARGUMENT)[0], render(2).partition(PROBE)[0]
        opens = before[common_length(before, head) :] if ARGUMENT in text else ""
        head = head.removeprefix(render(1, prompt=True))
        answers = between[len(between) - common_length(between[::-1], head[::-1]) :]
        answers = answers if answers.strip() else between
    return Ending(tuple(t for t in added if t in tail), opened, marks, stops, answers, opens)


def _stops(tokenizer: Tokenizer, template: str | None, talk: Any, marks: bool) -> dict[str, str]:
    """`Ending.stops`: what a template writes at the end of a turn, or else begins the next with."""
    call = {"type": "function", "function": {"name": PROBE, "arguments": {"a": "b"}}, "id": "a"}
    called = [talk[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "content": "b", "name": PROBE, "tool_call_id": "a"}
    chats = {"text": talk[:2] if marks else talk, "call": called if marks else [*called, result]}
    stops = {}
    for kind, chat in chats.items():
        for messages in forms(chat):
            with suppress(*REJECTIONS):
                tail = rendered(tokenizer, template, messages, None, False).partition(PROBE)[2]
                found = [token for token in special_tokens(tokenizer) if token in tail]
                if kind == "text" or not marks:
                    stop = min(found, key=tail.index, default="")
                else:
                    stop = next((token for token in found if tail.rstrip().endswith(token)), "")
                if stop:
                    stops[kind] = stop
                    break
    return stops


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """The special tokens other than bos, such as those that begin and end turns."""
    added = tokenizer.added_tokens_decoder.values()
    return [t.content for t in added if t.special and t.content != tokenizer.bos_token]


def rendered(
    tokenizer: Tokenizer,
    template: str | None,
    messages: Any,
    tools: Any,
    prompt: bool,
    **switches: Any,
) -> str:
    """The text of messages, with the generation prompt if `prompt`; `template` None is the
    tokenizer's own. Raises REJECTIONS."""
    options: Any = {"add_generation_prompt": prompt, "tools": tools, "chat_template": template}
    options |= switches
    with _bounded(str(template or tokenizer.chat_template)):
        if any(None in message.values() for message in messages):  # apply_chat_template drops it
            options |= tokenizer.special_tokens_map
            options["chat_template"] = tokenizer.get_chat_template(template, tools)
            return str(render_jinja_template([messages], **options)[0][0])
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@contextmanager
def _bounded(template: str) -> Iterator[None]:
    """Reject a template that takes more than MAX_SECONDS of the processor, from then on, and for
    whatever it raises. transformers renders in a sandbox, where a range has 100,000 numbers; loops
    in loops are not bounded there. Nor are they here in threads other than the main one."""
    fault = f"it takes more than {MAX_SECONDS} s"

    def stop(*_: object) -> NoReturn:
        TOO_SLOW.add(template)
        raise TemplateRuntimeError(fault)

    if template in TOO_SLOW:
        raise TemplateRuntimeError(fault)
    is_main = threading.current_thread() is threading.main_thread()
    has_timer = is_main and hasattr(signal, "setitimer")
    before: Any = has_timer and signal.signal(signal.SIGVTALRM, stop)
    try:
        if has_timer:
            signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
        yield
    except REJECTIONS:
        raise
    except Exception as error:  # such as OverflowError, KeyError and ZeroDivisionError
        raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


# ---- switches

GIVEN = ("messages", "tools", "add_generation_prompt", "message")  # not to be set
SWITCH = "{{%- set {0} = {0} if {0} is defined else "  # a default that a caller may override


def set_switches(tokenizer: Tokenizer, switches: Mapping[str, Any]) -> None:
    """Make values of the template's variables, such as enable_thinking, the template's defaults.

    They are part of the saved template then, and every program prompts with them.
    """

    def with_defaults(template: str) -> str:
        lines = (f"{SWITCH.format(k)}{_literal(v)} +%}}" for k, v in switches.items())
        return "".join(lines) + template

    own: Any = tokenizer.chat_template
    if isinstance(own, Mapping):
        tokenizer.chat_template = {name: with_defaults(text) for name, text in own.items()}
    elif own and switches:
        tokenizer.chat_template = with_defaults(own)


def apply_settings(tokenizer: Tokenizer, settings: Any) -> None:
    """Apply `chat_template`, a file, and `enable_thinking` and `template`, values of its variables.

    Raises:
        UserError: the file is no template, or the template has no such variable.
    """
    if file := settings.chat_template:
        try:
            tokenizer.chat_template = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", error)
            raise UserError(f"--chat-template {file} cannot be read: {reason}") from error
        require(bool(tokenizer.chat_template.strip()), f"--chat-template {file} is empty")
        try:
            rendered(tokenizer, None, [{"role": "user", "content": "a"}], None, True)
        except TemplateSyntaxError as error:
            place = f"--chat-template {file}, line {error.lineno}"
            raise UserError(f"{place}: {error.message}. Give a Jinja template") from error
        except REJECTIONS:  # it may accept real chats
            pass
    switches = dict(settings.template)
    is_twice = settings.enable_thinking is not None and "enable_thinking" in switches
    require(not is_twice, "enable_thinking is given twice, in template too: leave one of them out")
    if settings.enable_thinking is not None:
        switches["enable_thinking"] = settings.enable_thinking
    text = str(tokenizer.chat_template or "")
    for name in switches:
        fault = f"--template.{name} is given by the data or the tokenizer: leave it out"
        require(name not in GIVEN and not name.endswith("_token"), fault)
        tested = r"(?<![.\w])([a-z]\w+)(?: is (?:not )?defined| ?\| ?default)"
        known = re.findall(rf"{tested}|if (?:not )?(?!not\b)(\w+)\b(?![.(\[])", text)
        names = sorted({n for pair in known for n in pair if n} - set(GIVEN))
        flag = "--enable-thinking" if name == "enable_thinking" else f"--template.{name}"
        fault = f"{flag}: the model's chat template has no variable {name}; it has "
        fault += f"{some(names, 12) if names else 'none'}.{did_you_mean(name, names)}"
        require(bool(re.search(rf"\b{re.escape(name)}\b", text)), fault)
    set_switches(tokenizer, switches)


def _literal(value: Any) -> str:
    """A value as Jinja writes it: JSON but for none."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
