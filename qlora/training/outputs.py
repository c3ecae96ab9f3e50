"""The lines that a run prints, and the files that it writes beside the adapter and checkpoints.

run.yaml        config, versions, base, counts of the data and device, before the first step
metrics.jsonl   a row per log: loss, learning rate, tokens/s, peak memory; or evaluation's
samples.jsonl   answers to a few rows of the data, before and after training
loss.png        the curves of metrics.jsonl
README.md       the model card
"""

import errno
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora import __version__, files
from qlora.adapters.format import WEIGHTS
from qlora.cli import Progress
from qlora.data import generation
from qlora.errors import UserError, require, some
from qlora.training import ranks
from qlora.training.checkpoints import complete_checkpoints, last_checkpoint, resumable

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets")
# What a run leaves that failed before its first checkpoint; "runs" is TensorBoard's folder.
LEFTOVERS = re.compile(
    r"run\.yaml|inspect\.html|metrics\.jsonl|samples\.jsonl|runs|"
    r"((not-finite|damaged)-)?checkpoint-\d+|\..*\.partial|\.lock"
)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG)
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps  {remaining} left{postfix}"
# Trainer's key -> name on the terminal
EVALUATED = {"eval_loss": "evaluation loss", "eval_accuracy": "accuracy", "eval_f1": "F1"}
Values = Mapping[str, Any]


def write_run_file(
    folder: Path, settings: Values, base: Values, data: Values, resumed: Sequence[Values] = ()
) -> None:
    """Write run.yaml: `train.py --config run.yaml` repeats the run. `resumed`: the settings that
    were changed when it was resumed, by step. Only the first of several ranks writes."""
    if not ranks.is_first():
        return
    given = settings["data"]
    places = [Path(name).expanduser() for name in ([given] if isinstance(given, str) else given)]
    versions = {"qlora": __version__, "python": platform.python_version()}
    record: dict[str, Any] = {
        "config": dict(settings),
        "versions": versions | {name: importlib.metadata.version(name) for name in PACKAGES},
        "base": dict(base),
        "data": data,
        "data_paths": [str(place.absolute()) for place in places if place.exists()],
        "device": dict(zip(("name", "memory_bytes"), device(), strict=True)),
    }
    record |= {"ranks": ranks.count()} if ranks.count() > 1 else {}
    record |= {"resumed": list(resumed)} if resumed else {}
    files.replace_text(folder / files.RUN, yaml.safe_dump(record, sort_keys=False))


