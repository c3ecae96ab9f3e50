"""Checkpoints: faults while they are saved, damage afterwards, and which ones are kept."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quick_config, refuses, require_same_adapter
from torch import nn

from qlora import DataConfig, UserError
from qlora.training import checkpoints as own
from qlora.training.checkpoints import HASHES, OPTIMIZER, damage, read_state, resumable, write_state
from qlora.training.run import train
from qlora.training.trainer import AdapterTrainer

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")
at_operation: Callable[[], None] | None = None  # called before each of these, on files of a run


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if at_operation is None or event not in OPERATIONS:
        return
    is_read = event == "open" and arguments[1] in ("r", "rb")
    if not is_read and "checkpoint-" in os.fspath(arguments[0] if arguments[0] != -1 else ""):
        at_operation()


@pytest.fixture
def operations(monkeypatch):
    """`operations(call)`: call() comes before every write, flush, rename, removal of a checkpoint,
    and may raise; None ends that."""
    sys.addaudithook(_audit)  # stays, without effect
    module = sys.modules[__name__]
    for owner, name in ((os, "fsync"), (own, "save_file")):
        original = getattr(owner, name)

        def wrapped(*given: Any, original: Any = original) -> Any:
            if at_operation is not None:
                at_operation()
            return original(*given)

        monkeypatch.setattr(owner, name, wrapped)
    yield lambda call: setattr(module, "at_operation", call)
    module.at_operation = None


def test_a_fault_at_any_point_of_saving_leaves_the_last_good_checkpoint(
    operations, checkpoints, tmp_path, data, monkeypatch
):
    """The disk fails at each operation in turn; and as the process is killed there, the files at
    each operation are such that the last good checkpoint is found. A limit of one keeps it too."""
    save, output, seen = AdapterTrainer._save_checkpoint, tmp_path / "run", list[str]()

    def usable() -> str:
        folder, _ = resumable(output)
        assert folder is not None and not damage(folder)
        return folder.name

    def fail_at(turn: int) -> Iterator[None]:
        for _ in range(turn):
            yield
        raise OSError(errno.ENOSPC, "No space left on device")

    def with_faults(self: Any, *given: Any) -> None:
        if self.state.global_step < 3:
            return save(self, *given)
        for turn in range(500):
            faults = fail_at(turn)

            def call(faults: Iterator[None] = faults) -> None:
                operations(None)
                seen.append(usable())  # as if the process were killed here
                next(faults)
                operations(call)

            operations(call)
            with suppress(OSError):  # some are caught, as in removing what is left over
                save(self, *given)
            operations(None)
            assert usable() == "checkpoint-3" or not [*output.glob(".*partial")]
            if faults.gi_frame is not None:  # no fault: fewer operations
                break
            shutil.rmtree(output / "checkpoint-3", ignore_errors=True)
        assert 20 < turn < 499 and usable() == "checkpoint-3"

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", with_faults)
    settings: Any = {"save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    train(quick_config(checkpoints("llama"), data, output, **settings))
    assert {*seen} == {"checkpoint-2", "checkpoint-3"}
    assert sorted(path.name for path in output.glob("*checkpoint*")) == [
        "checkpoint-2",  # whose adapter is known to give a finite loss
        "checkpoint-3",
    ]


@pytest.fixture
def two(quick_run, tmp_path):
    """The config to resume a copy of the quick run, with its checkpoints 2 and 4."""
    folder = shutil.copytree(quick_run.folder, tmp_path / "copy")
    return replace(quick_run.config, output_dir=str(folder), resume=True, max_steps=5)


def test_a_damaged_checkpoint_is_not_used(two, capsys):
    """Whichever of its files: the one before is, with a warning."""
    output = Path(two.output_dir)
    folder = output / "checkpoint-4"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        assert resumable(output)[0] == output / "checkpoint-2", path.name
        flipped = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        for damaged in (b"", content[: len(content) // 2], flipped):
            path.write_bytes(damaged)
            assert resumable(output)[0] == output / "checkpoint-2", path.name
        path.write_bytes(content)
    assert resumable(output) == (folder, [])
    (folder / OPTIMIZER).unlink()
    train(two)
    said = capsys.readouterr().out
    assert f"warning: checkpoint-4: {OPTIMIZER} missing or damaged: checkpoint-2 is" in said
    assert {"damaged-checkpoint-4", "checkpoint-4"} <= {path.name for path in output.iterdir()}


def test_without_a_whole_checkpoint_each_fault_is_told(two):
    output = Path(two.output_dir)
    for step, name in ((2, OPTIMIZER), (4, HASHES)):
        (output / f"checkpoint-{step}" / name).write_bytes(b"{}")
    words = (f"checkpoint-4: {HASHES} missing or damaged; checkpoint-2: {OPTIMIZER} missing or",)
    with refuses(output, *words, "give a new --output-dir"):
        train(two)


def test_checkpoints_with_pickles_or_without_states_are_refused(two):
    folder = Path(two.output_dir, "checkpoint-4")
    hashes = json.loads((folder / HASHES).read_text())
    (folder / OPTIMIZER).unlink()
    del hashes["sha256"][OPTIMIZER]
    (folder / HASHES).write_text(json.dumps(hashes))
    with refuses(folder.parent, f"has no {OPTIMIZER} (--trainer.save_only_model", "--adapter"):
        train(two)
    (folder / HASHES).unlink()
    torch.save({}, folder / "optimizer.pt")
    with refuses(folder.parent, "optimizer.pt of an earlier version are pickles", "--adapter"):
        train(two)


def test_a_smaller_limit_removes_the_oldest_but_not_the_best(checkpoints, tmp_path, data):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    settings: Any = {"eval_steps": 1, "save_steps": 1, "max_steps": 5, "save_total_limit": 2}
    settings["trainer"] = best | {"greater_is_better": True}  # the first of all
    settings["data"] = DataConfig(str(data), str(data), max_length=128)
    output = train(quick_config(checkpoints("llama"), data, tmp_path / "run", **settings))
    kept = sorted(path.name for path in output.glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    require_same_adapter(output, output / "checkpoint-1")


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adam": torch.optim.Adam,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_read_as_it_was_written(name, tmp_path):
    layer = nn.Linear(3, 5)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer = OPTIMIZERS[name](layer.parameters())
    optimizer.step()
    whole = torch.arange(12, dtype=torch.uint8)
    shared = {"one": whole[:4], "other": whole[4:], "again": whole[:4], "t": whole.view(3, 4).t()}
    state = {**optimizer.state_dict(), "slices": shared, 3: (1, [None, 1e-17, float("inf")], "x")}
    write_state(tmp_path / "state", state)
    read = read_state(tmp_path / "state")
    assert str(read) == str(state) and list(read) == list(state)
    assert all(torch.equal(read["slices"][key], value) for key, value in shared.items())
    with pytest.raises(UserError, match="cannot hold a object of the optimizer"):
        write_state(tmp_path / "other", {"projector": object()})
