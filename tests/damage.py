"""Damaged and hostile copies of files, and a process with limits in which they are read."""

import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qlora.errors import UserError

MEMORY_BYTES = 2 << 30  # that a reader may allocate
SECONDS = 20  # for one file; a reader takes less than one
DEEP = 100_000  # brackets
HOSTILE: tuple[Any, ...] = (
    None, True, 0, -1, 3, 10**12, 10**30, 1e-320, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "a\n\x1b[31mred\x07", "é" * 99, [], [None], [[]], [10**12], ["x", 1], {},
    {"x": None}, {"x": 10**12}, {"x": {"x": []}},
)  # fmt: skip
OTHER_FILES = (
    b"", b"\0" * 4096, b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe\x00x", b"PK\x03\x04" * 99,
    b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",  # a pickle
    b"[" * DEEP, b'{"a":' * DEEP, b"<html>404</html>", b"GGUF" + b"\xff" * 60,
    struct.pack("<Q", 2**62) + b"{}", b'{"a": 1, "a": 2}', b"9" * 10_000,
)  # fmt: skip

# ---- records of data
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"from": "gpt", "value": "<think>x</think>b"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}
ALPACA = {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}


def cut(good: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """The file cut short at `count` places, also right before its end."""
    for size in {len(good) - 1, *(rng.randrange(len(good)) for _ in range(count - 1))}:
        yield f"cut at {size} of {len(good)}", good[:size]


def flipped(good: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """The file with one of its bits flipped, `count` times; half of them in its first 2,000."""
    for i in range(count):
        place = rng.randrange(len(good) if i % 2 else min(2000, len(good)))
        bit = 1 << rng.randrange(8)
        yield f"bit {bit} of {place}", good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :]


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value of nested mappings and lists, of lists to the first item."""
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places_in(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A nested value with another one at `path`."""
    key, *rest = path
    copy = value.copy()
    copy[key] = changed(value[key], tuple(rest), new) if rest else new
    return copy


def hostile_values(good: bytes, ending: str) -> Iterator[tuple[str, bytes]]:
    """A JSON or YAML file with each of HOSTILE in the place of each value; also without it."""
    more = b""
    if ending == ".jsonl":  # its first row
        good, _, more = good.partition(b"\n")
    values = yaml.safe_load(good) if ending == ".yaml" else json.loads(good)
    dump: Any = yaml.safe_dump if ending == ".yaml" else json.dumps
    for path in places_in(values):
        for new in HOSTILE:
            text = dump(changed(values, path, new)).encode()
            yield f"{path} = {new!r}"[:120], text + b"\n" + more


def hostile_tensors(good: bytes) -> Iterator[tuple[str, bytes]]:
    """A safetensors file with other dtypes, shapes, offsets, names and metadata."""
    size = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    name = next(n for n in header if n != "__metadata__")
    entry = header[name]
    begin, end = entry["data_offsets"]
    entries = {
        **{f"dtype {d}": {"dtype": d} for d in ("F64", "I64", "U8", "BOOL", "F8_E4M3", "X", 3)},
        **{
            f"shape {s}": {"shape": s}
            for s in (
                [],
                [0],
                [-1],
                [10**12],
                [2**62, 4],
                [1, *entry["shape"]],
                "x",
                None,
                entry["shape"][::-1],
            )
        },
        **{
            f"offsets {o}": {"data_offsets": o}
            for o in (
                [0, 0],
                [end, begin],
                [0, 10**12],
                [-1, end],
                [10**30, 1],
                [end, 2 * end],
                None,
            )
        },
    }
    for what, part in entries.items():
        yield what, _tensors({**header, name: {**entry, **part}}, data)
    every = {n: e for n, e in header.items() if n != "__metadata__"}
    yield (
        "all offsets alike",
        _tensors({n: {**e, "data_offsets": [begin, end]} for n, e in every.items()}, data),
    )
    yield "no tensors", _tensors({}, b"")
    yield "a tensor less", _tensors({n: e for n, e in header.items() if n != name}, data)
    for new in ("", "x", "../x", "a\n\x1b[31m", "x" * 100_000, "__metadata__", "a..b", "."):
        yield (
            f"name {new[:9]!r}",
            _tensors({new if n == name else n: e for n, e in header.items()}, data),
        )
    for value in (
        "x",
        "[]",
        "{",
        "null",
        "[" * DEEP,
        '{"rebased": 3}',
        '{"rebased": {"x": 1e999}}',
        *(
            json.dumps({k: v})
            for k in (
                "rebased",
                "fingerprint",
                "quant_type",
                "blocksize",
                "labels",
                "task",
                "heads",
                "skip_modules",
                "pad_token_id",
            )
            for v in HOSTILE
        ),
    ):
        yield (
            f"metadata {value[:60]}",
            _tensors(
                {**header, "__metadata__": {"format": "pt", "qlora": value, "state": value}}, data
            ),
        )
    for value in (None, 3, {"qlora": 3}):
        yield f"metadata {value}", _tensors({**header, "__metadata__": value}, data)


def _tensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Outcome(NamedTuple):
    """What became of a damaged file: refused, same, other, or a fault: traceback, hang, written."""

    kind: str
    text: str = ""


Read = Callable[[Path], Any]  # folder -> what was understood, comparable


def read_all(
    folder: Path,
    file: str,
    read: Read,
    contents: list[tuple[str, bytes | None]],
    *,
    seconds: float = SECONDS,
) -> dict[str, Outcome]:
    """The outcome of `read(folder)` with each of the contents (None: no file) as that file.

    A forked process reads under limits of memory and time; after a hang another one goes on.
    """
    outcomes: dict[str, Outcome] = {}
    good = repr(read(folder))
    while rest := [(what, data) for what, data in dict(contents).items() if what not in outcomes]:
        here, there = multiprocessing.Pipe(duplex=False)
        pid = os.fork()
        if not pid:
            _read_in_child(folder, file, read, rest, good, there, seconds)
        there.close()
        count = len(outcomes)
        try:
            while True:
                what, *outcome = here.recv()
                outcomes[what] = Outcome(*outcome)
        except EOFError:
            _, status = os.waitpid(pid, 0)
        if len(outcomes) < count + len(rest):
            ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status}"
            what = rest[len(outcomes) - count][0]
            outcomes[what] = Outcome("hang" if "14" in ended else "crash", ended)
    return outcomes


