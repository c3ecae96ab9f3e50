"""The size and shape of the code, against the limits it is held to.

    python benchmarks/structure.py            a table; exits with 1 where a limit is passed
    python benchmarks/structure.py --hops     also the way of train.py's config to the first step

Limits are raised by the commit that adds what needs the lines, and says so.

Lines are raw lines, as `wc -l` counts them. A function is measured with decorators and docstring.

`--hops` runs train.py on a tiny random model and stops it at the first training step. It lists the
functions of qlora/ in the order of their first call, keeps those that receive the config or a part
of it, and counts the files they are in, and how often the list returns to a file that it had left.
"""

import argparse
import ast
import json
import os
import runpy
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
Call = tuple[str, str]


def lines_of(paths: Iterable[Path]) -> int:
    """Raw lines of all files together."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and place of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield node.end_lineno - first + 1, f"{path.relative_to(ROOT)}:{node.name}"


def contract_lines() -> int:
    """Lines of the import contract in pyproject.toml, without blank lines and comments."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "importlinter" in tomllib.loads(text)["tool"]
    section = text.partition("\n[tool.importlinter]")[2]
    section = section.partition("\n[tool.")[0] if "\n[tool." in section else section
    return 1 + sum(bool(line.strip()) and line[0] != "#" for line in section.splitlines())


def figures() -> Iterator[tuple[str, int, int, str]]:
    """What is counted, the count, its limit, and where the largest one is."""
    package = sorted((ROOT / "qlora").rglob("*.py"))
    longest_function = max(entry for path in package for entry in functions(path))
    longest_file = max((lines_of([path]), str(path.relative_to(ROOT))) for path in package)
    yield "lines in qlora/", lines_of(package), 27_845, ""
    yield ".py files in qlora/", len(package), 127, ""
    yield "of them outside a package", sum(p.parent.name == "qlora" for p in package), 10, ""
    yield "lines of import contract", contract_lines(), 20, ""
    yield "longest function", longest_function[0], 60, longest_function[1]
    yield "longest file", longest_file[0], 490, longest_file[1]
    yield "lines of qlora/cli.py", lines_of([ROOT / "qlora/cli.py"]), 300, ""
    yield "lines in tests/", lines_of((ROOT / "tests").rglob("*.py")), 24_030, ""


# ---- the way of the config


class _FirstStep(BaseException):
    """Raised at the first training step, past every `except Exception`."""


def calls_until_first_step() -> tuple[list[Call], list[Call]]:
    """(file, function) by first call: those that receive the config, and all of them."""
    with_config: dict[Call, None] = {}
    every: dict[Call, None] = {}
    package = str(ROOT / "qlora") + os.sep

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<"):
            return
        if code.co_name == "training_step":
            raise _FirstStep
        if not code.co_filename.startswith(package):
            return
        call = code.co_filename.removeprefix(package), code.co_qualname
        every[call] = None
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = (frame.f_locals.get(name) for name in names)
        if not call[0].startswith("config") and any(_is_config(value) for value in values):
            with_config[call] = None

    with tempfile.TemporaryDirectory() as folder:
        words = _tiny_run(Path(folder))
        sys.setprofile(watch)
        try:
            with suppress(_FirstStep), redirect_stdout(sys.stderr):
                sys.argv = ["train.py", *words]
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        finally:
            sys.setprofile(None)
    return list(with_config), list(every)


def _is_config(value: object) -> bool:
    kind = type(value)
    return kind.__module__.startswith("qlora.config") and kind.__name__.endswith("Config")


def _tiny_run(folder: Path) -> list[str]:
    """A tiny model and rows in `folder`, and the flags that train on them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained(folder / "base")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"model": "base", "data": "rows.jsonl", "output-dir": "out"}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]
    return [*words, "--max-steps", "1", "--max-length", "64", "--compute-dtype", "fp32"]


def hops(calls: Iterable[Call]) -> tuple[int, int]:
    """Files entered, and returns to a file that was left before."""
    files = [file for file, _ in calls]
    stays = [file for i, file in enumerate(files) if i == 0 or files[i - 1] != file]
    return len(set(stays)), len(stays) - len(set(stays))


def main() -> int:
    """Print the table; 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hops", action="store_true", help="follow train.py's config, too")
    rows = list(figures())
    if parser.parse_args().hops:
        received, every = map(hops, calls_until_first_step())
        rows.append(("files that receive the config", received[0], 18, ""))
        rows.append(("returns to a file already left", received[1], 15, ""))
        print(f"all functions until the first step: {every[0]} files, {every[1]} returns")
    for what, count, limit, where in rows:
        mark = "" if count <= limit else "  TOO MANY"
        print(f"{what:<32}{count:>8,}  of at most {limit:>7,}{mark}  {where}".rstrip())
    return int(any(count > limit for _, count, limit, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
