"""Read JSON, JSON lines and YAML files; write files and folders atomically.

metrics.jsonl and samples.jsonl hold a JSON object per line. Heavy packages are not imported here.
"""

import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import yaml

from qlora.config.types import described, fits, shown
from qlora.errors import UserError, first_line, require, some

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

RUN = "run.yaml"
LOCK = ".lock"  # in the folder of a run
CLAIM_SECONDS = 1.0  # from writing LOCK to reading it again, on a file system without locks
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
INSPECTION = "inspect.html"
MERGE_REPORT = "merge_report.json"
MODELFILE = "Modelfile"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"  # a tokenizer's folder of them
MOST_BYTES = 64 << 20  # of a JSON file of settings
MOST_YAML, MOST_NODES = 1 << 20, 100_000  # characters, and values, of a YAML file
MOST_NAME, MOST_PATH = 225, 3_700  # of 255 and 4,096 bytes: names beside and in a folder add some
HASH_BYTES = 1 << 25  # read at a time: after each, a thread waits for the interpreter's lock
LARGE_BYTES = 1 << 20  # of a file that is hashed beside the imports
_hashes: dict[tuple[str, int, int], str] = {}  # of (path, size, time of change)
_hashing: list[Thread] = []


def read_json(path: Path, *, fix: str = "") -> dict[str, Any]:
    """The JSON object in a file; the UserError for anything else ends with `fix`."""
    try:
        size = path.stat().st_size
        require(size <= MOST_BYTES, f"{path} has {size:,} bytes, too many for settings. {fix}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {fix}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply. {fix}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not a JSON object: {error}. {fix}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object: got a {type(values).__name__}. {fix}")
    return values


def read_stop_ids(folder: Path) -> frozenset[int]:
    """The tokens that end an answer, of generation_config.json in a folder; empty without one."""
    path = folder / GENERATION
    return ids_in(read_json(path).get("eos_token_id")) if path.is_file() else frozenset()


def ids_in(eos_token_id: Any) -> frozenset[int]:
    """The ids of a config's eos_token_id: a number, a list or None."""
    ids = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    return frozenset(i for i in ids if isinstance(i, int))


class Strict:
    """Refuses YAML with duplicate keys, and with aliases that stand for more than MOST_NODES."""

    def construct_document(self, node: yaml.Node) -> Any:
        _count_nodes(node, {})
        return super().construct_document(node)  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(str(key.value).replace("-", "_") for key, _ in node.value)
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"{twice} is set twice")
        return super().construct_mapping(node, deep)  # type: ignore[misc,no-any-return]


def _count_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """The values in `node`, those of an alias each time; `counts`: of nodes, by id."""
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = MOST_NODES  # of one that contains itself
    items = node.value if isinstance(node, yaml.CollectionNode) else ()
    inner = (each for item in items for each in (item if isinstance(item, tuple) else (item,)))
    counts[id(node)] = count = 1 + sum(_count_nodes(each, counts) for each in inner)
    if count > MOST_NODES:
        raise yaml.constructor.ConstructorError(problem="its aliases stand for too many values")
    return count


class AsWritten(Strict, yaml.BaseLoader):
    """Loads YAML with all scalars as text."""


class Loader(Strict, yaml.SafeLoader):
    """Loads YAML, with 1e-4 as a number; only true and false are booleans: `no` and `on` are words,
    as in YAML 1.2."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?i:true|false)$"), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(where: str, text: str, loader: Any = Loader) -> Any:
    """The value of a YAML text; a UserError names `where` it is from."""
    require(len(text) <= MOST_YAML, f"{where} has {len(text):,} characters, too many for settings")
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line} is not YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"{where} is not YAML: {first_line(error)}") from None  # of a tag's value


def read_run_file(folder: Path) -> dict[str, Any]:
    """What the run.yaml of a run's folder holds; empty if there is none.

    Raises:
        UserError: it is damaged, or another program's.
    """
    path = folder / RUN
    if not path.is_file():
        return {}
    try:
        values = read_yaml(str(path), path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError):
        values = None
    # of their type, if they are there
    parts: dict[str, Any] = dict.fromkeys(("config", "base", "data"), dict)
    parts |= dict.fromkeys(("resumed", "data_paths"), list)
    parts |= dict.fromkeys(("device", "versions"), dict | None)
    if (
        not isinstance(values, dict)
        or "config" not in values
        or not all(isinstance(values[n], kind) for n, kind in parts.items() if n in values)
    ):
        raise UserError(f"{path} is not a run file of train.py, or damaged: restore or remove it")
    return values


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of a run; empty if there are none yet. What is not finite is read as NaN."""
    rows = read_rows(folder / METRICS, {"step": int})
    for row in rows:
        wrong = [
            name for name, value in row.items() if not isinstance(value, int | float | str | None)
        ]
        fault = f"step {row['step']} has no number as {some(wrong)}: remove that line"
        require(not wrong, f"{folder / METRICS}: {fault}")
    return [{name: _finite(value) for name, value in row.items()} for row in rows]


