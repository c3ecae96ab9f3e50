"""Whether a value from outside, such as one of a JSON file, is of the type of an annotation."""

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from qlora.errors import UserError

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
}
WORDS[NoneType] = "nothing"
MOST = 2**63 - 1  # of a whole number, in torch and safetensors


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of type `hint`; numbers must be finite, whole ones of 64 bits. A list is a
    tuple, whose items are of one type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (UnionType, Union):
        return any(fits(value, each) for each in args)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in args)
    if origin in (tuple, list):
        return isinstance(value, list | tuple | set | frozenset) and all(
            fits(item, args[0]) for item in value
        )
    if origin is Mapping:
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(fits(key, args[0]) and fits(item, args[1]) for key, item in items)
    if hint is float and type(value) is float:
        return math.isfinite(value)
    if hint in (int, float):
        return type(value) is int and -MOST <= value <= MOST
    return isinstance(value, hint) and (hint is not int or type(value) is int)


def described(hint: Any) -> str:
    """A type in words, for a message."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union, Literal):
        return " or ".join(described(each) for each in args if each is not NoneType)
    if origin in (tuple, list):
        return f"a list, each item {described(args[0])}"
    if origin is Mapping:
        each = f", each value {described(args[1])}" if args[1] is not Any else ""
        return f"NAME: VALUE pairs{each}"
    return WORDS.get(hint) or (hint.__name__ if isinstance(hint, type) else repr(hint))


def require_types(values: Mapping[str, Any], types: Mapping[str, Any], where: Any) -> None:
    """Raise a UserError that names all `values` of another type than the one in `types`; those that
    are missing are not looked at."""
    wrong = [
        f"{name} must be {described(types[name])}, got {shown(values[name])}"
        for name in types.keys() & values.keys()
        if not fits(values[name], types[name])
    ]
    if wrong:
        raise UserError(f"{where}: {'; '.join(sorted(wrong))}")


def shown(value: Any) -> str:
    """The beginning of a value's repr."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
