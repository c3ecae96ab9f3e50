"""Runs a function in several processes, with the variables that torchrun sets. They are forked from
a server that has imported the packages: a start costs a second instead of ten."""

import io
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

PRELOADED = ["conftest", "qlora.training.run", "qlora.plan.run", "qlora.__main__"]
SECONDS = 400.0  # of a call, before it is a hang


class Ended(NamedTuple):
    """What a rank returned, raised (its type and text) or printed, and its exit code."""

    value: Any
    error: str
    said: str
    code: int | None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def in_ranks(
    count: int, function: Callable[..., Any], *arguments: Any, **variables: str
) -> list[Ended]:
    """`function(*arguments)` in `count` ranks; what each of them came to."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }  # fmt: skip
    started: list[tuple[Any, Any]] = []
    try:
        for rank in range(count):
            here, there = server.Pipe(duplex=False)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}
            process = server.Process(target=_run, args=(there, own, function, arguments))
            process.start()
            there.close()
            started.append((process, here))
        until = time.monotonic() + SECONDS
        return [_end_of(process, here, until) for process, here in started]
    finally:
        for process, _ in started:
            process.kill()


def _end_of(process: Any, here: Any, until: float) -> Ended:
    value, error, said = None, "", ""
    try:
        if here.poll(max(0, until - time.monotonic())):
            value, error, said = here.recv()
    except EOFError:
        pass  # it has ended at once
    process.join(max(1, until - time.monotonic()))
    return Ended(value, "it hangs" if process.is_alive() else error, said, process.exitcode)


def _run(
    there: Any, variables: dict[str, str], function: Callable[..., Any], arguments: Any
) -> None:
    import torch

    os.environ |= variables
    torch.set_num_threads(1)
    value, error, said = None, "", io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            value = function(*arguments)
        except (Exception, KeyboardInterrupt) as fault:
            error = f"{type(fault).__name__}: {fault}"
    there.send((value, error, said.getvalue()))
