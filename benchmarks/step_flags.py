"""The flags of benchmarks/step.py, checked before anything is loaded."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import torch
from results import small_model
from shapes import shape
from step_sides import PARTS, SIDES, missing, without

from qlora.base.checkpoint import Checkpoint, resolve
from qlora.base.shards import parse_size
from qlora.errors import UserError, did_you_mean
from qlora.ops.nf4 import DTYPES
from qlora.training.outputs import show_bytes

CONTEXT_BYTES = 1 << 29  # about the memory of the CUDA context
DEMO_MODEL = "SmolLM2-135M-Instruct"


class Flags(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser(description: str) -> argparse.ArgumentParser:
    """All flags."""
    made = Flags(description=description)
    made.add_argument("--model", help="a folder or file that load_base takes")
    made.add_argument("--shape", help="random weights in the shape of llama2-7b, llama3.1-8b, …")
    made.add_argument("--folder", type=Path, help="keep the checkpoint of --shape here, for reuse")
    made.add_argument("--sides", nargs="+", default=["ours", "peft"], help=", ".join(SIDES))
    for name, default in (("seq", 256), ("batch", 4), ("r", 16), ("rounds", 5), ("threads", None)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    made.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--gpu-memory", help="as if the GPU had so much: 8GiB")
    made.add_argument("--longest", action="store_true", help="the longest row that fits")
    made.add_argument("--unit", type=int, default=256, help="of --longest, in tokens")
    made.add_argument("--ablate", action="store_true", help="ours without each of its parts")
    made.add_argument("--count", action="store_true", help="tensors saved for the backward pass")
    made.add_argument("--alone", action="store_true", help="one side after the other, where both "
                      "do not fit onto the GPU")  # fmt: skip
    made.add_argument(
        "--one-process",
        action="store_true",
        help="all in this one, their memory mixed: for debugging",
    )
    return made


def checked(given: argparse.Namespace) -> list[str]:
    """The names of the sides, after all checks of the flags."""
    if given.model and given.shape:
        raise UserError("--model and --shape both say what to train: give one of them")
    for name in ("seq", "batch", "r", "rounds", "unit"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(given, name)}")
    if given.gpu_memory:
        check_cap(given.gpu_memory)
    if given.longest and not torch.cuda.is_available():
        raise UserError("--longest searches a GPU's memory, and there is none here")
    if given.seq > (positions := max_positions(given)) and not given.longest:
        raise UserError(f"--seq {given.seq} is more than the {positions} positions of the model")
    if given.count and given.checkpointing:
        raise UserError("--count sees nothing inside of checkpoints: add --no-checkpointing")
    return side_names(given)


def check_cap(asked: str) -> None:
    """Refuse a memory limit that this GPU cannot simulate."""
    size = parse_size(asked)
    if size <= CONTEXT_BYTES:
        raise UserError(f"--gpu-memory {asked} is what the CUDA context takes: give more")
    if not torch.cuda.is_available():
        raise UserError("--gpu-memory caps a GPU, and there is none here: leave it out")
    there = torch.cuda.get_device_properties(0).total_memory
    if size - CONTEXT_BYTES > there:
        raise UserError(
            f"--gpu-memory {asked} is more than the {show_bytes(there)} of this GPU: leave it out"
        )


def side_names(given: argparse.Namespace) -> list[str]:
    """The names of the sides to measure."""
    if given.ablate:
        parts = [part for part in PARTS if given.checkpointing or part != "checkpointing"]
        return ["ours", *map(without, parts)]
    names = list(dict.fromkeys(given.sides))
    if unknown := [name for name in names if name not in SIDES]:
        raise UserError(
            f"--sides {', '.join(unknown)} is not known.{did_you_mean(unknown[0], SIDES)} Known "
            f"are: {', '.join(SIDES)}"
        )
    only_there = [name for name in ("ours-offloading", "ours-triton") if name in names]
    if only_there and not torch.cuda.is_available():
        raise UserError(f"--sides {only_there[0]} needs a GPU, and there is none here")
    lacking = {name: missing(name) for name in names if missing(name)}
    if lacking:
        told = (f"{name} (pip install {' '.join(packages)})" for name, packages in lacking.items())
        raise UserError(f"--sides wants what is not installed: {', '.join(told)}")
    return names


def max_positions(given: argparse.Namespace) -> int:
    """The model's limit on positions."""
    if given.shape:
        return int(shape(given.shape).max_position_embeddings)
    return Checkpoint(resolve(own_model(given))).max_positions or sys.maxsize


def own_model(given: argparse.Namespace) -> str:
    """The value of --model, by default the demo's model."""
    return given.model or str(small_model())
