"""The commands: flags and a YAML recipe become a config, which one function of the package takes.

The dataclasses of qlora.config are the only list of settings: their names, types, defaults and
docstrings make the flags, the keys of a recipe and the help. Flags win over the recipe, whose
scalars are taken as they are written: `revision: 1.10` stays 1.10. Abbreviated flags are left out,
because each new setting could make one ambiguous. argparse is not used: it knows no recipe, and
takes the -1e-4 of `--weights 1 -1e-4` for a flag. Nothing heavy is imported until the config is
complete, so that a mistake is answered at once.
"""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field
from importlib import import_module
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml

from qlora import __version__, config
from qlora.config.lora import ALL_LINEAR
from qlora.errors import UserError, did_you_mean
from qlora.files import AsWritten, read_yaml

Config = TypeVar("Config")
Fields = Mapping[str, tuple[Any, Field[Any]]]  # by name: the dataclass and its field
Texts = list[tuple[str, str, list[str]]]  # where it is written, the name of the setting, its words

COMMANDS: dict[str, tuple[Any, str, str]] = {  # settings; module:function; what Ctrl-C leaves
    "train": (
        config.TrainConfig, "qlora.training:train",
        "--resume goes on from the last checkpoint, if there is one yet",
    ),
    "merge": (
        config.MergeConfig, "qlora.merge:merge",
        "there is no merged checkpoint yet, the adapter is untouched; run again",
    ),
    "chat": (config.ChatConfig, "qlora.apps.chat:chat", "nothing is kept of a chat"),
    "evaluate": (
        config.EvaluateConfig, "qlora.apps.evaluation:evaluate",
        "nothing was written; run again, with --limit N for fewer rows",
    ),
    "report": (config.ReportConfig, "qlora.apps.report:report", "nothing was written"),
    "portable": (
        config.PortableConfig, "qlora.adapters.portable:make_portable",
        "nothing was written, the adapter is untouched",
    ),
}  # fmt: skip


