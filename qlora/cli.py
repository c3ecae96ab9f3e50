"""Flags and YAML -> one of the dataclasses of qlora.config, and what a script does with an error.

The dataclasses are the only list of settings: tyro makes the flags, the help and the config from
them. A recipe (`--config FILE.yaml`) becomes flags put before the user's own, so a value is read by
the same code wherever it is written, and the last word, the user's, wins. Scalars of a recipe are
taken as they are written, not as YAML guesses: `revision: 1.10` stays 1.10.

Left out on purpose: abbreviated flags, which would make each new setting a breaking change. Nothing
heavy is imported here, so that a mistake is answered at once.

One setting's value: from the words after its flag to its type, and back to one word.

A value is read by the same code wherever it was written, on a command line or in a recipe.

A YAML recipe -> the settings it makes, checked against the known names, with the file's name.

Scalars are taken as they are written, not as YAML guesses: `revision: 1.10` stays 1.10. They become
flags (qlora.cli), so that a value is read by the same code wherever it stands.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from qlora.config.lora import ALL_LINEAR
from qlora.errors import UserError, did_you_mean

Config = TypeVar("Config")


# --------------------------------------------------------------------------- what the scripts call


def run(
    main: Callable[[Config], int | None], config_class: type[Config], *, prog: str, interrupted: str
) -> NoReturn:
    """Parse the command line, call `main` with the config, and exit.

    With what `main` returns (None is 0); with 2 and one line `error: …` after a UserError; with 130
    and one line after Ctrl-C, where `interrupted` says what was kept. A bug keeps its traceback.
    """
    try:
        sys.exit(main(parse(config_class, prog=prog)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # somebody read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        sys.exit(130)


def parse(config_class: type[Config], argv: Sequence[str] | None = None, *, prog: str) -> Config:
    """The config that the flags, and the recipe they may name, ask for.

    `argv` is `sys.argv[1:]` unless given. Raises UserError for whatever is wrong with either, and
    SystemExit(0) after `--help`.
    """
    words = _name_positional(config_class, sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "--help-all"}.intersection(words):
        # whoever asks for help gets it, whatever else was written
        return _call_tyro(config_class, ["--help"], prog=prog, short="--help-all" not in words)
    settings = _settings(config_class)
    recipe, words = _take_recipe(words)
    values = read_recipe(recipe, settings) if recipe else {}
    if "trainer" in settings:
        flags, words = _take_trainer(words)
        values["trainer"] = {**values.get("trainer", {}), **flags}
    _refuse_unknown_flags(words, settings)
    given = {_name(word) for word in words if _is_flag(word)}
    _refuse_gaps(config_class, given | values.keys())
    tokens = [as_flag(name, value) for name, value in values.items()]
    try:
        return _call_tyro(config_class, tokens + words, prog=prog)
    except _BadValue as error:
        if recipe is None or error.name in given:
            raise
        raise UserError(f"{recipe}: {error.name}: {error.reason}") from None


# -------------------------------------------------------------- the settings, from the dataclasses


def _settings(config_class: Any) -> dict[str, Any]:
    """Name -> type of every setting; those of a dataclass inside it stand beside its own."""
    settings: dict[str, Any] = {}
    hints = get_type_hints(config_class)
    for member in fields(config_class):
        hint = hints[member.name]
        if "no_flag" not in member.metadata:
            settings |= _settings(hint) if is_dataclass(hint) else {member.name: hint}
    return settings


def _required(config_class: Any) -> list[str]:
    """Names of the settings that have no default."""
    hints = get_type_hints(config_class)
    names: list[str] = []
    for member in fields(config_class):
        if member.default is MISSING and member.default_factory is MISSING:
            hint = hints[member.name]
            names += _required(hint) if is_dataclass(hint) else [member.name]
    return names


# ------------------------------------------------------------------------------ the words, checked


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None  # -1e-4 is a value


def _name(word: str) -> str:
    """`--lora-alpha=32` -> `lora_alpha`"""
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def _name_positional(config_class: Any, words: Sequence[str]) -> list[str]:
    """The words, with the flag put before the first if that stands without it and may."""
    names = [member.name for member in fields(config_class) if "positional" in member.metadata]
    bare = bool(names and words) and not words[0].startswith("-")
    return [flag_of(names[0]), *words] if bare else [*words]


def _take(words: Sequence[str], pattern: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The flags of that pattern, each with its value, and the other words.

    For the flags that tyro does not see; it reads the others by the same two spellings,
    `--flag VALUE` and `--flag=VALUE`.
    """
    taken, rest = [], []
    queue = iter(words)
    for word in queue:
        flag, equals, value = word.partition("=")
        if not re.fullmatch(pattern, flag):
            rest.append(word)
            continue
        value = value if equals else next(queue, "--help")
        if not equals and _is_flag(value):
            raise UserError(f"{flag} needs a value")
        taken.append((flag, value))
    return taken, rest


