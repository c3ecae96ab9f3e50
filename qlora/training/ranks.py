"""A run in several processes, the ranks: one for each GPU, as `torchrun` and `accelerate launch`
start them. Every rank holds the whole 4-bit base, and computes its share of each step's rows.

What travels, of a step:

    gradients      one flat bucket of each dtype, once a step, after the last micro-batch; behind
                   it a number for each parameter: on how many ranks it has a gradient
    the count      of supervised tokens, by transformers' Trainer, which divides the loss by it
    five numbers   of each rank: losses that are finite or not, their sum, tokens, signals

torch.distributed carries it: NCCL between GPUs, Gloo between CPUs and for what is on the host. The
model is not wrapped in DistributedDataParallel, whose hooks reduce within the backward pass: a pass
that runs out of memory is begun again in halves (qlora.training.memory), on one rank alone, and a
reduction that has begun cannot be taken back. A frozen base leaves nothing to hide the transfer
behind either: the adapters' gradients are 0.1 to 1 % of a model. Buffers are not sent: all ranks
compute them from the same files. Parameters are sent once, at the start.

A rank that fails prints its error and ends. The others see that its process is gone, which also
ends waits that a library does not end, and torchrun ends those on other machines.
"""

import importlib.metadata
import math
import os
import platform
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous
from tqdm.auto import tqdm

from qlora import __version__
from qlora.errors import (
    OWN_SECONDS,
    Interrupted,
    RankError,
    UserError,
    first_line,
    is_first_process,
    require,
)

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "datasets")
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # of accelerate launch
START = "start them with `torchrun --nproc-per-node N train.py …`"
JOIN, STEP, WORK = timedelta(minutes=5), timedelta(minutes=30), timedelta(days=7)  # longest waits
LOOK_SECONDS = 0.5  # from one look at the other processes to the next
ENDED = "another process of this run has ended, its error is above"
_waits: Any = None  # the group in which ranks wait for work of one of them
_watch: "Watch | None" = None


def count() -> int:
    """The ranks of this run; 1 outside `joined`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """The number of this rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this rank prints, and writes the run's files."""
    return number() == 0


def is_restarted() -> bool:
    """Whether torchrun has started this run again, after a rank failed."""
    return os.environ.get(RESTARTS, "0") not in ("", "0")


