"""Chunks of records encoded on all cores, in their order.

The processes are forked, so that they share the tokenizer and the imported packages with this one.
At most two chunks for each are read ahead: memory does not grow with the data.
"""

import ctypes
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import Any, TypeVar

from qlora.errors import STOPS, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # chunks for each process
KILLED = "tokenizing processes was killed: free memory, or give a smaller --dataset-num-proc"
END_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG
_encode: Callable[[Any], Any]  # of a process


def can_fork() -> bool:
    """Whether processes can be forked."""
    return "fork" in multiprocessing.get_all_start_methods()


def cores() -> int:
    """The cores that this process may use; 1 where processes cannot be forked."""
    return len(os.sched_getaffinity(0)) if can_fork() and hasattr(os, "sched_getaffinity") else 1


def mapped(
    encode: Callable[[Item], Result], chunks: Iterable[Item], processes: int
) -> Iterator[Result]:
    """`encode` of each chunk; with a single one, or a single process, in this process."""
    every = iter(chunks)
    first = list(islice(every, 2))
    if processes < 2 or len(first) < 2:
        yield from map(encode, chain(first, every))
        return
    waiting: deque[Future[Result]] = deque()
    with started(encode, processes) as submit:
        for chunk in chain(first, every):
            waiting.append(submit(chunk))
            if len(waiting) >= AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def started(
    encode: Callable[[Item], Result], processes: int
) -> Iterator[Callable[[Item], Future[Result]]]:
    """Processes that encode what is submitted; a thread where processes cannot be forked.

    All are forked here, by the calling thread: a lock that another thread holds at that time stays
    locked in them.

    Raises:
        UserError: one of the processes was killed.
    """
    pool: Executor = ThreadPoolExecutor(1)
    run: Callable[[Any], Any] = encode
    if can_fork():
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(processes, fork, initializer=_start, initargs=(encode,))
        run = _run
    try:
        with _forking():
            pool.submit(int).result()

        def submit(chunk: Item) -> Future[Result]:
            return pool.submit(run, chunk)

        yield submit
    except BrokenProcessPool as error:
        raise UserError(f"one of {processes} {KILLED}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _forking() -> Iterator[None]:
    """Without the warnings of tokenizers, and of Python 3.12 on threads; no child uses any."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}


def _start(encode: Callable[[Any], Any]) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its processes
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    with suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)


def _run(chunk: Any) -> Any:
    return _encode(chunk)
