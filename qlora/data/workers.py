"""Chunks of records encoded on all cores, in their order.

The processes are forked, so that they share the tokenizer and the imported packages with this one.
At most two chunks for each are read ahead: memory does not grow with the data.
"""

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from qlora.errors import STOPS, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # chunks for each process
_encode: Callable[[Any], Any]  # of a process


def cores() -> int:
    """The cores that this process may use; 1 where processes cannot be forked."""
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return len(os.sched_getaffinity(0)) if can_fork and hasattr(os, "sched_getaffinity") else 1


def mapped(
    encode: Callable[[Item], Result], chunks: Iterable[Item], processes: int
) -> Iterator[Result]:
    """`encode` of each chunk; with a single one, or a single process, in this process."""
    every = iter(chunks)
    first = list(islice(every, 2))
    if processes < 2 or len(first) < 2:
        yield from map(encode, chain(first, every))
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each fork prints a warning
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, fork, initializer=_start, initargs=(encode,))
    try:
        waiting: deque[Future[Result]] = deque()
        for chunk in chain(first, every):
            with warnings.catch_warnings():  # of Python 3.12 on threads; no child uses any
                warnings.simplefilter("ignore", DeprecationWarning)
                waiting.append(pool.submit(_run, chunk))
            if len(waiting) >= AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        fix = "free memory, or give a smaller --dataset-num-proc"
        raise UserError(f"one of {processes} tokenizing processes was killed: {fix}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        del os.environ["TOKENIZERS_PARALLELISM"]
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}


def _start(encode: Callable[[Any], Any]) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its processes
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


def _run(chunk: Any) -> Any:
    return _encode(chunk)
