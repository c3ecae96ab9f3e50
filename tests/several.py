"""Runs a function in several processes, with the variables that torchrun sets. They are forked from
a server that has imported the packages: a start costs a second instead of ten."""

import io
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from qlora.config import TrainConfig

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


def require_done(ended: list[Ended]) -> None:
    assert [(rank.error, rank.code) for rank in ended] == [("", 0)] * len(ended), ended


# ---- what ranks do


def trained(config: TrainConfig, *, callback: Any = None, seen: Path | None = None) -> None:
    """Train in this rank; `seen` gets (step before, token ids) of every batch that it reads."""
    from qlora.training import ranks, run
    from qlora.training.trainer import AdapterTrainer

    training_step, made = AdapterTrainer.training_step, run.make_trainer

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        ids = inputs["input_ids"].flatten().tolist()
        if seen is not None and ids:
            with (seen / f"{ranks.number()}.jsonl").open("a") as file:
                file.write(json.dumps([self.state.global_step, ids]) + "\n")
        return training_step(self, model, inputs, *rest)

    def with_callback(*arguments: Any) -> Any:
        trainer = made(*arguments)
        if callback is not None:
            trainer.add_callback(callback)
        return trainer

    AdapterTrainer.training_step, run.make_trainer = recorded, with_callback  # type: ignore
    run.train(config)


class At(TrainerCallback):
    """Does something after a step, on one rank."""

    def __init__(self, rank: int, step: int, number: int) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (args.process_index, state.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), self.number)