def _finite(value: Any) -> Any:
    return math.nan if value is None or value in (math.inf, -math.inf) else value


def metrics_line(row: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl: JSON has no NaN and no infinity, which become null."""
    finite = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
    return json.dumps(dict.fromkeys(row) | finite) + "\n"


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Sample answers of a run, before and after training; empty if there are none."""
    keys = ("prompt", "wanted", "before", "after")
    return read_rows(folder / SAMPLES, dict.fromkeys(keys, str | None))


def read_rows(path: Path, types: Mapping[str, Any] = {}) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none without one; UserError for a line cut short, and for one
    that lacks a key of `types` or has a value of another type."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = []
    # not splitlines: a JSON text may contain other line separators, such as U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            fault = f"wanted a JSON object, got {line[:40]!r}, which is cut short or damaged"
        elif missing := ", ".join(key for key in types if key not in row):
            fault = f"it has no {missing}"
        elif wrong := [key for key, kind in types.items() if not fits(row[key], kind)]:
            fault = f"{wrong[0]} must be {described(types[wrong[0]])}, got {shown(row[wrong[0]])}"
        else:
            rows.append(row)
            continue
        raise UserError(f"{path}, line {number}: {fault}: remove that line")
    return rows


def require_inside(folder: Path) -> None:
    """Raise if a file of `folder` is a link that leaves it. Those of the hub's cache lead from
    snapshots/REVISION to blobs/ beside it.

    A folder from outside could otherwise make a private file part of what is written.
    """
    places = [folder.resolve()]
    places += [p.parent / "blobs" for p in places[0].parents if p.name == "snapshots"]
    places = [place.resolve() for place in places]
    for path in (*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")):
        if path.is_symlink() and not any(map(path.resolve().is_relative_to, places)):
            target = f"{path} is a link to {os.readlink(path)}, which is outside of its folder"
            raise UserError(f"{target}: if you trust it, put a copy in its place")


# ---- contents


def files_in(source: str) -> list[Path]:
    """A file, or all files in a folder, sorted; none where there is nothing."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    return [path] if path.exists() else []


def hash_beside(sources: Iterable[str]) -> None:
    """Begin to hash the large files of the sources, in a thread beside the imports: it computes and
    reads the disk while they hold the interpreter's lock."""

    def hash_all() -> None:
        with suppress(OSError, RuntimeError, ValueError):  # whoever reads the source raises it
            for file in (file for source in sources for file in files_in(source)):
                status = file.stat()
                if status.st_size >= LARGE_BYTES:  # a pipe has none
                    key = (str(file), status.st_size, status.st_mtime_ns)
                    _hashes[key] = _hash(file, status.st_size)

    _hashing.append(Thread(target=hash_all, daemon=True))
    _hashing[-1].start()


def end_hashing() -> None:
    """Wait for the threads of `hash_beside`: none may run when processes are forked."""
    while _hashing:
        _hashing.pop().join()


def hash_of(file: Path) -> str:
    """The SHA-256 of a file, in hex; one that has changed since `hash_beside` is hashed again."""
    end_hashing()
    status = file.stat()
    known = _hashes.get((str(file), status.st_size, status.st_mtime_ns))
    return known or _hash(file, status.st_size)


def _hash(file: Path, size: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, HASH_BYTES) or 1))
    with file.open("rb", buffering=0) as content:
        while count := content.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


