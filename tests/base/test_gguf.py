"""The header of a .gguf file is checked before transformers reads it."""

import struct

import pytest
from damage import write_gguf

from qlora.base import gguf
from qlora.base.checkpoint import Checkpoint, resolve
from qlora.errors import UserError

HUGE, ONE = struct.pack("<Q", 2**60), struct.pack("<Q", 1)
KEY = struct.pack("<Q", 3) + b"a.b"
ARRAY, ARRAYS = (struct.pack("<II", 9, kind) for kind in (4, 9))


@pytest.fixture
def good(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_a_whole_file_is_converted(good):
    tensors = Checkpoint(resolve(str(good))).tensors
    assert tensors["model.embed_tokens.weight"].shape == (260, 64)


def test_two_processes_may_convert_it_at_once(good, tmp_path, monkeypatch):
    folder = resolve(str(good))
    folder.rename(tmp_path / "the other one's")

    def check(path):
        (tmp_path / "the other one's").rename(folder)

    monkeypatch.setattr("qlora.base.checkpoint.check_header", check)
    assert resolve(str(good)) == folder and [*folder.parent.iterdir()] == [folder]


def with_size(name: bytes, before: int):
    old, new = (name + struct.pack("<II", 4, size) for size in (before, 10**9))
    return lambda content: content.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c[:8] + HUGE + c[16:], "cut short|type|dimensions"),  # tensors
        (lambda c: c[:16] + HUGE + c[24:], "cut short|type"),  # keys
        (lambda c: c[:16] + ONE + KEY + ARRAY + HUGE, "cut short"),
        (lambda c: c[:16] + ONE + KEY + ARRAYS + HUGE, "type 9"),
        (lambda c: c[:16] + ONE + HUGE, "cut short"),
        (lambda c: c[:-64], "its tensors end after the file"),
        (with_size(b"block_count", 1), "1000000000 layers of 12 tensors"),
        (with_size(b"embedding_length", 64), "1000000000, the longest tensor has 260"),
        (lambda c: b"GGML" + c[4:], "does not begin with GGUF"),
        (lambda c: c[:4] + struct.pack("<I", 9) + c[8:], "version 2 or 3 is read, got 9"),
    ],
)
def test_a_gguf_header_is_compared_with_the_file(change, match, good, tmp_path):
    content = good.read_bytes()
    assert change(content) != content
    good.write_bytes(change(content))
    with pytest.raises(ValueError, match=match):
        gguf.check_header(good)
    with pytest.raises(UserError, match=r"model.gguf cannot be read as a GGUF model"):
        resolve(str(good))
    assert list((tmp_path / "cache").iterdir()) == []