def _read_in_child(
    folder: Path, file: str, read: Read, contents: Any, good: str, pipe: Any, seconds: float
) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a process that hangs in C, too
    for what, data in contents:
        path = folder / file
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            value = repr(read(folder))
            outcome = ("same", "") if value == good else ("other", value[:300])
        except UserError as error:
            said = str(error)
            is_plain = said.isprintable() and len(said) < 3000
            outcome = ("refused" if is_plain else "unprintable", said[:500])
        except BaseException as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-12:])
            outcome = ("traceback", f"{type(error).__name__}: {str(error)[:300]}\n{where}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        if {p: p.stat().st_mtime_ns for p in folder.rglob("*")} != before:
            outcome = ("written", outcome[1])
        pipe.send((what, *outcome))
    os._exit(0)


def write_gguf(path: Path) -> None:
    """A llama of 64 dimensions with a vocabulary of bytes."""
    import gguf
    import numpy

    dim, vocab, rng = 64, 260, numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(dim)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    tokens = [chr(33 + i) for i in range(vocab - 2)]
    writer.add_token_list([*tokens, "ab", "cd"])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (vocab, dim), "output_norm": (dim,), "output": (vocab, dim)}
    layer = {"attn_norm": (dim,), "ffn_norm": (dim,)}
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    layer |= dict.fromkeys(square, (dim, dim))
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
