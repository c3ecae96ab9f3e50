"""Checkpoints of a run: whole or not there, and read without unpickling anything.

    checkpoint-N/
      adapter_config.json, adapter_model.safetensors, the tokenizer's files
      optimizer.safetensors   states of the optimizer and of the schedule
      random.safetensors      states of the generators of Python, NumPy and torch; the sum of the
                              losses since the last log; of several ranks, those of each
      scaler.safetensors      state of the loss scale, with fp16 only
      stream.json             where a streamed run stands in its data, without it nothing
      trainer_state.json      Trainer's state
      checkpoint.json         SHA-256 of each file above; written last

A folder is written beside its place, flushed to the disk, and renamed: after a crash it is there
with all of its files, or not at all. A file that is damaged later differs from its hash.

A state file has the tensors of a nested value, and in its metadata `state`, as JSON, the value with
{"tensor": NAME} in their places. {"tuple": [...]} and {"dict": [[key, value], ...]} keep what JSON
lacks: tuples, and keys that are numbers.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from qlora import files
from qlora.config.types import require_types
from qlora.errors import UserError, first_line, require, some
from qlora.training import ranks

HASHES = "checkpoint.json"
OPTIMIZER, RANDOM, SCALER = (f"{n}.safetensors" for n in ("optimizer", "random", "scaler"))
PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # of Trainer, and of earlier versions
STREAM = "stream.json"
LOG = ("_tr_loss", "_globalstep_last_logged", "logs_nan")  # AdapterTrainer's, of the next log
STATE_TYPES: dict[str, Any] = {  # of Trainer's state
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
    "epoch": float | None,
    "global_step": int,
    "log_history": list[Mapping[str, Any]],
    "num_input_tokens_seen": int,
    "stateful_callbacks": Mapping[str, Any],
}
ASIDE = "damaged-"  # before the name of a checkpoint that is not resumed from


# ---- states


def write_state(path: Path, value: Any) -> None:
    """Write a nested value of dicts, lists, tuples, numbers, texts and tensors."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    text = json.dumps(_encoded(value, tensors))
    save_file({name: _own(t) for name, t in tensors.values()}, path, {"state": text})


