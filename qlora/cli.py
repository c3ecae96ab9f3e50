"""Parse flags and a YAML recipe into one of the dataclasses of qlora.config.

Flags, recipe keys and help are derived from the dataclasses: names, types, defaults, docstrings.
Flags override the recipe. Its scalars are read as text: `revision: 1.10` stays 1.10. Abbreviated
flags are refused, since a new setting could make one ambiguous. Heavy packages are not imported, so
that errors appear at once.

`Progress` shows how far a long job is: a bar on a terminal, else a line now and then.
"""

import argparse
import math
import os
import re
import select
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from tqdm import tqdm

from qlora.config import OLD_NAMES, Config, build, docs_of, is_required, settings_of
from qlora.config.lora import ALL_LINEAR
from qlora.errors import UserError, did_you_mean, require
from qlora.files import AsWritten, read_yaml

DOTTED = ("trainer", "template")  # settings whose entries have flags: --trainer.NAME
LINE_SECONDS = 30  # between the lines of a job where there is no terminal


class Progress(tqdm):  # type: ignore[type-arg]
    """tqdm's bar on a terminal; elsewhere, as in a log, plain lines LINE_SECONDS apart."""

    def __init__(self, items: Any = None, **settings: Any) -> None:
        self.has_bar, self.shown_at = sys.stderr.isatty(), time.perf_counter()
        if not self.has_bar:
            settings |= dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS)
            settings["bar_format"] = "{desc}: {percentage:.0f}% of {total_fmt}, {remaining} left"
        super().__init__(items, leave=False, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Redraw the bar, or print a line: not each time that tqdm.write redraws all bars."""
        if self.has_bar:
            super().display(msg, pos)
        elif time.perf_counter() - self.shown_at >= LINE_SECONDS:
            self.shown_at = time.perf_counter()
            print(self, file=sys.stderr, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar for a line of tqdm.write."""
        if self.has_bar:
            super().clear(nolock)

    def close(self) -> None:
        """Remove the bar; there is none in a log."""
        self.disable = self.disable or not self.has_bar
        super().close()


def parse(config_class: type[Config], words: Sequence[str] | None = None, *, prog: str) -> Config:
    """The config given by `words` (default: sys.argv[1:]) and the recipe that they name.

    Raises UserError for any error in either, and SystemExit(0) after `--help`.
    """
    settings = settings_of(config_class)
    words = sys.argv[1:] if words is None else words
    flags = _read_flags(words, settings, _parser(config_class, words, prog))
    recipes = flags.pop("config", [])
    if len(recipes) > 1:
        raise UserError(f"--config takes one recipe, got {len(recipes)}: merge them into one")
    where = f"{recipes[0]}: " if recipes else ""
    recipe = _read_recipe(recipes[0], settings) if recipes else {}
    required = [name for name, member in settings.items() if is_required(member)]
    if {"inspect", "inspect_rows"} & (flags.keys() | recipe.keys()):
        flags = {"output_dir": "."} | flags if "output_dir" not in recipe else flags
    if missing := [flag_of(name) for name in required if name not in flags | recipe]:
        raise UserError(f"missing {', '.join(missing)}: pass them, or set them in a --config file")
    given = [(where + n, n, v) for n, v in recipe.items() if n in DOTTED or n not in flags]
    given += [(flag_of(n), n, v) for n, v in flags.items()]
    values: dict[str, Any] = {}
    for source, name, value in given:
        name, _, key = name.partition(".")
        if name in DOTTED:  # merges the recipe's, --trainer's and each --trainer.NAME
            new = {key: read_yaml(source, value)} if key else _value(source, Mapping, value)
            values[name] = values.get(name, {}) | new
        elif "paths" in settings[name].metadata:
            fault = f"{source}: wanted a name or a list of names, got {str(value)[:60]}"
            require(isinstance(value, str | list | tuple), fault)  # a recipe's list is a tuple
            words = (value,) if isinstance(value, str) else tuple(map(str, value))
            values[name] = words[0] if len(words) == 1 else words
        else:
            values[name] = _value(source, settings[name].type, value)
    if values.get("trust_remote_code") and "trust_remote_code" not in flags:  # maybe a stranger's
        what = "trust_remote_code, which runs the code of the model's repository"
        raise UserError(f"{where}{what}, is not taken from a file: give --trust-remote-code")
    try:
        return build(config_class, values)
    except UserError as error:
        is_from_recipe = str(error).partition(" ")[0] in recipe.keys() - flags.keys()
        raise UserError(f"{where * is_from_recipe}{error}") from None


def flag_of(name: str) -> str:
    """`lora_alpha` -> `--lora-alpha`"""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if flag := re.match(r"argument (\S+): expected", message):
            message = f"{flag[1]} needs a value (one that starts with - is written {flag[1]}=-…)"
        raise UserError(message)


def _parser(config_class: Any, words: Sequence[str], prog: str) -> _Parser:
    """A parser with a group of flags per dataclass; rare flags are in the help of --help-all."""
    all_flags, settings = "--help-all" in words, settings_of(config_class)
    needed = [f"{flag_of(n)} … " for n, m in settings.items() if is_required(m)]
    parser = _Parser(
        usage=f"{prog} {''.join(needed)}[--config FILE] [FLAGS]",
        description="Flags override the recipe; --no-NAME turns off; --help-all shows all flags.",
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own lacks -1e-4
    nested = [member.type for member in fields(config_class) if is_dataclass(member.type)]
    for owner in (config_class, *nested):
        docs = docs_of(owner)
        group = parser.add_argument_group(docs[""].rstrip("."))
        if owner is config_class:
            group.add_argument("--help", "--help-all", action="help", help=argparse.SUPPRESS)
            group.add_argument("--config", action="append", metavar="RECIPE.yaml", help="YAML file")
        for member in (m for m in fields(owner) if settings.get(m.name) is m):
            is_hidden = "rare" in member.metadata and not all_flags
            _add_flag(group, member, "" if is_hidden else docs[member.name])
    starts = tuple(f"--{name}." for name in DOTTED if name in settings)
    for flag in {w.partition("=")[0] for w in words if w.startswith(starts)}:
        parser.add_argument(flag, dest=flag[2:].replace("-", "_"), help=argparse.SUPPRESS)
    return parser


def _add_flag(group: Any, member: Field[Any], doc: str) -> None:
    """Add a setting's flag, and --no-NAME for a switch; an empty `doc` hides it in the help."""
    add, flag, default = group.add_argument, flag_of(member.name), member.default
    note = "" if default in (None, False, (), MISSING) else f" (default {default})"
    note = " (required)" if is_required(member) else note
    text = doc.replace("%", "%%") + note if doc else argparse.SUPPRESS
    if member.type in (bool, bool | None):  # the latter may also be given as true or false
        count: Any = {"nargs": "?"} if member.type is not bool else {"action": "store_const"}
        add(flag, dest=member.name, const="true", metavar="false", help=text, **count)
        off = flag_of(f"no_{member.name}")
        add(off, dest=member.name, action="store_const", const="false", help=argparse.SUPPRESS)
        return
    item, kind = _item(member.type), _parts(member.type)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else member.metadata.get("choices", ())
    choices = [choice for choice in choices if isinstance(choice, str)]
    names = {int: "INT", float: "NUMBER", Mapping: "{NAME: VALUE}"}
    metavar = names.get(item or get_origin(kind) or kind, "NAME")
    if sum(map(len, choices)) > 60:  # too many for one line
        text = text if text is argparse.SUPPRESS else f"{text}; {', '.join(choices)}"
    elif choices:
        metavar = f"{{{','.join(choices)}}}"
    add(flag, dest=member.name, metavar=metavar, nargs="*" if item else None, help=text)


def _read_flags(words: Sequence[str], settings: Any, parser: _Parser) -> dict[str, Any]:
    """The flags in `words`: name -> text or list of texts."""
    words = [
        re.sub(r"^--(?!(trainer|template)\.)[^=]+", lambda m: m[0].replace("_", "-"), w)
        for w in words
    ]
    positional = [flag_of(name) for name, m in settings.items() if "positional" in m.metadata]
    if positional and words and not words[0].startswith("-"):
        words = [positional[0], *words]
    flags, rest = parser.parse_known_args(words)
    unknown = dict.fromkeys(w.partition("=")[0] for w in rest if re.match(r"--?[A-Za-z]", w))
    known = parser._option_string_actions
    lines = [f"unknown flag {flag}.{did_you_mean(flag, known)}" for flag in unknown]
    if "trainer" in settings and not all("?" in line for line in lines):
        lines.append("Other transformers.TrainingArguments: --trainer.NAME VALUE.")
    if lines:  # an ignored typo would train with a default
        raise UserError(" ".join(lines))
    if rest:
        more = "a value follows its flag; a switch takes none, and --no-NAME turns it off"
        raise UserError(f"unexpected {' '.join(rest)}: {more}")
    return vars(flags)


def _value(source: str, hint: Any, given: Any) -> Any:
    """Convert a flag's text or list of texts, or a recipe's text, tuple or dict, to type `hint`."""
    item, parts = _item(hint), _parts(hint)
    text = given if isinstance(given, str) else " ".join(map(str, given))
    if Mapping in (hint, get_origin(hint)):
        value = read_yaml(source, given) if isinstance(given, str) else given
        if not isinstance(value, dict):
            raise UserError(f"{source}: wanted {{NAME: VALUE}}, got {text!r}")
        return {str(name): number for name, number in value.items()}
    if item:
        # One plain word is a list of one: as a regular expression for the full name, as PEFT reads
        # a string, q_proj would match no layer.
        if re.fullmatch(r"\[.*\]", text, re.DOTALL) and not isinstance(given, tuple):
            given = tuple(read_yaml(source, text, AsWritten))
        elif not isinstance(given, tuple):
            if str in parts and (text == ALL_LINEAR or re.search(r"[\\*+?()\[\]{}|^$]", text)):
                return text
            words = [given] if isinstance(given, str) else given
            are_names = r"[\w.,;\s+-]+"  # not paths
            split = (re.split(r"[,;]\s*", w) if re.fullmatch(are_names, w) else [w] for w in words)
            given = tuple(word for part in split for word in part if word)
        if not all(isinstance(word, str) for word in given):
            raise UserError(f"{source}: wanted a list of plain values, got {list(given)}")
        return tuple(word if item is str else _number(source, item, word) for word in given)
    if bool in parts and text.lower() in yaml.SafeLoader.bool_values:
        return yaml.SafeLoader.bool_values[text.lower()]
    is_word = any(text in get_args(part) for part in parts)  # such as --calibration none
    if NoneType in parts and text.lower() in ("none", "null") and not is_word:
        return None
    if number := next((kind for kind in (int, float) if kind in parts), None):
        return _number(source, number, text)
    is_switch = set(parts) <= {bool, NoneType}
    if is_switch or not isinstance(given, str):
        wanted = "true or false" if is_switch else "one value"
        raise UserError(f"{source}: wanted {wanted}, got {text!r}")
    return text


def _number(source: str, kind: type[int] | type[float], text: str) -> int | float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        whole = "a whole" if kind is int else "a"
        raise UserError(f"{source}: wanted {whole} number, got {text!r}")
    return number


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _item(hint: Any) -> Any:
    """The item type of a list; None for any other setting."""
    return next((get_args(part)[0] for part in _parts(hint) if get_origin(part) is tuple), None)


def _read_recipe(path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's settings: name -> text, tuple or dict. An empty value leaves the default."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', error)}") from None
    written, typed = read_yaml(path, text, AsWritten), read_yaml(path, text)
    if isinstance(typed, dict) and isinstance(typed.get("config"), dict):  # of a run.yaml
        written, typed = written["config"], typed["config"]
    if not isinstance(typed, dict):
        raise UserError(f"{path}: wanted lines of `name: value`, got {text[:40]!r}")
    values: dict[str, Any] = {}
    unknown = []
    for key, value in written.items():
        name = OLD_NAMES.get(key.replace("-", "_"), key.replace("-", "_"))
        if name not in settings:
            unknown.append(f"unknown key {name}.{did_you_mean(name, settings)}")
        elif name in values:
            raise UserError(f"{path}: {name} is set twice: remove one")
        elif typed[key] is not None:
            value = typed[key] if isinstance(value, dict) else value
            values[name] = tuple(value) if isinstance(value, list) else value
    if unknown and "trainer" in settings and not all("?" in line for line in unknown):
        unknown.append("Other transformers.TrainingArguments go under `trainer:`.")
    if unknown:
        raise UserError(f"{path}: {' '.join(unknown)}")
    return values


def drop_lost_output() -> None:
    """Discard what is still printed where nobody reads it: the terminal was closed, or the reader
    of the pipe ended on the same signal, as `| tee` does."""
    for number in (1, 2) if hasattr(select, "poll") else ():
        poll = select.poll()
        poll.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def show_seconds(seconds: float) -> str:
    """`45 s`, `12 min 5 s` or `3 h 20 min`"""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
