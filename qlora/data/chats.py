"""Records -> chat messages.

A message has a role (system, user, assistant, tool) and content, as text, as a list of parts, or
as ShareGPT's `from` and `value`. Parts may hold reasoning and tool calls, too. `weight` or `train`
of a message, 0 or 1, tells whether it is learned. Other keys stay for the template.

Left out: images and sound, weights of a message other than 0 and 1, the spelling of numbers inside
tool calls (templates write 1.10 as 1.1).
Sources: OpenAI's chat format; ShareGPT, `history` and parts with a `value` as LLaMA-Factory reads
them; `thinking` parts as Anthropic has them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from qlora.data.readers import JSON
from qlora.data.records import Kinds, Record, Records, kind_of, string_of
from qlora.errors import UserError, did_you_mean, require, some
from qlora.files import read_run_file

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "function_call"), "assistant")
ROLES |= dict.fromkeys(("tool", "observation", "function_response", "function"), "tool")
LOSS_SWITCHES = ("weight", "train", "training", "loss", "train_detail")  # of a message
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # as text in a cell
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages, types of parts
MEDIA = (
    "image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url",
    "file", "input_file",
)  # fmt: skip
"""types of parts that hold no text, but a path or an address of it"""
AS_TEXT = "value"
"""key of a message whose tool calls were written as text, which some templates need"""


@dataclass(frozen=True)
class Reading:
    """How chats are read from records, as given in training."""

    train_on: str = "all"
    """the turns with loss: "all" of the assistant's, or the "last" one"""
    roles: Mapping[str, str] = field(default_factory=dict)
    """other names of roles"""
    reasoning_content: str = REASONING_KEYS[0]
    """the column with the reasoning of a record's last answer"""

    def __post_init__(self) -> None:
        if odd := {name: role for name, role in self.roles.items() if role not in ROLES.values()}:
            wanted = ", ".join(dict.fromkeys(ROLES.values()))
            raise UserError(f"roles must map names to {wanted}, got {odd}")

    @staticmethod
    def of(values: Any) -> "Reading":
        """From an object or a mapping (of run.yaml) with attributes of these names."""
        get = values.get if isinstance(values, Mapping) else lambda name: getattr(values, name)
        given = {name: get(name) for name in ("train_on", "roles", "reasoning_content")}
        return Reading(**{name: value for name, value in given.items() if value})

    def require_column(self, records: Records, source: str) -> None:
        """Refuse records without the column of reasoning that the user named."""
        column, known = self.reasoning_content, [c for part in records.parts for c in part.columns]
        fault = f"--reasoning-content {column}: {source} has no such column; it has "
        fault += f"{some(list(dict.fromkeys(known)), 12)}.{did_you_mean(column, known)}"
        require(column == REASONING_KEYS[0] or column in known, fault)

    def kinds(self, kinds: Kinds) -> Kinds:
        """Kinds of records with the column of reasoning beside those of chats."""
        column = self.reasoning_content
        return {k: (*more, column) if "tools" in more else more for k, more in kinds.items()}


AS_IT_IS = Reading()


def reading_in(adapter: Path) -> Reading:
    """How the run that wrote an adapter's folder, or a checkpoint-N of it, read chats."""
    folder = adapter.parent if adapter.name.startswith("checkpoint-") else adapter
    return Reading.of(read_run_file(folder).get("config", {}))


@dataclass(frozen=True)
class Chat:
    """A record as messages for a chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    first: int  # index of the first message that may have loss; those before it are a `prompt`
    no_loss: frozenset[int] = frozenset()  # indices of messages whose weight is 0


def chat_of(record: Record, reading: Reading = AS_IT_IS) -> Chat | None:
    """The record as a chat; None for a `text` record."""
    kind, first, names = kind_of(record), 0, {**ROLES, **reading.roles}
    if kind == ("text",):
        return None
    if kind == ("prompt", "completion"):
        prompt = _messages(record["prompt"], "user", "prompt", names)
        first = len(prompt)
        messages = prompt + _messages(record["completion"], "assistant", "completion", names)
    elif kind == ("instruction", "output"):
        history = _parsed(record.get("history"), "history") or []
        require(isinstance(history, list), f"history must be a list, got {str(history)[:60]!r}")
        last = [alpaca_prompt(record), string_of(record["output"], "output")]
        messages = _turns([*history, last])
    else:
        messages = _messages(_parsed(record[kind[0]], kind[0]) or [], None, kind[0], names)
    system = string_of(record.get("system"), "system")
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages, first = [{"role": "system", "content": system}, *messages], first + 1
    thought = string_of(record.get(reading.reasoning_content), reading.reasoning_content)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if thought.strip() and answers:
        messages[answers[-1]] = {REASONING_KEYS[0]: thought, **messages[answers[-1]]}
    no_loss = frozenset(i for i, message in enumerate(messages) if message.pop("no_loss", False))
    if reading.train_on == "last":
        learned = [i for i in answers if i not in no_loss and _says(messages[i])]
        no_loss |= frozenset(learned[:-1])
    tools = _parsed(record.get("tools"), "tools") or []
    is_list = isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    require(is_list, f"tools must be a list of objects, got {str(tools)[:60]!r}")
    return Chat(messages, tools or None, first, no_loss)


def _says(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


def alpaca_prompt(record: Record) -> str:
    """`instruction` and `input`, as far as they are not blank, with a blank line between them."""
    parts = (string_of(record.get(column), column) for column in ("instruction", "input"))
    return "\n\n".join(part for part in parts if part.strip())


def _turns(pairs: list[Any]) -> list[dict[str, Any]]:
    """Messages of LLaMA-Factory's [question, answer]; those of `history` are learned too."""
    if odd := [pair for pair in pairs if not isinstance(pair, list) or len(pair) != 2]:
        raise UserError(f"history must hold [question, answer] lists, got {str(odd[0])[:60]!r}")
    turns = zip(cycle(("user", "assistant")), chain.from_iterable(pairs), strict=False)
    return [{"role": role, "content": string_of(text, "history")} for role, text in turns]