def _encoded(value: Any, tensors: dict[int, tuple[str, Tensor]]) -> Any:
    """`value` as JSON holds it; a tensor that several places share gets one name."""
    if isinstance(value, Tensor):
        return {"tensor": tensors.setdefault(id(value), (str(len(tensors)), value))[0]}
    if isinstance(value, dict):
        return {"dict": [[key, _encoded(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encoded(item, tensors) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, numpy.ndarray | numpy.generic):
        return value.tolist()
    if value is not None and not isinstance(value, bool | int | float | str):
        raise UserError(
            f"a checkpoint cannot hold a {type(value).__name__} of the optimizer or schedule: give "
            "another --optim or --lr-scheduler-type, or --trainer.save_only_model"
        )
    return value


def _own(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, contiguous, alone in its memory: safetensors refuses slices."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def read_state(path: Path) -> Any:
    """The value that `write_state` wrote, with its tensors on the CPU; UserError for others."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {})["state"]
        return _decoded(json.loads(text), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path.name} missing or damaged: {first_line(error)}") from error


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decoded(content, tensors))
    return {key: _decoded(item, tensors) for key, item in value["dict"]}


def random_states() -> dict[str, Any]:
    """The states of all random generators that training uses."""
    on_gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    own = {"python": random.getstate(), "numpy": numpy.random.get_state()}
    return {**own, "cpu": torch.get_rng_state(), **on_gpu}


def set_random_states(states: dict[str, Any]) -> None:
    """Put all random generators into these states; UserError for values that are none."""
    try:
        random.setstate(states["python"])
        numpy.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{RANDOM} is damaged: {first_line(error)}") from error


OWN_VALUES = {"weight_decay", "betas", "eps"}  # of an optimizer: this run's, not the checkpoint's
# Keys by which the states of LambdaLR, ReduceLROnPlateau and GreedyLR differ
KINDS_OF_SCHEDULES = {"lr_lambdas", "num_bad_epochs", "max_lrs"}
PROGRESS = {  # of a schedule; the other values in its state are settings
    "_last_lr", "_step_count", "_streaming_avg", "best", "cooldown_counter", "last_epoch",
    "num_bad_epochs", "num_good_epochs", "reset_start", "warmup_counter",
}  # fmt: skip


class SafeStates:
    """Trainer's methods that save and load states, which pickle them, without pickles.

    A checkpoint that plain Trainer wrote is read by Trainer, whose `torch.load(weights_only=True)`
    makes tensors and plain values only; train.py refuses it.
    """

    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    random: dict[str, Any]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = {n: getattr(self, n).state_dict() for n in ("optimizer", "lr_scheduler")}
        write_state(Path(output_dir, OPTIMIZER), states)

    def _save_scaler(self, output_dir: str) -> None:
        if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
            write_state(Path(output_dir, SCALER), scaler.state_dict())

    def gather_states(self) -> None:
        """What `_save_rng_state` writes, of all ranks."""
        log = {name: getattr(self, name) for name in LOG}
        first, *others = ranks.gathered(random_states())
        if others:  # the sum of the losses is the mean of theirs, as Trainer logs it
            log[LOG[0]] = log[LOG[0]].new_tensor(sum(*ranks.numbers(log[LOG[0]])) / ranks.count())
        of_others = {"ranks": others} if others else {}
        self.random = first | {"log": tuple(log.values())} | of_others

    def _save_rng_state(self, output_dir: str) -> None:
        write_state(Path(output_dir, RANDOM), self.random)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, at the learning rate that this run's schedule has at the checkpoint's step:
        the checkpoint has that of its own, which is 0 at the end of a linear one. A schedule that
        follows the evaluation loss keeps what it has changed so far, as a factor."""
        if checkpoint is None:
            return
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        own = [{n: g[n] for n in OWN_VALUES & g.keys()} for g in self.optimizer.param_groups]
        goes_on = self._load_states(checkpoint)
        self.state.compute_steps(self.args, self.state.max_steps)  # logging_steps, ... of this run
        schedule, groups = self.lr_scheduler, self.optimizer.param_groups
        before = groups[0]["lr"]
        for i, (group, rate, values) in enumerate(zip(groups, rates, own, strict=True)):
            factor = group["lr"] / group.get("initial_lr", rate) if goes_on else 1.0
            if isinstance(schedule, LambdaLR):
                factor = schedule.lr_lambdas[i](schedule.last_epoch)
            group.update(values | {"initial_lr": rate, "lr": rate * factor})
        schedule._last_lr = [group["lr"] for group in groups]
        if not math.isclose(before, groups[0]["lr"]):
            steps = f"{self.state.max_steps} steps after step {self.state.global_step}"
            run = f", that of a run of {steps}" if isinstance(schedule, LambdaLR) else ""
            rate = groups[0]["lr"]
            print(f"the learning rate goes on at {rate:.3g}{run}; it was {before:.3g}")

    def _load_states(self, checkpoint: str) -> bool:
        """The states of the optimizer, and of a schedule of the same kind: whether it is one."""
        if _is_trainers(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return True
        states = read_state(Path(checkpoint, OPTIMIZER))
        self.optimizer.load_state_dict(states["optimizer"])
        saved, own = states["lr_scheduler"], self.lr_scheduler.state_dict()
        goes_on = bool(KINDS_OF_SCHEDULES & saved.keys() == KINDS_OF_SCHEDULES & own.keys())
        at = {name: saved[name] for name in PROGRESS & saved.keys()}
        at = at if goes_on else {"last_epoch": state_at(checkpoint).global_step}
        self.lr_scheduler.load_state_dict(own | at)
        return goes_on

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint and scaler is not None and (path := Path(checkpoint, SCALER)).is_file():
            scaler.load_state_dict(read_state(path))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint and _is_trainers(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        elif checkpoint:
            states, rank = read_state(Path(checkpoint, RANDOM)), ranks.number()
            own = [states, *states.get("ranks", ())]
            set_random_states(own[min(rank, len(own) - 1)])
            if rank >= len(own):  # of more ranks than before
                set_seed(torch.initial_seed() + state_at(checkpoint).global_step + rank)
            # Trainer calls this before the first step, after it has set them to those of a start
            for name, value in zip(LOG, states.get("log", ()), strict=False):
                is_tensor = isinstance(value, Tensor)
                setattr(self, name, value.to(self.args.device) if is_tensor else value)


def _is_trainers(checkpoint: str) -> bool:
    return not Path(checkpoint, OPTIMIZER).exists() and Path(checkpoint, PICKLED[0]).exists()


# ---- writing


@contextmanager
def new_checkpoint(output: Path, step: int) -> Iterator[Path]:
    """`with new_checkpoint(output, step) as beside`: write its files to beside/checkpoint-STEP.

    When the block ends, they are hashed, flushed, and the folder is renamed to `output`, in the
    place of an older one of that name. If anything fails, `output` is as before.
    """
    name = f"checkpoint-{step}"
    beside, older = output / f".{name}.partial", output / f".{name}.old.partial"
    remove_partial(output)  # of a process that was killed
    beside.mkdir(parents=True)
    try:
        yield beside
        seal(beside / name)
        if (output / name).exists():
            os.rename(output / name, older)
        os.rename(beside / name, output / name)
        _flush(output)
    finally:
        if older.exists() and not (output / name).exists():
            os.rename(older, output / name)
        remove_partial(output)


def remove_partial(output: Path) -> None:
    """Remove what a killed process left while it wrote or removed a checkpoint."""
    for folder in output.glob(".checkpoint-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the hashes of the files in a checkpoint, and flush all of them to the disk."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != HASHES)
    mode = folder.stat().st_mode & 0o666
    for name in names:
        (folder / name).chmod(mode)  # safetensors ignores the umask
        _flush(folder / name)
    hashes = {name: _sha256(folder / name) for name in names}
    path = folder / HASHES
    path.write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
    _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_old(output: Path, limit: int, keep: set[int], sound_step: int) -> None:
    """Remove checkpoints but the last `limit`, those of the steps in `keep`, and the last one whose
    adapter has given a finite loss, which `sound_step` bounds."""
    checkpoints = complete_checkpoints(output)
    steps = sorted(checkpoints)
    sound = [step for step in steps if step <= sound_step]
    for step in set(steps[:-limit]) - keep - set(sound[-1:]):
        removed = output / f".checkpoint-{step}.partial"
        os.rename(checkpoints[step], removed)  # never half of it under its name
        shutil.rmtree(removed, ignore_errors=True)


def set_aside(output: Path, step: int) -> None:
    """Rename the checkpoints after the one of `step`, which are damaged."""
    for folder in output.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdecimal() and int(number) > step:
            aside = folder.with_name(f"{ASIDE}{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


# ---- reading


def complete_checkpoints(output: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints whose Trainer's state is there and whole."""
    checkpoints = {}
    for folder in output.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        with suppress(UserError):
            if step.isdecimal() and state_at(folder).global_step == int(step):
                checkpoints[int(step)] = folder
    return checkpoints


def state_at(checkpoint: str | Path) -> TrainerState:
    """Trainer's state in a checkpoint; UserError for another file of that name."""
    path = Path(checkpoint, "trainer_state.json")
    values = files.read_json(path)
    require_types(values, STATE_TYPES, path)
    try:
        return TrainerState(**values)
    except TypeError as error:
        raise UserError(f"{path} is not a state of Trainer: {first_line(error)}") from error


def read_stream(checkpoint: str | Path) -> dict[str, Any]:
    """The place in the data that a checkpoint of a streamed run has; empty without one."""
    path = Path(checkpoint, STREAM)
    return files.read_json(path) if path.is_file() else {}


def damage(folder: Path) -> str:
    """Which files of a checkpoint are missing or differ from their hashes; empty if it is whole."""
    try:
        hashes = files.read_json(folder / HASHES)["sha256"]
        listed = {str(name): str(sha256) for name, sha256 in hashes.items()}
    except (UserError, KeyError, AttributeError):
        return f"{HASHES} missing or damaged"
    bad = [name for name in listed if name != Path(name).name or not (folder / name).is_file()]
    bad += [n for n in listed if n not in bad and _sha256(folder / n) != listed[n]]
    return f"{some(bad)} missing or damaged" if bad else ""


def resumable(output: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, None without one; and what is wrong with each later one.

    Raises:
        UserError: it lacks the files that training goes on with.
    """
    faults = []
    for _, folder in sorted(complete_checkpoints(output).items(), reverse=True):
        pickled = [name for name in PICKLED if (folder / name).is_file()]
        adapter = f"go on with its adapter, --adapter {folder}, and a new --output-dir"
        require(
            not pickled or (folder / HASHES).is_file(),
            f"{folder} cannot be resumed from: {', '.join(pickled)} of an earlier version are "
            f"pickles, which are not read: {adapter}",
        )
        if fault := damage(folder):
            faults.append(f"{folder.name}: {fault}")
            continue
        missing = [name for name in (OPTIMIZER, RANDOM) if not (folder / name).is_file()]
        require(
            not missing,
            f"{folder} cannot be resumed from: it has no {' and no '.join(missing)} "
            f"(--trainer.save_only_model leaves them out). Remove it to resume from an earlier "
            f"one, or {adapter}",
        )
        return folder, faults
    return None, faults


def last_checkpoint(output: Path) -> str:
    """A sentence: which checkpoint a run can be continued from."""
    if checkpoints := complete_checkpoints(output):
        last = checkpoints[max(checkpoints)]
        return f"{last} is saved, the same command with --resume continues from it"
    return "there is no checkpoint yet, the same command starts again"