def _take_recipe(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that `--config` names, and the other words."""
    taken, rest = _take(words, "--config")
    if len(taken) > 1:
        raise UserError(f"--config takes one recipe, got {len(taken)}: put them into one file")
    return (Path(taken[0][1]) if taken else None), rest


def _take_trainer(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What `--trainer.NAME VALUE` (or `--trainer '{NAME: VALUE}'`) sets, and the other words."""
    taken, rest = _take(words, r"--trainer(\..+)?")
    values: dict[str, Any] = {}
    for flag, text in taken:
        name = _name(flag).removeprefix("trainer").removeprefix(".")
        try:
            value = yaml.load(text, Loader=Loader)
        except yaml.YAMLError:
            raise UserError(f"{flag}: wanted a YAML value, got {text!r}") from None
        if not name and not isinstance(value, dict):
            raise UserError(f"{flag}: wanted {{NAME: VALUE}}, got {text!r}")
        values |= {name: value} if name else value
    return values, rest


def _refuse_unknown_flags(words: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Nothing is swallowed: a run with a typo would train with a default."""
    known = {flag_of(name) for name in ("config", "help", *settings)}
    known |= {flag_of(f"no-{name}") for name, hint in settings.items() if hint is bool}
    hints = {
        word.partition("=")[0]: did_you_mean(flag_of(_name(word)), known)
        for word in words
        if _is_flag(word) and (flag_of(_name(word)) not in known or word[1] != "-")
    }
    if hints:
        lines = [f"unknown flag {flag}.{hint}" for flag, hint in hints.items()]
        if "trainer" in settings and not all(hints.values()):
            lines.append("Any other of transformers.TrainingArguments: --trainer.NAME VALUE.")
        raise UserError(" ".join(lines))


def _refuse_gaps(config_class: type, given: Iterable[str]) -> None:
    missing = [flag_of(name) for name in _required(config_class) if name not in set(given)]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: write a value here or in a --config file")


# -------------------------------------------------------------------------------------------- tyro


class _BadValue(UserError):
    """A value that its setting cannot take; knows which, so that the recipe can be named."""

    def __init__(self, flag: str, reason: str) -> None:
        super().__init__(f"{flag}: {reason}")
        self.name, self.reason = _name(flag), reason


def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`read_value` reads them, for one kind of message and for what tyro has no type for."""
    hint: Any = info.type
    metavar = None if is_dataclass(hint) else metavar_of(hint)
    if metavar is None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*" if is_list(hint) else 1,
        metavar=metavar,
        instance_from_str=lambda words: read_value(hint, words),
        is_instance=lambda value: True,
        str_from_instance=show_default,
    )


def _as_tyro_wants_it(config_class: Any, *, short: bool) -> Any:
    """The class without flags for what has none, and in `short` without the rare ones."""
    hints = get_type_hints(config_class)
    members: list[Any] = []
    for member in fields(config_class):
        hint = hints[member.name]
        if is_dataclass(hint):
            inner = _as_tyro_wants_it(hint, short=short)
            given: Any = {} if _required(hint) else {"default": inner()}
            members.append((member.name, inner, field(**given, kw_only=True)))
        elif "no_flag" in member.metadata or (short and "rare" in member.metadata):
            hidden = Annotated[hint, tyro.conf.Suppress]  # type: ignore[valid-type]
            default: Any = {"default": member.default}
            if member.default is MISSING:
                default = {"default_factory": member.default_factory}
            members.append((member.name, hidden, field(**default, kw_only=True)))
    made: Any = make_dataclass(config_class.__name__, members, bases=(config_class,), frozen=True)
    made.__doc__ = config_class.__doc__
    return made


def _with_config_flag(config_class: Any) -> Any:
    """The class with --config among its flags, for the help: `parse` has taken it by then."""
    about = "settings from a YAML file; flags win over it"
    recipe = Annotated[str | None, tyro.conf.arg(metavar="FILE.yaml", help=about)]
    member = ("config", recipe, field(default=None, kw_only=True))
    return make_dataclass(config_class.__name__, [member], bases=(config_class,), frozen=True)


def _as_asked(config: Any, config_class: type[Config]) -> Config:
    """tyro's object as one of the class that was asked for."""
    hints = get_type_hints(config_class)
    values = {name: getattr(config, name) for name in hints}
    for name, hint in hints.items():
        if is_dataclass(hint):
            values[name] = _as_asked(values[name], hint)  # type: ignore[arg-type]
    return config_class(**values)


def _call_tyro(
    config_class: type[Config], words: Sequence[str], *, prog: str, short: bool = False
) -> Config:
    """tyro's parse, with its boxed messages turned into a UserError."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_rule)
    box = StringIO()
    about = (config_class.__doc__ or "").partition("\n")[0]
    if short:
        about += " (--help-all lists the flags that are rarely needed, too.)"
    try:
        with redirect_stderr(box):
            config, strays = tyro.cli(
                _with_config_flag(_as_tyro_wants_it(config_class, short=short)),
                prog=prog,
                description=about,
                args=words,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=registry,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _unboxed(box.getvalue(), stop) from None
    if strays:
        raise UserError(
            f"no flag takes {' '.join(strays)}: a value follows its flag, "
            "and a switch takes none but is turned off with --no-NAME"
        )
    return _as_asked(config, config_class)


def _unboxed(box: str, stop: BaseException) -> UserError:
    """What tyro refused: our own UserError where one is at the bottom of it, else the box's text.

    tyro draws a UserError from `read_value` or a `__post_init__` into its box, wrapped at 80
    columns; the exception still hangs on the SystemExit, unharmed.
    """
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    text = " ".join(lines[:rule])
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    if value := re.match(r"Error parsing (--[\w-]+):", text):
        return _BadValue(value[1], str(cause or text))
    if gap := re.match(r"Missing value for argument '(--[\w-]+)'", text):
        return UserError(f"{gap[1]} needs a value (one that starts with - is written {gap[1]}=-…)")
    return UserError(str(cause or text))


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


class Loader(yaml.SafeLoader):
    """PyYAML's, but 1e-4 is a number, as everyone who writes it means."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_recipe(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of what the file sets, read no further than `as_flag` needs.

    An empty value, as after `revision:`, leaves the default. A run's own run.yaml is a recipe too:
    its settings are below `config:`.
    """
    root = _compose(path)
    nested = [node for key, node in root.value if key.value == "config"]
    if nested and isinstance(nested[0], yaml.MappingNode):
        root = nested[0]
    values: dict[str, Any] = {}
    unknown = []
    for key, node in root.value:
        name = key.value.replace("-", "_") if isinstance(key, yaml.ScalarNode) else _written(key)
        if name not in settings:
            unknown.append(f"unknown key {name}.{did_you_mean(name, settings)}")
        elif name in values:
            raise UserError(f"{path}: {name} is set twice: keep one of the two")
        else:
            values[name] = _recipe_value(f"{path}: {name}", node, settings[name])
    if unknown:
        raise UserError(f"{path}: {' '.join(unknown)}")
    return {name: value for name, value in values.items() if value is not None}


def _compose(path: Path) -> yaml.MappingNode:
    """The file's mapping as YAML nodes, which still know how each value was written."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} must have lines of `name: value`, got {_written(root)}")
    return root


def _recipe_value(where: str, node: yaml.Node, hint: Any) -> Any:
    """One value: text as it is written, or a list, switch or mapping where the setting is one."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "null":
        return None
    if hint is bool:
        if kind != "bool":
            raise UserError(f"{where} must be true or false, got {_written(node)}")
        return yaml.SafeLoader.bool_values[node.value.lower()]
    if get_origin(hint) is Mapping:
        if kind != "map":
            raise UserError(f"{where} must be a mapping of NAME: VALUE, got {_written(node)}")
        return Loader("").construct_document(node)
    if isinstance(node, yaml.ScalarNode):
        return node.value
    items = node.value if is_list(hint) and kind == "seq" else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        wanted = "a value or a list of them" if is_list(hint) else "one value"
        raise UserError(f"{where} must be {wanted}, got {_written(node)}")
    return [item.value for item in items]


def _written(node: yaml.Node | None) -> str:
    """What came, for a message."""
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list" if node else "nothing"


def is_list(hint: Any) -> bool:
    """Whether a setting of that type takes several words."""
    return any(get_origin(part) in (tuple, Sequence) for part in (hint, *get_args(hint)))