def main() -> None:
    """`qlora COMMAND ...`, the console command."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run(name, prog=f"qlora {name}", words=words)
    elif name in ("-h", "--help"):
        about = [
            f"  {name:<10} {config.docs_of(command[0])['']}" for name, command in COMMANDS.items()
        ]
        print("usage: qlora COMMAND [FLAGS]\n       qlora COMMAND --help\n", *about, sep="\n")
    elif name == "--version":
        print(f"qlora {__version__}")
    else:
        hint = did_you_mean(name, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        _stop(2, f"error: unknown command {name}.{hint}")


def run(name: str, *, prog: str, words: Sequence[str] | None = None) -> None:
    """Parse the command line and call the command's function with the config.

    Exits with 2 and one line `error: …` after a UserError or when the GPU's memory ran out, and
    with 130 and one line after Ctrl-C. Any other exception is a bug and keeps its traceback.
    """
    config_class, function, interrupted = COMMANDS[name]
    try:
        settings = parse(config_class, words, prog=prog)
        module, _, function = function.partition(":")
        getattr(import_module(module), function)(settings)
        sys.stdout.flush()
    except UserError as error:
        _stop(2, f"error: {error}")
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _stop(130, f"interrupted: {interrupted}")
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported here
            raise
        peak = sys.modules["torch"].cuda.max_memory_allocated() / 2**30
        sizes = "--max-length, --per-device-train-batch-size or --max-new-tokens"
        mend = f"lower {sizes}, as far as {prog} has them, or take a smaller model"
        _stop(2, f"error: the GPU's memory ran out after {peak:.2f} GiB: {mend}")


def _stop(code: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)


def parse(config_class: type[Config], words: Sequence[str] | None = None, *, prog: str) -> Config:
    """The config that `words` (by default sys.argv[1:]) and the recipe among them ask for.

    Raises UserError for whatever is wrong with either, and SystemExit(0) after `--help`.
    """
    settings = dict(config.settings_of(config_class))
    words = sys.argv[1:] if words is None else words
    if not {"-h", "--help", "--help-all"}.isdisjoint(words):
        print(_help(settings, prog, every="--help-all" in words), flush=True)
        sys.exit(0)
    flags = _split(words, settings)
    path, *more = [texts[0] for _, name, texts in flags if name == "config"] or [""]
    if more:
        raise UserError(f"--config takes one recipe, got {1 + len(more)}: put them into one file")
    given = {name for _, name, _ in flags} - {"trainer"}
    recipe = _read_recipe(path, settings) if path else []
    recipe = [text for text in recipe if text[1] not in given]
    names = given | {name for _, name, _ in recipe}
    if missing := [
        _flag(n) for n, (_, m) in settings.items() if config.is_required(m) and n not in names
    ]:
        raise UserError(f"missing {', '.join(missing)}: write a value here or in a --config file")
    values: dict[str, Any] = {}
    for where, name, texts in [*recipe, *(flag for flag in flags if flag[1] != "config")]:
        key = where.partition("--trainer.")[2].replace("-", "_")
        new = (
            {key: read_yaml(where, texts[0])}
            if key
            else _value(where, settings[name][1].type, texts)
        )
        values[name] = {**values.get(name, {}), **new} if name == "trainer" else new
    try:
        return config.build(config_class, values)
    except UserError as error:
        is_recipes = str(error).partition(" ")[0] in names - given
        raise UserError(f"{path}: {error}" if is_recipes else str(error)) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _split(words: Sequence[str], settings: Fields) -> Texts:
    """`--flag VALUE ...` and `--flag=VALUE`. What begins like a flag is one; -1e-4 is not."""
    first = [_flag(n) for n, (_, member) in settings.items() if "positional" in member.metadata]
    split: list[tuple[str, list[str]]] = [(first[0] if first else "", [])]
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            flag, equals, text = word.partition("=")
            split.append((flag, [text] if equals else []))
        else:
            split[-1][1].append(word)
    hints = {"config": str} | {name: member.type for name, (_, member) in settings.items()}
    known = {_flag(name): name for name in hints}
    known |= {_flag(f"no_{name}"): name for name, hint in hints.items() if hint is bool}
    more = " Any other of transformers.TrainingArguments: --trainer.NAME VALUE."
    more = more if "trainer" in settings else ""
    texts, unknown = [], []
    for raw, values in split if split[0][1] else split[1:]:
        flag = raw.replace("_", "-")
        is_key = flag.startswith("--trainer.") and "trainer" in settings
        name = "trainer" if is_key else known.get(flag, "")
        hint = hints.get(name)
        is_list = _types(hint)[1] is not None
        strays = values if hint is bool or not name else values[1:] if not is_list else []
        if raw and not name:
            unknown.append(f"unknown flag {raw}.{did_you_mean(flag, known) or more}")
        elif strays:
            wanted = (
                "a value follows its flag, a switch takes none and is turned off with --no-NAME"
            )
            raise UserError(f"no flag takes {' '.join(strays)}: {wanted}")
        elif hint is bool:
            values = ["true" if flag == _flag(name) else "false"]
        elif not values and not is_list:
            raise UserError(f"{flag} needs a value (one that starts with - is written {flag}=-…)")
        texts.append((flag, name, values))
    if unknown:  # nothing is swallowed: a run with a typo would train with a default
        raise UserError(" ".join(unknown))
    return texts


def _value(where: str, hint: Any, words: Sequence[str]) -> Any:
    """The words after a flag, or a recipe's text -> the value of the setting's type."""
    text, (parts, item) = " ".join(words), _types(hint)
    if get_origin(hint) is Mapping:
        value = read_yaml(where, text)
        if not isinstance(value, dict):
            raise UserError(f"{where}: wanted {{NAME: VALUE}}, got {text!r}")
        return {str(name): number for name, number in value.items()}
    if item and re.fullmatch(r"\[.*\]", text, re.DOTALL):
        words = read_yaml(where, text, AsWritten)
    elif item and str in parts and (text == ALL_LINEAR or re.search(r"[\\*+?()\[\]{}|^$]", text)):
        return text  # a regular expression; one plain word is a list of one, unlike in PEFT
    elif item:
        lists = [word.split(",") if re.fullmatch(r"[\w.,+-]+", word) else [word] for word in words]
        words = [word for some in lists for word in some if word]
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: wanted a list of plain values, got {text!r}")
    if item:
        return tuple(word if item is str else _number(where, item, word) for word in words)
    if bool in parts and text.lower() in yaml.SafeLoader.bool_values:
        return yaml.SafeLoader.bool_values[text.lower()]
    if hint is bool:
        raise UserError(f"{where}: wanted true or false, got {text!r}")
    if NoneType in parts and text.lower() in ("none", "null"):
        return None
    number = next((kind for kind in (int, float) if kind in parts), None)
    return _number(where, number, text) if number else text


def _number(where: str, kind: type[int] | type[float], text: str) -> int | float:
    with suppress(ValueError):
        if math.isfinite(kind(text)):
            return kind(text)
    raise UserError(f"{where}: wanted {'a whole' if kind is int else 'a'} number, got {text!r}")


def _types(hint: Any) -> tuple[tuple[Any, ...], Any]:
    """The alternatives of a type, and what a list among them holds, or None."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return parts, next((get_args(part)[0] for part in parts if get_origin(part) is tuple), None)


