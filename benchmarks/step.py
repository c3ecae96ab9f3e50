"""A training step of ours against PEFT's and others', with the same model, batch and settings.

    python benchmarks/step.py                             SmolLM2-135M, the demo's model
    python benchmarks/step.py --shape llama3.1-8b --seq 2048
    python benchmarks/step.py --shape llama3.1-8b --gpu-memory 8GiB --longest \\
        --sides ours ours-offloading peft
    python benchmarks/step.py --ablate                    ours without each of its parts
    python benchmarks/step.py --count --no-checkpointing  tensors that a layer saves for backward

Each side runs in its own process (benchmarks/turns.py); they alternate, with another one first in
each round. Speed is the median of the rounds. benchmarks/step_sides.py defines the sides,
benchmarks/step_runner.py the step and how its memory is counted. `--shape` creates a random 4-bit
checkpoint (benchmarks/shapes.py).

The ceiling is the throughput of a large square matrix product in the same dtype, measured in the
same rounds. For N weights in linear layers and the head a step needs 2 N FLOP a token forward and 2
N backward to the inputs (the weights are frozen), and with checkpointing another 2 N: 4 N or 6 N
over the time it took is its share of the ceiling. Attention and adapters are left out, and the head
is counted like the layers.

`--gpu-memory` simulates a GPU of that size: torch may allocate that much minus CONTEXT_BYTES, the
CUDA context.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from longest import find_longest
from results import record
from shapes import make
from step_flags import CONTEXT_BYTES, DEMO_MODEL, checked, own_model, parser
from step_runner import Product, Runner
from step_sides import Setup
from step_table import show, show_saved
from tqdm.auto import tqdm
from turns import Apart, ApartError

from qlora.base.checkpoint import linear_layers, resolve, skeleton
from qlora.base.load import compute_dtype
from qlora.base.shards import parse_size
from qlora.config import QuantConfig
from qlora.errors import UserError

Call = Callable[..., Any]
"""a Runner in some process: `call("step")`"""


# ---- the sides, each in its process ----


@contextmanager
def runners(names: Sequence[str], setup: Setup, *, here: bool) -> Iterator[dict[str, Call]]:
    """A Runner for each name, except those that run out of memory while loading."""
    with ExitStack() as stack:
        if here:
            yield {name: _local(Runner(name, setup)) for name in names}
            return
        apart = {name: stack.enter_context(Apart(Runner, name, setup)) for name in names}
        yield {name: side for name, side in apart.items() if fits(name, side.ready) is not None}


@contextmanager
def product(setup: Setup, *, here: bool) -> Iterator[Call]:
    """The ceiling, in its own process, so that it uses none of a side's memory."""
    if here:
        yield _local(Product(setup))
        return
    with Apart(Product, setup) as apart:
        yield apart


def _local(made: Any) -> Call:
    return lambda name, *given: getattr(made, name)(*given)


def fits(name: str, call: Callable[[], Any]) -> Any:
    """The call's result; None, with a message, if the GPU's memory runs out."""
    try:
        return call()
    except ApartError as error:
        if error.kind != "OutOfMemoryError":
            raise
        tqdm.write(f"{name}: out of memory")
        return None


# ---- alternating ----