def write_stops(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Let a model that generates stop at the tokens that training teaches to end an answer with,
    and write its generation_config.json."""
    config: Any = getattr(model, "generation_config", None)
    if config is not None:
        config.eos_token_id = generation.stop_ids(model, tokenizer) or None
        values = json.loads(config.to_json_string())
        files.replace_text(folder / files.GENERATION, json.dumps(values, indent=2) + "\n")


class MetricsWriter(TrainerCallback):
    """Appends a row to metrics.jsonl at each log, and adds speed, memory and seconds to the log."""

    def __init__(
        self, folder: Path, planned_bytes: int | None = None, *, goes_on: bool = True
    ) -> None:
        self.path, self.tokens = folder / files.METRICS, 0  # seen at the last log
        self.goes_on, self.waiting = goes_on, ""  # lines for which the disk had no room
        self.planned_bytes = planned_bytes  # the plan's peak, beside the measured one
        self.logged_at = self.started_at = 0.0
        self.has_epochs = True

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        # that of a streamed run would be the share of the run
        dataset = getattr(train_dataloader, "dataset", None)
        self.has_epochs = getattr(dataset, "has_epochs", True)
        # A resumed run logs the steps after its checkpoint again: their first rows are dropped.
        # So is an evaluation that the checkpoint lacks where the best is chosen: it is done again.
        step, rows = state.global_step, files.read_metrics(self.path.parent)
        known = [row["step"] for row in state.log_history if "eval_loss" in row]
        if args.metric_for_best_model and step not in known:
            rows = [r for r in rows if r["step"] < step or "eval_loss" not in r]
        rows = [r for r in rows if r["step"] <= step]
        files.replace_text(self.path, "".join(map(files.metrics_line, rows)))
        self.tokens, self.logged_at = state.num_input_tokens_seen, time.perf_counter()
        self.started_at = self.logged_at - (rows[-1].get("seconds", 0) if rows else 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = (), **_: Any) -> None:
        if "loss" in logs:
            row = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate")}
            tokens, now = state.num_input_tokens_seen, time.perf_counter()
            row["tokens_per_second"] = (tokens - self.tokens) / (now - self.logged_at)
            self.tokens, self.logged_at = tokens, now
        elif "eval_loss" in logs:
            row = {name: logs[name] for name in EVALUATED if name in logs}
        else:
            return
        row["peak_bytes"] = peak_bytes()
        row |= {"planned_bytes": self.planned_bytes} if self.planned_bytes else {}
        row["seconds"] = time.perf_counter() - self.started_at
        logs.update(row)
        at = {"step": state.global_step, "epoch": logs.get("epoch") if self.has_epochs else None}
        self._append(files.metrics_line(at | row))

    def _append(self, line: str) -> None:
        """Append a line; on a full disk, keep it for the next time, or raise OSError."""
        lines = self.waiting + line
        self.path.parent.mkdir(parents=True, exist_ok=True)  # it may have been moved or removed
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
            self.waiting = ""
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # half of a line
            if not self.goes_on:
                raise
            if not self.waiting:
                tqdm.write(
                    f"error: {self.path} cannot be written: {error.strerror}. Make room: its rows "
                    "are kept, and written with a later one"
                )
            self.waiting = lines

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.flush()

    def flush(self) -> None:
        """Try once more to write the lines for which the disk had no room."""
        if self.waiting:
            self._append("")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.logged_at = time.perf_counter()  # evaluation is not training time


class LastLog(TrainerCallback):
    """The last step is always logged: by all ranks, as Trainer gathers their losses."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class PlainProgress(ProgressCallback):
    """A readable line per log; on a terminal also a bar with loss, speed and the time left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.current_step = state.global_step  # not 0 in a resumed run
        self.training_bar: Any = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            bar_format=BAR,
            dynamic_ncols=True,
            smoothing=0,  # time left from the mean step, as evaluations are slow steps
            disable=not sys.stderr.isatty(),  # None would show a bar in a notebook
        )

    def on_prediction_step(self, *args: Any, eval_dataloader: Any = (), **_: Any) -> None:
        if self.prediction_bar is None:
            self.prediction_bar: Any = Progress(total=len(eval_dataloader), desc="Evaluating")
        self.prediction_bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = (), **_: Any) -> None:
        if "eval_loss" in logs:
            values = [f"{name} {logs[key]:.4f}" for key, name in EVALUATED.items() if key in logs]
        elif "tokens_per_second" in logs:
            speed, peak = logs["tokens_per_second"], show_bytes(logs["peak_bytes"])
            values = [f"loss {float(logs['loss']):.4f}", f"{speed:,.0f} tokens/s", f"peak {peak}"]
        else:
            return
        line, width = "  ".join(values), len(str(state.max_steps))
        tqdm.write(f"step {state.global_step:>{width}}/{state.max_steps}  {line}")
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(line)


def device() -> tuple[str, int]:
    """Name and memory in bytes of the GPU, or else of the CPU."""
    if torch.cuda.is_available():
        gpu: Any = torch.cuda.get_device_properties()
        return str(gpu.name), int(gpu.total_memory)
    return "CPU", int(psutil.virtual_memory().total)


def peak_bytes() -> int:
    """Peak of the GPU's allocated memory; without one, of this process's resident memory."""
    on_gpu = torch.cuda.is_available()
    return int(torch.cuda.max_memory_allocated()) if on_gpu else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak of this process's resident memory, without its children."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would start from the parent process's peak
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak[1]) * 1024 if peak else 0
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


# ---- the folder of a run


def checkpoint_to_resume(output: Path) -> Path | None:
    """The last whole checkpoint; prints which are damaged. None for a run that has none yet, which
    is printed: the command that is repeated after a crash is the same whenever that was.

    Raises:
        UserError: all checkpoints are damaged or lack files that training goes on with; or the
            folder holds something else.
    """
    steps = complete_checkpoints(output)
    cut = sorted(
        {path.name for path in output.glob("checkpoint-*")} - {f.name for f in steps.values()}
    )
    checkpoint, faults = resumable(output)
    if cut:
        faults.append(f"{some(cut)} of {output} has no whole trainer_state.json")
    lacks = "; ".join(faults) or f"{output} holds no checkpoint-N to resume from"
    if checkpoint is None:
        is_free = not (output.is_dir() and any(output.iterdir())) or is_left_over(output)
        if is_free and not faults:
            print(f"--resume: {output} has no checkpoint yet, the run starts from the beginning")
            return None
        again = f"drop --resume, which starts again{', and removes them' if cut else ''}"
        raise UserError(f"{lacks}: {again if is_free else 'give a new --output-dir'}")
    if faults:
        print(f"warning: {lacks}: {checkpoint.name} is resumed from")
    return checkpoint


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Create and lock a run's folder; UserError if it is in use, or the disk is full or fails. The
    first of several ranks has it for all."""
    if not ranks.is_first():
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        with files.locked(output):
            yield
    except Exception as error:
        if reason := disk_error(error):
            fix = "Make room, or mend the cause"
            raise UserError(
                f"{output} cannot be written: {reason}. {fix}: {last_checkpoint(output)}"
            ) from error
        raise


@contextmanager
def no_empty_folder(output: Path) -> Iterator[None]:
    """Remove `output`, which Trainer creates, if the block fails and it is empty."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            output.rmdir()
        raise


def disk_error(error: Exception) -> str:
    """Why a file could not be written, whichever library wrote it; empty for other errors."""
    number = getattr(error, "errno", None)
    if in_rust := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, tokenizers
        number = int(in_rust[1])
    if number in DISK_ERRORS:
        return os.strerror(number)
    is_torchs = re.search(r"inline_container|PytorchStreamWriter", str(error))
    return "a file of the checkpoint is cut, the disk seems to be full" if is_torchs else ""


def is_left_over(output: Path) -> bool:
    """Whether a folder has only what a run leaves that failed before its first checkpoint."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    is_known = all(map(LEFTOVERS.fullmatch, names))
    shown = {name for name in names if not name.startswith(".")}
    is_begun = bool(names) and (files.RUN in names or shown <= {files.INSPECTION})
    return is_begun and is_known and not complete_checkpoints(output)


def require_no_other_run(output: Path, resume_from: str | None) -> None:
    """Raise if another command has trained in `output` since this one looked at it."""
    checkpoint = resumable(output)[0]
    is_new = checkpoint is None and not (output / WEIGHTS).exists()
    is_as_it_was = str(checkpoint) == resume_from if resume_from else is_new
    fix = "give a new --output-dir, or --resume to continue that run"
    require(is_as_it_was, f"another run has used {output} meanwhile: {fix}")


def remove_leftovers(output: Path) -> None:
    """Remove the files that the next run would read or keep; the others it writes anew."""
    for name in (files.METRICS, files.SAMPLES):
        (output / name).unlink(missing_ok=True)
    for folder in output.glob("*checkpoint-*"):
        shutil.rmtree(folder)


def read_run(output: Path) -> dict[str, Any]:
    """The contents of run.yaml; empty, and said so, if there is none."""
    recorded = files.read_run_file(output)
    if not recorded:
        path = output / files.RUN
        print(f"there is no {path}: the settings are not compared with those of the run's start")
    return recorded


# ---- what a run shows and writes


def show_rows(batches: list[Any], dataset: Any, tokenizer: Tokenizer | None) -> str:
    """`: row 3 ('What is …'), …`, the rows in `batches`, with their numbers in `dataset`."""
    shown = {tuple(ids): "a row" for batch in batches for ids in _rows_of(batch)}
    for number, row in enumerate(getattr(dataset, "rows", dataset), start=1):
        if (ids := tuple(row["input_ids"])) in shown:
            shown[ids] = f"row {number}"
    for ids, name in shown.items():
        text = str(tokenizer.decode(list(ids)) if tokenizer else ids)
        text = text if len(text) <= 60 else f"{text[:30]} … {text[-30:]}"
        shown[ids] = f"{name} ({text!r})"
    return f": {some(list(shown.values()), 8)}"


def _rows_of(batch: Any) -> Iterator[list[int]]:
    """The token ids of each row in a batch, whether padded, concatenated or packed."""
    for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        ids, begins = ids[mask.bool()], [0]
        if "position_ids" in batch:
            begins = (batch["position_ids"][i][mask.bool()] == 0).nonzero().flatten().tolist()
        for begin, end in pairwise([*begins, len(ids)]):
            yield ids[begin:end].tolist()


def show_bytes(count: int) -> str:
    """`1.23 GiB`, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def write_results(
    folder: Path, settings: Values, base: Values, *, rows: str, steps: tuple[int, int]
) -> None:
    """Write loss.png and README.md from metrics.jsonl; print the next commands.

    `steps`: those of the adapter, and of the run, which goes on after the best checkpoint.
    """
    metrics = files.read_metrics(folder)
    per = "label" if "labels" in base else "supervised token"
    from qlora.pictures import draw_run, save_png  # matplotlib, which takes a while to import

    save_png(draw_run(metrics, per=per, total_bytes=device()[1]), folder / "loss.png")
    step, all_steps = steps
    is_best = step < all_steps
    last = {key: value for row in metrics if row["step"] <= step for key, value in row.items()}
    names = {"loss": "training loss", **EVALUATED}
    values = [f"{name.lower()} {last[key]:.4f}" for key, name in names.items() if key in last]
    measured = ", ".join(values) or "not logged"
    shown = f"{step}, the best of {all_steps}" if is_best else str(step)
    write_adapter_card(folder, settings, base, rows=rows, steps=shown, measured=measured)
    if is_best:
        print(f"\nThe best checkpoint is that of step {step}: {measured}.", end="")
    print(f"\nThe adapter is in {folder}; its loss curve is {folder / 'loss.png'}.")
    name, merged = shlex.quote(str(folder)), shlex.quote(f"{folder}-merged")
    print(f"Report:        python -m qlora.report {name}")
    if settings["task"] == "causal-lm":
        print(f"Chat with it:  python -m qlora.chat --adapter {name} --compare")
    print(f"Merge it:      python -m qlora merge --adapter {name} --output-dir {merged}")


def write_adapter_card(
    folder: Path, settings: Values, base: Values, *, rows: str, steps: str, measured: str
) -> None:
    """Write README.md of an adapter; `measured` are its losses and scores."""
    name, task, targets = str(base["resolved"]), settings["task"], settings["target_modules"]
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    data = settings["data"]
    sources = [data] if isinstance(data, str) else data
    double = " with double quantization" if base["double_quant"] else ""
    quoted = json.dumps(name, ensure_ascii=False)
    arguments, head = "" if task == "causal-lm" else f', task="{task}"', ""
    if "labels" in base:
        arguments += f", labels={list(base['labels'])!r}"
        head = f" Trained in full beside it: {', '.join(base['heads'])}."
    start = f"| started from | {settings['adapter']} |\n" if settings.get("adapter") else ""
    text = f"""{files.front_matter(name, "peft", "lora", "qlora")}
# LoRA adapter for {Path(name).name}

Trained with QLoRA: the base was frozen in 4 bits ({base["quant_type"].upper()}, blocksize
{base["blocksize"]}{double}), the adapter has rank {settings["r"]} and lora_alpha
{settings["lora_alpha"]:g} on {targets}.{head}

| | |
|---|---|
| data | {", ".join(sources)} ({rows}) |
{start}| learning rate | {settings["learning_rate"]:.3g} |
| optimizer steps | {steps} |
| after these steps | {measured} |

![loss](loss.png)

Use it live on the 4-bit base it was trained on:

```python
from qlora import load_base, load_adapter
model = load_adapter(load_base({quoted}{arguments}), "path/to/this/folder")
```

or with PEFT (`PeftModel.from_pretrained`), or merged: `python -m qlora merge --adapter
path/to/this/folder --output-dir merged`.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