def _messages(
    value: Any, role: str | None, column: str, names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A list of messages as it is, also as JSON, or text as one message of `role`."""
    if isinstance(value, str) and MESSAGES.match(value):
        turns = _parsed(value, column)  # raises for Python's own form, as pandas writes it to csv
        is_chat = all(
            isinstance(turn, Mapping) and str(turn.get("role")) in names for turn in turns
        )
        value = turns if is_chat else value
    if isinstance(value, (list, tuple)):
        return [_message(turn, names) for turn in value]
    if role is None or isinstance(value, Mapping):
        raise UserError(f"{column} must be a list of messages, got a {type(value).__name__}")
    return [{"role": role, "content": string_of(value, column)}]


def _message(turn: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """`role`, `content`, also from ShareGPT's from/value, and `no_loss` if the message's weight is
    0; other keys stay for the template."""
    if not isinstance(turn, Mapping):
        raise UserError(f'a message must be {{"role": …, "content": …}}, got {str(turn)[:60]!r}')
    rest = {key: value for key, value in turn.items() if value is not None}
    sender, value = rest.pop("from", None), rest.pop("value", None)
    role, content = rest.pop("role", None) or sender, rest.pop("content", value)
    if not isinstance(role, str) or role not in names:
        hint = did_you_mean(str(role), names) or " Give it a meaning with `roles:` in a recipe."
        raise UserError(f"unknown role {role!r}, expected one of {', '.join(names)}.{hint}")
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content, found = _joined(content)
        rest = found | rest
    if call := rest.pop("function_call", None):  # OpenAI's older form
        rest.setdefault("tool_calls", [{"type": "function", "function": call}])
    calls = rest.get("tool_calls", [])
    if not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise UserError(f"tool_calls must be a list of calls, got {str(calls)[:60]!r}")
    if role == "function_call" and isinstance(content, str) and (calls := _calls(content)):
        rest |= {"tool_calls": calls, AS_TEXT: content}
        content = None
    switches = {key: rest.pop(key) for key in LOSS_SWITCHES if key in rest}
    for key, switch in switches.items():
        if not isinstance(switch, int | float) or switch not in (0, 1):
            wanted = f"{key} of a message must be 0 or 1, or false or true"
            raise UserError(f"{wanted}, got {str(switch)[:60]}: a loss is whole or left out")
    rest |= {} if all(switches.values()) else {"no_loss": True}
    text = {} if content is None else {"content": string_of(content, "the content of a message")}
    return {"role": names[role]} | text | rest


def _is_call(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(call.get("function") or {}, Mapping)


def _joined(parts: list[Any]) -> tuple[str | None, dict[str, Any]]:
    """The text of a message's parts, None if no part is text; and its reasoning and tool calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        kind = str(part.get("type"))
        keys = ("text", "value", *(key for key in ("tool_call", *REASONING_KEYS) if key == kind))
        text = next((part[key] for key in keys if key in part), None)
        media = [name for name in MEDIA if name == kind or part.get(name) is not None]
        if kind == "tool_call" and (found := _calls(text)):
            calls += found
            continue
        shown = " ".join([*media[:1], str(part)[:80]])
        is_text = isinstance(text, str | int | float) and not media
        require(is_text, f"a message has a part without text: {shown}")
        (thoughts if kind in REASONING_KEYS else texts).append(string_of(text))
    others: dict[str, Any] = {REASONING_KEYS[0]: "\n".join(thoughts)} if thoughts else {}
    others |= {"tool_calls": calls} if calls else {}
    return "".join(texts) if texts or not others else None, others


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls written as {"name": …, "arguments": …} or a list of these, also as JSON; empty if
    it is anything else."""
    try:
        value = JSON.decode(value) if isinstance(value, str) else value
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, Mapping) and {"name", "arguments"} <= set(call) for call in calls):
        return []
    return [{"type": "function", "function": dict(call)} for call in calls]


def _parsed(value: Any, column: str) -> Any:
    """The value, parsed as JSON if it is a string, as the lists of a .csv file are."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return JSON.decode(value)
    except ValueError as error:
        raise UserError(f"{column} must be a list, or JSON of one, got {value[:60]!r}") from error
