"""What a run says while it goes: rows of metrics.jsonl, and a readable line on the terminal.

Memory of a run: what it did need. (What one will need, before it starts, comes later.)
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from qlora.files import METRICS, read_metrics, replace_text

EVALUATED = {
    "eval_loss": "evaluation loss",
    "eval_accuracy": "accuracy",
    "eval_f1": "F1",
}
"""What evaluation measures, and how it is called on the terminal."""
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps  {remaining} left{postfix}"


class MetricsWriter(TrainerCallback):
    """A row of metrics.jsonl per log, with the speed since the last one, the seconds of the run so
    far and the peak of memory."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.tokens = 0
        self.started = self.begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed run logs the steps after its checkpoint again: drop the first telling.
        kept = [r for r in read_metrics(self.path.parent) if r["step"] <= state.global_step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.tokens, self.started = state.num_input_tokens_seen, time.perf_counter()
        self.begun = self.started - (kept[-1].get("seconds", 0) if kept else 0)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = {} if logs is None else logs
        row: dict[str, Any] = {"step": state.global_step, "epoch": logs.get("epoch")}
        if "loss" in logs:
            now = time.perf_counter()
            speed = (state.num_input_tokens_seen - self.tokens) / (now - self.started)
            self.tokens, self.started = state.num_input_tokens_seen, now
            row |= {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate")}
            row |= {"tokens_per_second": speed, "peak_bytes": peak_bytes()}
        elif "eval_loss" in logs:
            row |= {name: logs[name] for name in EVALUATED if name in logs}
            row |= {"peak_bytes": peak_bytes()}
        else:
            return
        row["seconds"] = time.perf_counter() - self.begun
        logs.update({k: v for k, v in row.items() if k not in ("step", "epoch")})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step, whatever logging_steps is

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()  # evaluation is not training time


class PlainProgress(ProgressCallback):
    """A bar on a terminal, with loss, speed and the time left; everywhere a readable line a log."""

    training_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.current_step = state.global_step  # not 0 in a run that goes on
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            bar_format=BAR,
            dynamic_ncols=True,
            smoothing=0,  # the time left is by the mean of all steps: evaluations come in between
            disable=not sys.stderr.isatty(),  # None, in a notebook, would show one
        )

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        line = describe_log(logs or {})
        if line:
            width = len(str(state.max_steps))
            tqdm.write(f"step {state.global_step:>{width}}/{state.max_steps}  {line}")
        if line and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(line)


def describe_log(logs: dict[str, Any]) -> str | None:
    """`loss 1.2345  512 tokens/s  peak 1.8 GiB`, or what evaluation found, or None for the rest."""
    if "eval_loss" in logs:
        return "  ".join(f"{said} {logs[k]:.4f}" for k, said in EVALUATED.items() if k in logs)
    if "tokens_per_second" not in logs:
        return None
    return (
        f"loss {float(logs['loss']):.4f}  {logs['tokens_per_second']:,.0f} tokens/s"
        f"  peak {show_bytes(logs['peak_bytes'])}"
    )


def device() -> tuple[str, int | None]:
    """Name and bytes of memory of what computes: the GPU, or the CPU; None if not known."""
    if torch.cuda.is_available():
        found: Any = torch.cuda.get_device_properties()
        return str(found.name), int(found.total_memory)
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return "CPU", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "CPU", None


def peak_bytes() -> int:
    """Most bytes held so far: allocated on the GPU where there is one, else resident in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most bytes of this process that were resident in memory at once."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage would begin with the peak of the parent process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def show_bytes(count: int) -> str:
    """`1.23 GiB`, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