def is_elastic() -> bool:
    """Whether torchrun has the ranks' store, not the first one."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


# ---- start and end


def environment() -> tuple[int, int, int]:
    """Ranks, this rank, and its number on this machine, as the launcher has set them; UserError for
    variables that are missing or no numbers, and for a launcher that shards models."""
    for name in VARIABLES:
        value = os.environ.get(name, "1")
        wanted = f"the environment variable {name} must be a whole number, got {value!r}: unset it"
        require(bool(re.fullmatch(r"\s*-?\d+\s*", value)), wanted)
    for name in SHARDING:
        fault = f"ACCELERATE_USE_{name} is set, but accelerate does not shard the model here"
        fix = "choose multi-GPU without it in `accelerate config`, and give --sharding fsdp"
        is_set = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")
        require(not is_set, f"{fault}: {fix}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks <= 1:
        return 1, 0, 0
    if missing := [name for name in (*VARIABLES, *ADDRESS) if not os.environ.get(name)]:
        fault = f"WORLD_SIZE is {ranks}, but {' and '.join(missing)} not set: without them"
        raise UserError(f"{fault} {ranks} processes do not find each other: {START}")
    port = os.environ[ADDRESS[1]]
    is_port = port.isdecimal() and 0 < int(port) < 1 << 16
    require(is_port, f"MASTER_PORT must be from 1 to {(1 << 16) - 1}, got {port!r}: {START}")
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    require(0 <= rank < ranks, f"RANK must be from 0 to {ranks - 1}, got {rank}: {START}")
    gpus = torch.cuda.device_count()
    fault = f"process {local + 1} of this machine has no GPU of its own, it has {gpus}"
    require(not gpus or local < gpus, f"{fault}: give --nproc-per-node {gpus}")
    return ranks, rank, local


@contextmanager
def joined(settings: Mapping[str, Any]) -> Iterator[None]:
    """Join the ranks of this run, if it has several, and leave them when the block ends.

    Only the first rank prints. `settings`, and the versions of packages, must be those of all
    ranks. UserError if they are not, or if the ranks do not find each other. Within another
    `joined` it does nothing.
    """
    ranks, rank, local = environment()
    if ranks == 1 or dist.is_initialized():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
        try:
            _join(rank, ranks, local)
            require_same("settings", settings)
            versions = {name: importlib.metadata.version(name) for name in PACKAGES}
            own = {"qlora": __version__, "python": platform.python_version()}
            require_same("versions", versions | own)
            yield
            _leave()
        except (Exception, KeyboardInterrupt) as error:
            _fail(error)


def _join(rank: int, ranks: int, local: int) -> None:
    global _waits, _watch
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        _await_first(rank)
        store, *_ = next(iter(rendezvous("env://", timeout=JOIN)))
        where: Any = {"store": store, "rank": rank, "world_size": ranks}
        dist.init_process_group(backend, timeout=STEP, **where)
        _waits = dist.new_group(backend="gloo", timeout=WORK)
    except (RuntimeError, ValueError, OSError) as error:  # torch's of networks are the first
        at = ":".join(os.environ[name] for name in ADDRESS)
        fault = f"the {ranks} processes do not find each other at {at}: {first_line(error)}"
        raise UserError(
            f"{fault} Let all start within {JOIN.seconds // 60} minutes, and see {at}"
        ) from error
    places = gathered((socket.gethostname(), os.getpid()))
    _watch = Watch(pid for host, pid in places if host == socket.gethostname())
    _watch.start()


def _await_first(rank: int) -> None:
    """Wait until the first rank, or its launcher, listens: torch logs each attempt, with a trace of
    its stack, and takes twice the time."""
    host, port = (os.environ[name] for name in ADDRESS)
    socket.getaddrinfo(host, port)  # an unknown name stays one
    listens = rank == 0 and not is_elastic()
    until = time.monotonic() + JOIN.total_seconds()
    while not listens:
        try:
            socket.create_connection((host, int(port)), timeout=JOIN.total_seconds()).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(LOOK_SECONDS)


def _leave() -> None:
    """Wait for the others, and end the group."""
    global _waits, _watch
    dist.barrier(_waits)
    if _watch:
        _watch.ends.set()
    dist.destroy_process_group()
    _waits = _watch = None


def _fail(error: BaseException) -> None:
    """Raise what this rank tells of its end: an error of all ranks is told by the first one."""
    if _watch:
        _watch.ends.set()
    if isinstance(error, RuntimeError) and _watch and _watch.sees_an_end(within=2.0):
        if is_first():
            raise UserError(ENDED) from error
        os._exit(1)
    is_told = isinstance(error, (UserError, torch.OutOfMemoryError))  # in one line
    if not (is_told or isinstance(error, Interrupted)):
        with suppress(OSError):
            if os.environ.get("TORCHELASTIC_ERROR_FILE"):
                get_error_handler().record_exception(error)  # shown by torchrun
    if is_told and _watch and not is_first() and not _watch.sees_an_end(within=OWN_SECONDS):
        what = error if isinstance(error, UserError) else first_line(error)
        raise RankError(f"rank {number()}: {what}") from error  # the first goes on: not its error
    raise error


class Watch(Thread):
    """Ends this process when another one of this machine has ended, after the main thread had time
    to say so: a wait for a rank that is gone may have no end."""

    def __init__(self, pids: Iterable[int]) -> None:
        super().__init__(daemon=True)
        self.ends = Event()
        self.others = [psutil.Process(pid) for pid in pids if pid != os.getpid()]

    def has_ended(self) -> bool:
        """Whether one of the others is no longer there."""
        with suppress(psutil.NoSuchProcess):
            states = [process.is_running() and process.status() for process in self.others]
            return not all(state and state != psutil.STATUS_ZOMBIE for state in states)
        return True

    def sees_an_end(self, *, within: float) -> bool:
        """`has_ended`, at a time in the next seconds."""
        looks = range(1 + round(within / LOOK_SECONDS))
        return any(self.has_ended() or Event().wait(LOOK_SECONDS) for _ in looks)

    def run(self) -> None:
        while not self.ends.wait(LOOK_SECONDS):
            if self.has_ended() and not self.ends.wait(4 * LOOK_SECONDS):
                if is_first_process():
                    print(f"error: {ENDED}", file=sys.stderr, flush=True)
                os._exit(1)


def refuse(message: str) -> NoReturn:
    """End the run with an error that all ranks have found: the first one tells it."""
    if is_first():
        raise UserError(message)
    if _watch:
        _watch.sees_an_end(within=OWN_SECONDS)  # torchrun ends the others at the first end
    os._exit(2)


def tell(line: str) -> None:
    """Print a line of what happens on this rank, also if it is not the first."""
    if is_first():
        tqdm.write(line)
    else:
        print(f"rank {number()}: {line}", file=sys.stderr)


def has_lost_one() -> bool:
    """Whether another rank of this machine has ended."""
    return _watch is not None and _watch.has_ended()


# ---- what ranks tell each other


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def numbers(*own: float) -> list[tuple[float, ...]]:
    """Some numbers of each rank, for each of them those of all ranks."""
    if count() == 1:
        return [(float(value),) for value in own]
    table = torch.tensor([own], dtype=torch.float64)  # (1, numbers)
    parts = [torch.empty_like(table) for _ in range(count())]
    dist.all_gather(parts, table)
    return [tuple(column) for column in torch.cat(parts).T.tolist()]  # of (ranks, numbers)


def most(own: float) -> float:
    """The largest number of all ranks."""
    return max(*numbers(own)[0], own)


def of_first(value: Any) -> Any:
    """The value of the first rank."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def require_same(what: str, values: Mapping[str, Any]) -> None:
    """Raise UserError, on all ranks, if `values` of some rank differ from those of the first."""
    if count() == 1:
        return
    first = of_first(dict(values))
    names = [name for name in {**first, **values} if first.get(name) != values.get(name)]
    own = [f"{name} {values.get(name)}, not {first.get(name)}" for name in names]
    others = enumerate(gathered(own))
    differ = [f"rank {rank} has other {what}, {'; '.join(d)}" for rank, d in others if d]
    more = f", and {len(differ) - 1} more ranks differ" * (len(differ) > 1)
    fix = "give all ranks the same command, files and packages"
    if differ:
        refuse(f"{differ[0]} as rank 0{more}: {fix}")