def _read_recipe(path: str, settings: Fields) -> Texts:
    """What the file sets, each value as one text; an empty one, as after `revision:`, sets nothing.

    A run's own run.yaml is a recipe too: its settings are below `config:`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', error)}") from None
    written, typed = read_yaml(path, text, AsWritten), read_yaml(path, text)
    if isinstance(typed, dict) and isinstance(typed.get("config"), dict):
        written, typed = written["config"], typed["config"]
    if not isinstance(typed, dict):
        raise UserError(f"{path}: wanted lines of `name: value`, got {text[:40]!r}")
    names = {key: key.replace("-", "_") for key in written}
    names = {key: config.OLD_NAMES.get(name, name) for key, name in names.items()}
    if unknown := [name for name in names.values() if name not in settings]:
        lines = (f"unknown key {name}.{did_you_mean(name, settings)}" for name in unknown)
        raise UserError(f"{path}: {' '.join(lines)}")
    texts = []
    for key, value in written.items():
        value = typed[key] if isinstance(value, dict) else value
        if not isinstance(value, str):
            value = yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()
        if typed[key] is not None:
            texts.append((f"{path}: {names[key]}", names[key], [value]))
    return texts


def _help(settings: Fields, prog: str, *, every: bool) -> str:
    """The flags by dataclass, the rare ones only if `every` is asked for."""
    owner, width = next(iter(settings.values()))[0], get_terminal_size().columns
    docs = config.docs_of(owner)
    needed = [
        f"{_flag(name)} …" for name, (_, member) in settings.items() if config.is_required(member)
    ]
    about = f"{docs['']} Flags win over the recipe; --no-NAME turns a switch off"
    about += "." if every else "; --help-all lists the rare flags too."
    usage = f"usage: {prog} {' '.join(needed)} [--config RECIPE.yaml] [FLAGS]"
    lines = [fill(usage, width), fill(about, width), ""]
    lines.append(f"  {'--config RECIPE.yaml':<32}settings by name, in a YAML file")
    for name, (group, member) in settings.items():
        if group is not owner:
            owner, docs = group, config.docs_of(group)
            lines += ["", fill(docs[""], width)]
        metavar, shown = _metavar(member), f" (default {member.default})"
        if member.default is True and not metavar:
            shown = f" (off: {_flag(f'no_{name}')})"
        elif member.default in (None, False, (), MISSING):
            shown = " (required)" * config.is_required(member)
        flag = f"  {_flag(name)} {metavar}"
        if every or "rare" not in member.metadata:
            text = f"{flag:<32}  {docs[name]}{shown}"
            lines.append(fill(text, width, subsequent_indent=" " * 34, break_on_hyphens=False))
    return "\n".join(lines)


def _metavar(member: Field[Any]) -> str:
    """How the help shows a value; nothing for a switch."""
    (part, *_), item = _types(member.type)
    choices = member.metadata.get("choices", get_args(part))
    if choices and isinstance(choices[0], str):
        return f"{{{','.join(choices)}}}"
    names = {int: "INT", float: "NUMBER", str: "NAME", bool: "", Mapping: "{NAME: VALUE}"}
    return f"{names[item]} ..." if item else names[get_origin(part) or part]
