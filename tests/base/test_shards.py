"""Written shards are read back by safetensors and transformers, and appear whole or not at all."""

import errno
import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, token_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.base import shards
from qlora.base.shards import DTYPE_CODES, INDEX, SINGLE, Entry
from qlora.errors import UserError
from qlora.files import publishing, replacing, require_new


def write(folder, tensors, *, max_bytes=10**9):
    entries = [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    return shards.write_shards(folder, entries, iter(tensors.values()), max_bytes=max_bytes)


def bitwise_equal(a, b):
    bits = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_every_dtype_and_shape_is_read_back(tmp_path, dtype):
    values = torch.arange(-6, 6).to(dtype)
    special = torch.tensor([0x7FC1, 0x7F80, 0xFF80, 0x0001, 0x8000], dtype=torch.int32)
    tensors = {
        "matrix": values.view(3, 4),
        "transposed": values.view(3, 4).T,
        "slice": values.view(3, 4)[:, ::2],
        "cube": values.view(2, 3, 2),
        "scalar": values[3],
        "empty": values[:0].view(0, 4),
        'ünïcode/ " name': values,
        "nan and infinity": special.to(torch.int16).view(torch.bfloat16),
    }
    (path,) = write(tmp_path, tensors)
    assert path == tmp_path / SINGLE
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]  # one file has no index
    read = load_file(path)
    assert set(read) == set(tensors)
    assert all(bitwise_equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without
    for length in range(1, 9):
        (path,) = write(tmp_path, {"a" * length: values})
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        assert torch.equal(load_file(path)["a" * length], values)


def test_shards_and_their_index(tmp_path):
    tensors = {name: torch.full((4,), i, dtype=torch.float32) for i, name in enumerate("edcba")}
    paths = write(tmp_path, tensors, max_bytes=32)  # two tensors of 16 bytes
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [path.name for path in paths] == names
    assert [set(load_file(path)) for path in paths] == [{"e", "d"}, {"c", "b"}, {"a"}]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 80}
    assert index["weight_map"] == dict(zip("edcba", sorted([*names, *names[:2]]), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, INDEX])


@pytest.mark.parametrize("max_bytes", [10**9, 100_000])
def test_transformers_reads_a_sharded_model(tmp_path, max_bytes):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    paths = write(tmp_path, dict(model.state_dict()), max_bytes=max_bytes)
    assert (len(paths) > 1) == (max_bytes == 100_000)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(token_ids()).logits, model(token_ids()).logits)


def test_sizes():
    sizes = {
        "5GB": 5 * 1000**3, "500MB": 500 * 1000**2, "5GiB": 5 * 1024**3, "1.5KiB": 1536,
        "2TB": 2 * 1000**4, "7kb": 7000, " 3 G ": 3 * 1000**3, "100B": 100,
    }  # fmt: skip
    assert {text: shards.parse_size(text) for text in sizes} == sizes
    wrong = "GB", "5XB", "-5GB", "1e3", "5 GB extra", "five", "1.2.3GB", ".", "..5MB"
    for text in ("", *wrong, "5", " 42 ", "0.5", "0GB"):
        match = f"size must look like 5GB or 500MB, with its unit, got {text!r}"
        with pytest.raises(UserError, match=match):
            shards.parse_size(text)


@given(sizes=st.lists(st.integers(0, 50), max_size=30), max_bytes=st.integers(1, 60))
def test_a_plan_keeps_order_and_bound_and_wastes_nothing(sizes, max_bytes):
    entries = [Entry(f"t{i}", torch.uint8, (size,)) for i, size in enumerate(sizes)]
    plan = shards.plan_shards(entries, max_bytes)
    assert [entry for shard in plan for entry in shard] == entries
    assert all(plan)
    for shard in plan:
        sizes = [entry.nbytes for entry in shard if entry.nbytes]
        assert sum(sizes) <= max_bytes or len(sizes) == 1  # one larger tensor
    for shard, following in pairwise(plan):
        assert sum(e.nbytes for e in shard) + following[0].nbytes > max_bytes


def test_a_published_folder_appears_at_the_end_or_not_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "deep" / "out"):
        for error in (RuntimeError, KeyboardInterrupt, SystemExit):
            with pytest.raises(error), publishing(folder) as partial:
                (partial / "a").write_text("1")
                raise error
            assert not list(folder.parent.glob(".*")) and not [*folder.glob("*")]
        with publishing(folder) as partial:
            (partial / "a").write_text("1")
            assert not (folder / "a").exists()
        for taken in (folder, folder / "a"):
            for attempt in (require_new, lambda path: publishing(path).__enter__()):
                with pytest.raises(UserError, match="already holds something: give a new folder"):
                    attempt(taken)
        assert (folder / "a").read_text() == "1"
        assert not list(folder.parent.glob(".*"))