@contextmanager
def one_before_others() -> Iterator[None]:
    """The block on one rank of each machine, then on the others: they find its files in a cache."""
    is_one = os.environ.get("LOCAL_RANK", "0").strip() == "0"
    if count() > 1 and not is_one:
        dist.barrier(_waits)
    yield
    if count() > 1 and is_one:
        dist.barrier(_waits)


def send_values(parameters: Sequence[Tensor]) -> None:
    """Give all ranks the parameters of the first one."""
    for alike in _by_dtype(parameters):
        flat = torch.cat([p.detach().reshape(-1) for p in alike])
        dist.broadcast(flat, src=0)
        for p, value in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            p.data.copy_(value.view(p.shape))


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace gradients by their means over the ranks; None counts as 0, and stays where all ranks
    have it: optimizers skip such a parameter."""
    for alike in _by_dtype(parameters):
        sizes = [p.numel() for p in alike]
        has = [p.grad is not None for p in alike]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        are_there = torch.tensor(has, dtype=parts[0].dtype, device=parts[0].device)
        flat = torch.cat([*(part.reshape(-1) for part in parts), are_there])
        del parts
        dist.all_reduce(flat)
        *means, counts = flat.div_(count()).split([*sizes, len(alike)])
        on_some = has if all(has) else (counts > 0).tolist()  # which waits for a GPU
        for p, mean, is_there in zip(alike, means, on_some, strict=True):
            if is_there:
                p.grad = mean.view(p.shape)


def buckets_of(kinds: Iterable[tuple[torch.dtype, Sequence[int]]]) -> list[int]:
    """The bytes of each flat tensor of `average_gradients`, for parameters of these dtypes and
    shapes; it has them one after another, beside the gradients."""
    sizes: Counter[torch.dtype] = Counter()
    for dtype, shape in kinds:
        sizes[dtype] += dtype.itemsize * (math.prod(shape) + 1)
    return [*sizes.values()]


def _by_dtype(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(p.dtype, []).append(p)
    return list(groups.values())
