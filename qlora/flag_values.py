"""One setting's value: from the words after its flag to its type, and back to one word.

A value is read by the same code wherever it was written, on a command line or in a recipe.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from qlora.errors import UserError
from qlora.lora_config import ALL_LINEAR
from qlora.recipe import Loader, is_list


def flag_of(name: str) -> str:
    """`lora_alpha` -> `--lora-alpha`"""
    return "--" + name.replace("_", "-")


def as_flag(name: str, value: Any) -> str:
    """One word, whatever it holds: a list or mapping travels as JSON, which `read_value` takes."""
    if isinstance(value, bool):
        return flag_of(name if value else f"no-{name}")
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"{flag_of(name)}={text}"


def read_value(hint: Any, words: list[str]) -> Any:
    """The words after a flag -> the value of its type, or a UserError with what was wanted."""
    if not is_list(hint):
        return _read_one(hint, words[0])
    if kind := next((k for k in (int, float) if k in _items(hint)), None):
        numbers = re.findall(r"[^\s,\[\]]+", " ".join(words))
        return tuple(_read_number(kind, number) for number in numbers)
    if len(words) == 1 and re.fullmatch(r"\[.*\]", words[0], re.DOTALL):
        return _read_bracketed(words[0])
    # One plain word is a list of one: taken as a regular expression over the full name, as PEFT
    # takes a string, q_proj would match no layer.
    if len(words) == 1 and str in get_args(hint) and _is_pattern(words[0]):
        return words[0]
    return tuple(words)


def _items(hint: Any) -> tuple[Any, ...]:
    """What a list setting holds: the arguments of its tuple."""
    options = (hint, *get_args(hint))
    return next((get_args(option) for option in options if get_origin(option) is tuple), ())


def _read_bracketed(text: str) -> tuple[str, ...]:
    """`["q_proj"]`, as `as_flag` writes it, or `[q_proj]`, as one does by hand."""
    try:
        items = json.loads(text)
    except ValueError:
        try:
            items = yaml.load(text, Loader=yaml.BaseLoader)
        except yaml.YAMLError:
            items = [None]
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"wanted a list of names, got {text!r}")
    return tuple(items)


def _is_pattern(word: str) -> bool:
    return word == ALL_LINEAR or not set(word).isdisjoint("\\*+?()[]{}|^$")


def _read_one(hint: Any, text: str) -> Any:
    options = get_args(hint)
    if get_origin(hint) is Mapping:
        return _read_mapping(text)
    if get_origin(hint) is Literal:
        if text in options:
            return text
        raise UserError(f"wanted {' or '.join(options)}, got {text!r}")
    if NoneType in options:
        is_none = text.lower() in ("none", "null")
        return None if is_none else _read_one(options[options.index(NoneType) - 1], text)
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return _read_number(hint, text) if hint in (int, float) else text


def _read_mapping(text: str) -> dict[str, Any]:
    """`{"q_proj": 8}`, as `as_flag` writes it, or `{q_proj: 8}`, as one does by hand."""
    value: Any = None
    with suppress(ValueError):
        value = json.loads(text)
    if value is None:
        with suppress(yaml.YAMLError):
            value = yaml.load(text, Loader=Loader)
    if not isinstance(value, dict):
        raise UserError(f"wanted {{NAME: VALUE}}, got {text!r}")
    return {str(key): item for key, item in value.items()}


def _read_number(kind: type[int] | type[float], text: str) -> int | float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"wanted {'a whole' if kind is int else 'a'} number, got {text!r}")
    return number


def show_default(value: Any) -> list[str]:
    """A default as the help prints it."""
    return list(value) if isinstance(value, tuple) else [str(value)]


def metavar_of(hint: Any) -> str | None:
    """What the help shows for a value of that type; None for a type that tyro reads itself."""
    options = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is Mapping:
        return "{NAME: VALUE}"
    if get_origin(hint) is Literal:
        return "{" + ",".join(options) + "}"
    if is_list(hint):
        numbers = not {int, float}.isdisjoint(_items(hint))
        return "NUMBER [NUMBER ...]" if numbers else "NAME [NAME ...]"
    if bool in options:
        return "{true,NAME}" if str in options else "{true,false}"
    return {int: "INT", float: "NUMBER", str: "STR"}.get(options[0] if options else hint)