def test_what_killed_runs_left_is_removed(tmp_path):
    """Of this process id too, which the operating system uses again."""
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    pids = (gone.pid, os.getpid(), os.getppid())
    folders = [tmp_path / f".out.partial-{pid}" for pid in pids]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    with publishing(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert [folder.exists() for folder in folders] == [False, False, True]  # the last run goes on
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path):
    for tensor in (torch.ones(2, 3).bfloat16(), torch.ones(3, 2)):
        with pytest.raises(ValueError, match=r"a: planned \(torch.float32, \(2, 3\)\), got"):
            entries = [Entry("a", torch.float32, (2, 3))]
            shards.write_shards(tmp_path, entries, iter([tensor]), max_bytes=10**9)


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_a_link_to_an_empty_folder(exists, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    out = tmp_path / "out" / "deep" / "er" if not exists else tmp_path / "out"
    with publishing(out) as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "out").is_symlink() and (out / "a").read_text() == "1"
    assert [*(tmp_path / "disk").rglob(".*")] == []


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "out", tmp_path / "out" / "deep"):
        with pytest.raises(UserError, match=r"out is a link to .*gone, which does not exist"):
            require_new(folder)


@pytest.mark.parametrize("cause", ["mount", "parent", "working directory"])
def test_an_empty_folder_that_cannot_be_replaced_is_filled(cause, tmp_path, monkeypatch):
    out, access = tmp_path / "out", os.access
    out.mkdir()
    if cause == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda folder: folder == out)
    elif cause == "working directory":
        monkeypatch.chdir(out)
    else:
        monkeypatch.setattr(os, "access", lambda p, mode: p != tmp_path and access(p, mode))
    inode = out.stat().st_ino
    with publishing(Path() if cause == "working directory" else out) as partial:
        (partial / "a").write_text("1")
        (partial / "deep").mkdir()
        assert not (out / "a").exists()
    assert out.stat().st_ino == inode and {p.name for p in out.iterdir()} == {"a", "deep"}


def test_a_result_survives_what_another_program_writes_meanwhile(tmp_path):
    out, kept = tmp_path / "out", tmp_path / f"out-{os.getpid()}"
    with (
        pytest.raises(UserError, match=rf"no longer be written .*: what was made is in {kept}"),
        publishing(out) as partial,
    ):
        (partial / "a").write_text("1")
        out.mkdir()
        (out / "another's").touch()
    assert (kept / "a").read_text() == "1" and {*tmp_path.iterdir()} == {out, kept}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_entry_of_a_cache_that_another_process_has_made_stays(when, tmp_path):
    out = tmp_path / "out"

    def published_by_another():
        out.mkdir()
        (out / "a").write_text("another's")

    if when == "before":
        published_by_another()
    with publishing(out, shared=True) as partial:
        (partial / "a").write_text("1")
        if when == "meanwhile":
            published_by_another()
    assert (out / "a").read_text() == "another's" and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_of_the_umask(umask, tmp_path):
    """safetensors creates files that only their owner can read."""
    before = os.umask(umask)
    try:
        with publishing(tmp_path / "out") as partial:
            save_file({"a": torch.zeros(1)}, partial / "a.safetensors")
        with replacing(tmp_path / "b", tmp_path / "c") as partials:
            save_file({"a": torch.zeros(1)}, partials[0])
            partials[1].write_text("1")
    finally:
        os.umask(before)
    files = tmp_path / "out" / "a.safetensors", tmp_path / "b", tmp_path / "c"
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def spoil(fd: int) -> None:
    os.ftruncate(fd, os.fstat(fd).st_size - 1)
    os.ftruncate(fd, os.fstat(fd).st_size + 1)  # the last byte is 0 now


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("fsync", "match"),
    [
        (spoil, r"does not read back as it was written \(a\): the disk"),
        (full, r"cannot be written to \(No space left on device\): free disk space"),
    ],
)
def test_a_disk_that_fails(tmp_path, monkeypatch, fsync, match):
    monkeypatch.setattr(shards.os, "fsync", fsync)
    with pytest.raises(UserError, match=match), publishing(tmp_path / "out") as partial:
        write(partial, {"a": torch.arange(4.0)})
    assert list(tmp_path.iterdir()) == []
