"""Run a command, and measure its time and peak memory from outside.

Linux only: /proc/PID/status is read every few milliseconds, that of processes it starts, too.
`resident` is VmHWM, kept by the kernel; it includes pages of mapped files, which the system can
reclaim. `anonymous` is RssAnon, the process's own allocations; its peak is the highest value read.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

EVERY_SECONDS = 0.005


class Held(NamedTuple):
    """Memory of a process, bytes."""

    resident: int
    """peak so far, with pages of mapped files"""
    anonymous: int
    """now, without them"""


class Run(NamedTuple):
    """The result of a command."""

    seconds: float
    peak: Held
    output: str


def watch(command: Sequence[str]) -> Run:
    """Run `command` to its end; its output is kept, and shown if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = Held(0, 0)
        while child.poll() is None:
            peak = Held(*map(max, peak, held_by_all(child.pid)))
            time.sleep(EVERY_SECONDS)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return Run(seconds, peak, text)


def held_by_all(pid: int) -> Held:
    """Memory of a process and of those that it has started; pages that they share count each."""
    total = Held(0, 0)
    for each in (pid, *_descendants(pid)):
        with suppress(OSError):  # it has ended
            total = Held(*map(sum, zip(total, held(each), strict=True)))
    return total


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def held(pid: int | str = "self") -> Held:
    """Memory of a process; None after it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = (re.search(rf"{key}:\s+(\d+) kB", status) for key in ("VmHWM", "RssAnon"))
    return Held(*(int(match[1]) * 1024 if match else 0 for match in found))


def make_cold(files: Iterable[Path]) -> None:
    """Write out the page cache, and drop `files` from it."""
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
