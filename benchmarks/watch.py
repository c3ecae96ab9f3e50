"""Run a command, and measure its time and peak memory from outside.

Linux only: /proc/PID/status is read every few milliseconds, that of processes it starts, too.
`resident` is VmHWM, kept by the kernel; it includes pages of mapped files, which the system can
reclaim. While several run it is the highest sum that was read. `anonymous` is RssAnon, the
process's own allocations; its peak is the highest value read.
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
WHOLE, PARTS = ("VmHWM", "RssAnon"), ("Pss", "Pss_Anon")  # of a process alone, of several


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
    """Memory of a process and of those that it has started. Pages that several processes map, as
    those of libraries, count once (Pss in /proc/PID/smaps_rollup)."""
    others = list(_descendants(pid))
    if not others:
        return held(pid)
    total = Held(0, 0)
    for each in (pid, *others):
        with suppress(OSError):  # it has ended
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
            total = Held(*(sum(pair) for pair in zip(total, _bytes(text, PARTS), strict=True)))
    return total


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def held(pid: int | str = "self") -> Held:
    """Memory of a process; none after it has ended."""
    return Held(*_bytes(Path(f"/proc/{pid}/status").read_text(), WHOLE))


def _bytes(text: str, keys: Sequence[str]) -> Iterator[int]:
    """The values of `keys` in a file of /proc; 0 where it has none."""
    for key in keys:
        match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
        yield int(match[1]) * 1024 if match else 0


def make_cold(files: Iterable[Path]) -> None:
    """Write out the page cache, and drop `files` from it."""
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