def by_turns(names: Sequence[str], setup: Setup, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of each side, or that it ran out of memory."""
    groups = [[name] for name in names] if given.alone else [list(names)]
    found: dict[str, Any] = {}
    rates: list[float] = []
    bar = tqdm(total=len(names) * (given.rounds + 1), desc="Steps", leave=False)
    with bar, product(setup, here=given.one_process) as ceiling:
        for group in groups:
            with runners(group, setup, here=given.one_process) as sides:
                taken = _warm_up(sides, bar)
                for turn in range(given.rounds if taken else 0):
                    _round(sides, taken, turn, bar)
                    rates.append(ceiling("rate"))
            found |= taken
    return {
        "sides": {name: found.get(name, {"out_of_memory": True}) for name in names},
        "ceiling_flops": statistics.median(rates) if rates else None,
    }


def _warm_up(sides: dict[str, Call], bar: Any) -> dict[str, dict[str, Any]]:
    """Memory of the first steps of each side that fits."""
    taken = {}
    for name, call in sides.items():
        memory = fits(name, partial(call, "warm_up"))
        if memory is not None:
            taken[name] = {"seconds": [], **memory}
        bar.update()
    return taken


def _round(sides: dict[str, Call], taken: dict[str, dict[str, Any]], turn: int, bar: Any) -> None:
    """One step of each side; another one is first in the next round."""
    names = list(taken)
    first = turn % len(names)
    for name in names[first:] + names[:first]:
        seconds, taken[name]["loss"] = sides[name]("step")
        taken[name]["seconds"].append(seconds)
        bar.update()


def with_rates(found: dict[str, Any], tokens: int, flops_a_token: float) -> None:
    """Add tokens per second and the share of the ceiling to each side."""
    for row in found["sides"].values():
        if seconds := row.get("seconds"):
            rates = [tokens / s for s in seconds]
            row["tokens_per_second"] = {
                "median": statistics.median(rates), "min": min(rates), "max": max(rates),
            }  # fmt: skip
            row["share_of_ceiling"] = (
                flops_a_token * row["tokens_per_second"]["median"] / found["ceiling_flops"]
            )


def loss_apart(sides: dict[str, Any]) -> float | None:
    """The relative difference of the final losses of the sides with adapters."""
    losses = [row["loss"] for row in sides.values() if "loss" in row and row["adapter_dtype"]]
    return max(losses) / min(losses) - 1 if len(losses) > 1 else None


# ---- the command ----


def base_folder(given: argparse.Namespace, temporary: str) -> Path:
    """The folder that all sides load."""
    if not given.shape:
        return resolve(own_model(given))
    folder = (given.folder or Path(temporary)) / given.shape
    if given.one_process:
        return make(given.shape, folder.absolute())
    # elsewhere, so that this process takes nothing of the GPU
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(make, given.shape, folder.absolute()).result()


def make_setup(given: argparse.Namespace, folder: Path) -> Setup:
    """The settings that all sides share."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = parse_size(given.gpu_memory) if given.gpu_memory else None
    return Setup(
        base=str(folder),
        seq=given.seq,
        batch=given.batch,
        r=given.r,
        dtype=given.dtype,
        checkpointing=given.checkpointing,
        device=device,
        threads=given.threads or torch.get_num_threads(),
        allocator_bytes=card and card - CONTEXT_BYTES,
    )


def facts(given: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """The facts of a record besides the figures."""
    dtype = compute_dtype(QuantConfig(compute_dtype=setup.dtype), torch.device(setup.device))
    return {
        "model": given.shape or Path(given.model or DEMO_MODEL).name,
        "random_weights": bool(given.shape),
        **{name: getattr(setup, name) for name in ("seq", "batch", "r", "checkpointing")},
        "dtype": str(dtype).removeprefix("torch."),
        "threads": setup.threads,
        "gpu_memory": given.gpu_memory,
        "peft": version("peft"),
    }


def run(given: argparse.Namespace) -> None:
    """Measure, print and record."""
    names = checked(given)
    with tempfile.TemporaryDirectory() as temporary:
        setup = make_setup(given, base_folder(given, temporary))
        if given.longest:
            row = {**facts(given, setup), "seq": None, "unit": given.unit, "tokens": {}}
            for name, tokens in find_longest(names, setup, given.unit):
                row["tokens"][name] = tokens
                record("step_longest", row)  # the last record of a setting counts
            return
        if given.count:
            with runners(names, setup, here=given.one_process) as sides:
                saved = {name: call("saved") for name, call in sides.items()}
            show_saved(saved)
            record("step_saved", {**facts(given, setup), "saved": saved})
            return
        found = by_turns(names, setup, given)
        linear = linear_layers(skeleton(Path(setup.base))).values()
        n = sum(layer.weight.numel() for layer in linear)
    with_rates(found, given.batch * given.seq, (6 if given.checkpointing else 4) * n)
    found["loss_apart"] = loss_apart(found["sides"])
    show(found)
    row = {**facts(given, setup), "rounds": given.rounds}
    record("step_ablation" if given.ablate else "step", {**row, **found})


def main() -> None:
    """The command; a user's error is one line."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a waiting side uses no core
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    try:
        run(parser(__doc__.split("\n")[0]).parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