# ---- writing


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """`with replacing(path) as [partial]`: write files atomically.

    A partial file is beside its `path`, and renamed when the block ends, or removed if it raises.
    Files get the mode of the umask, which safetensors ignores.
    """
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        for partial in partials:
            partial.touch()
        modes = [partial.stat().st_mode for partial in partials]
        yield partials
        for partial, path, mode in zip(partials, paths, modes, strict=True):
            partial.chmod(mode)
            os.replace(partial, path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as [partial]:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, and name it in the file LOCK, which is removed at the end.

    The system unlocks the folder of a dead process, whose LOCK is replaced. On a file system
    without locks LOCK decides alone: its owner is dead if its host is this one and has no such
    process; of two that begin at once, the last one to write it goes on.

    Raises:
        UserError: another process has locked it, which is told.
    """
    path = folder / LOCK
    handle = os.open(folder, os.O_RDONLY) if fcntl else -1
    try:
        is_locked, this = _lock(handle, folder), _this_process()
        partial = path.with_name(f"{LOCK}-{this['host']}-{this['pid']}.partial")
        partial.write_text(json.dumps(this) + "\n", encoding="utf-8")
        os.replace(partial, path)
        if not is_locked:
            time.sleep(CLAIM_SECONDS)
            if (owner := _owner(folder)) and owner != this:
                raise _in_use(folder, owner)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        if fcntl:
            os.close(handle)


def _lock(handle: int, folder: Path) -> bool:
    """Lock the folder that is open as `handle`; UserError if another process has it. False on a
    file system without locks, where no living process is known to have it."""
    owner = _owner(folder)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError as error:
        raise _in_use(folder, owner) from error
    except OSError:
        pass
    if owner and (owner["host"] != platform.node() or _is_alive(owner)):
        raise _in_use(folder, owner)
    return False


def _in_use(folder: Path, owner: Mapping[str, Any] | None) -> UserError:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    fix = "wait for its end, or give a new folder"
    if owner and owner["host"] != platform.node():
        fix = f"if that process has ended, remove {folder / LOCK}; else give a new folder"
    return UserError(f"{folder} is in use by another run, {who}: {fix}")


def _this_process() -> dict[str, Any]:
    # the time tells a later process of the same number from this one
    started = psutil.Process().create_time()
    return {"pid": os.getpid(), "host": platform.node(), "started": started}


def _owner(folder: Path) -> dict[str, Any] | None:
    """What LOCK tells of its process; None without such a file, or if it is damaged."""
    try:
        owner = read_json(folder / LOCK)
        types = (("pid", int), ("host", str), ("started", float))
        return owner if all(isinstance(owner.get(name), kind) for name, kind in types) else None
    except UserError:
        return None


def _is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether a process of this host runs."""
    try:
        begin = psutil.Process(owner["pid"]).create_time()
    except (psutil.Error, ValueError, OverflowError):
        return False
    return bool(abs(begin - owner["started"]) < 1)  # seconds


@contextmanager
def publishing(folder: Path, *, shared: bool = False) -> Iterator[Path]:
    """`with publishing(folder) as partial`: write a folder atomically.

    `folder` must not exist, or be empty; a link to a folder is followed. The partial folder is
    beside it, renamed when the block ends, and removed if the block raises, as are those of killed
    runs. It is inside a folder that cannot be replaced: a mount point, the working directory. Files
    get the mode of the umask. An entry of a cache is `shared`: if another process has published it
    meanwhile, that one stays.
    """
    if not (shared and _holds_files(folder)):
        require_new(folder)
    folder = folder.resolve()
    is_fixed = os.path.ismount(folder) or folder == Path.cwd() or not is_writable(folder.parent)
    is_kept = folder.exists() and is_fixed
    parent = folder if is_kept else folder.parent
    for leftover in parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if not pid.isdecimal() or int(pid) == os.getpid() or not psutil.pid_exists(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        _publish(partial, folder, shared)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path, shared: bool) -> None:
    """Rename the complete folder `partial`, or its files if it is inside `folder`."""
    for file in filter(Path.is_file, partial.rglob("*")):
        file.chmod(partial.stat().st_mode & 0o666)  # safetensors ignores the umask
    try:
        if partial.parent == folder:
            for file in partial.iterdir():
                file.rename(folder / file.name)
            return
        if folder.exists():
            shutil.copymode(folder, partial)
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:  # for example another program has written into it meanwhile
        if shared and _holds_files(folder):
            return
        kept = partial.with_name(f"{folder.name}-{os.getpid()}")
        partial.rename(kept)
        raise UserError(
            f"{folder} can no longer be written ({error.strerror}): what was made is in {kept}"
        ) from error


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def require_short(folder: Path) -> None:
    """Refuse the name of a new folder that no file system holds, with what is beside and in it."""
    path = folder.absolute()
    place = next(p for p in (*path.parents, path) if os.path.lexists(p))
    longest = max(len(os.fsencode(name)) for name in (*path.relative_to(place).parts, ""))
    if longest > MOST_NAME or len(os.fsencode(path)) > MOST_PATH:
        fault = f"its name has more than {MOST_NAME} bytes, or its path more than {MOST_PATH:,}"
        raise UserError(f"{str(folder)[:80]}... cannot be created: {fault}: give a shorter one")


def require_new(folder: Path) -> None:
    """Refuse a folder that is not empty, or that cannot be created or written to."""
    require_short(folder)
    path = folder.absolute()
    place = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not place.exists():
        target = f"{place} is a link to {os.readlink(place)}, which does not exist"
        raise UserError(f"{folder} cannot be created: {target}: create that, or remove the link")
    if place == path and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{folder} already holds something: give a new folder, or remove it")
    if not place.is_dir() or not is_writable(place):
        raise UserError(f"{folder} cannot be created: {place} is not a writable folder")


def is_writable(folder: Path) -> bool:
    """Whether this process may create files in an existing folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def front_matter(base_model: str, library: str, *tags: str) -> str:
    """The YAML head of a model card, for the hub. A base in a local folder is left out."""
    path = Path(base_model).expanduser()
    is_local = path.is_absolute() or path.exists()
    lines = [] if is_local else [f"base_model: {base_model}"]
    lines += [f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---", ""])
