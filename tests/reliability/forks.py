"""Runs of `train.py` as forked children of a process that has imported everything: a run of a tiny
model then takes a second, not ten. A child tells in shared memory which phase it is in.

The plan and the picture of the loss, half of such a run's time, are left out. The parent must have
no threads, so it is a process of its own.
"""

import functools
import importlib
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Phase -> functions that begin it; a nested one ends with its function.
PHASES = {
    "tokenizing": ("qlora.training.run.prepare_rows",),
    "loading": ("qlora.training.run.load_model",),
    "dry step": ("qlora.training.run.before_training",),
    "samples": ("qlora.training.run.write_answers",),
    "steps": ("qlora.training.trainer.AdapterTrainer.training_step",),
    "evaluation": ("qlora.training.trainer.AdapterTrainer.evaluation_loop",),
    "saving": ("qlora.training.trainer.AdapterTrainer._save_checkpoint",),
    "end": (
        "qlora.training.trainer.AdapterTrainer.save_model",
        "qlora.training.run.write_results",
    ),
}
NAMES = ["start", *PHASES]
IMPORTS = (
    "bitsandbytes", "datasets", "matplotlib.pyplot", "transformers.models.llama.modeling_llama",
    "qlora.__main__", "qlora.plan.run", "qlora.pictures", "qlora.training.run",
)  # fmt: skip


class Phase:
    """The phase of a child and the number of phases it has begun, in shared memory."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def read(self) -> tuple[int, str]:
        """(phases begun so far, name of the present one)."""
        count, number = struct.unpack("qq", self.memory[:])
        return count, NAMES[number]

    def begin(self, number: int) -> int:
        """Returns the number of the phase before."""
        count, before = struct.unpack("qq", self.memory[:])
        self.memory[:] = struct.pack("qq", count + 1, number)
        return int(before)

    def reset(self) -> None:
        self.memory[:] = struct.pack("qq", 0, 0)

    def watch(self) -> None:
        """Let the functions of PHASES tell when they begin and end."""
        for phase, paths in PHASES.items():
            for path in paths:
                module, _, name = path.rpartition(".")
                try:
                    owner: Any = importlib.import_module(module)
                except ModuleNotFoundError:  # a method
                    module, _, class_name = module.rpartition(".")
                    owner = getattr(importlib.import_module(module), class_name)
                setattr(owner, name, self._told(getattr(owner, name), NAMES.index(phase)))

    def _told(self, function: Callable[..., Any], number: int) -> Any:
        @functools.wraps(function)
        def told(*given: Any, **named: Any) -> Any:
            if self.read()[1] == "saving":  # saves the adapter of a checkpoint
                return function(*given, **named)
            before = self.begin(number)
            try:
                return function(*given, **named)
            finally:
                self.begin(before)

        return told


@dataclass
class Ended:
    """A run that has ended: `code` is negative for a signal."""

    code: int
    output: str  # both streams
    phases: list[tuple[str, float]] = field(default_factory=list)  # with their seconds, in order
    hit: str = ""  # the phase in which a signal was sent
    seconds: float = 0.0  # from the signal to the end


@dataclass(frozen=True)
class Moment:
    """When a signal is sent: at the `turn`-th time that `phase` begins, after `delay` seconds."""

    phase: str
    turn: int
    delay: float


class Runs:
    """Starts runs of train.py in forked children."""

    def __init__(self, log: Path) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # a number that the run keeps
        for name in IMPORTS:
            importlib.import_module(name)
        importlib.import_module("torch").set_num_threads(1)
        patch("qlora.plan.run.planned_bytes", lambda _: None).start()
        patch("qlora.pictures.save_png", lambda _, path: path.touch()).start()
        self.log, self.phase = log, Phase()
        self.phase.watch()

    def run(self, words: list[str], moment: Moment | None = None, *numbers: int) -> Ended:
        """Run `train.py WORDS`; send the signals `numbers`, 0.05 s apart, at `moment`."""
        self.phase.reset()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._child(words)
        ended, waiting = Ended(0, ""), self._due(moment) if moment else iter(())
        begun, name, since = 0, "start", time.perf_counter()
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            now, (count, phase) = time.perf_counter(), self.phase.read()
            if done or count != begun:
                ended.phases.append((name, now - since))
                begun, name, since = count, phase, now
            if done:
                break
            if not ended.hit and next(waiting, False):
                ended.hit, sent = phase, now
                for number in numbers:
                    os.kill(pid, number)
                    time.sleep(0.05 * (len(numbers) > 1))
            time.sleep(0.0002)
        ended.seconds = now - sent if ended.hit else 0.0
        ended.code = os.waitstatus_to_exitcode(status)
        ended.output = self.log.read_text(errors="replace")
        return ended

    def _due(self, moment: Moment) -> Iterator[bool]:
        """Whether `moment` is now, at each look."""
        turns, seen = 0, -1
        while True:
            count, phase = self.phase.read()
            turns += count != seen and phase == moment.phase
            seen = count
            if turns >= moment.turn:
                break
            yield False
        until = time.perf_counter() + moment.delay
        while time.perf_counter() < until:
            yield False
        yield True

    def _child(self, words: list[str]) -> None:
        from qlora.__main__ import run

        code = 70
        try:
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            run("train", prog="train.py", words=words)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
