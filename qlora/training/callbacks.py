"""Callbacks that steer a run between its steps.

ReturnMemory  freed memory goes back to the system
SaveOnSignal  a signal ends it, with a checkpoint
Owed          an evaluation that the run was stopped in is done when it is resumed
FiniteSteps   a loss or gradient that is not finite is named, and changes nothing; spikes are named
EarlyStop     the evaluations get no better
FreeCores     it uses the CPU cores that other processes leave free
"""

import ctypes
import os
import shutil
import signal
import statistics
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from qlora.base.sharding import is_sharded
from qlora.cli import drop_lost_output
from qlora.errors import STOPS, Interrupted, ignore_hangups
from qlora.files import read_metrics
from qlora.training import ranks
from qlora.training.checkpoints import complete_checkpoints, last_checkpoint
from qlora.training.outputs import show_rows
from qlora.training.shares import blank_batch

# A spike is a loss so many standard deviations above the mean of the last steps, and half above it:
# losses of few rows differ much, those of a small model late in training hardly.
SPIKE, SPIKE_SHARE, SPIKE_STEPS = 6.0, 1.5, range(10, 51)
NOT_FINITE = "not-finite-"  # before the name of a checkpoint whose adapter gives no finite loss
REPEAT_SECONDS = 3.0  # in which torchrun passes on a Ctrl-C that its processes already have
MMAP_THRESHOLD, LARGE = -3, 1 << 20  # glibc's name of the setting, and its value in bytes
SECONDS = 2.0  # from one look at the load of the CPU to the next


def return_freed_memory() -> None:
    """Let glibc return freed tensors of LARGE bytes or more to the system, for a run on a CPU.

    By itself it keeps those up to 32 MiB, and can hardly use them again, as tensors are aligned and
    of many sizes: four rows of 1,024 tokens of SmolLM2-135M took 1,988 MiB above the process's
    start, where the tensors take 624. New pages cost system time: of 6 layers and four rows of 256
    tokens, the least of five steps took 3.59 s of CPU time instead of 3.41.
    """
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


class ReturnMemory(TrainerCallback):
    """Lets glibc return its free pages to the system at each checkpoint of a run on a CPU: what
    oneDNN's kernels leave between other memory grows with the steps."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with suppress(OSError, AttributeError, TypeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


class SaveOnSignal(TrainerCallback):
    """Ctrl-C, SIGTERM and SIGHUP save a checkpoint after the current step and raise Interrupted; a
    second signal ends the run at once, but for SIGHUP.

    `noted` is the number of the signal that this process has, `number` that of the run: of several
    ranks, which agree on it once a step, all stop after the same one.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.before = trainer, dict[int, Any]()
        self.noted, self.noted_at, self.number = 0, 0.0, 0

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other can handle signals
            for number in (signal.SIGINT, *STOPS):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if ranks.has_lost_one():  # torchrun ends the others, too
            os._exit(128 + number)
        if self.noted and time.monotonic() - self.noted_at < REPEAT_SECONDS:
            return
        if ranks.count() == 1 or self.noted:
            self.__exit__()
            ignore_hangups()
        if self.noted:
            signal.raise_signal(number)
        self.noted, self.noted_at = number, time.monotonic()
        if ranks.count() == 1:
            self.number = number

    def of_any(self) -> int:
        """The number of a signal that any rank has noted, on which all agree."""
        self.number = int(ranks.most(self.noted))
        return self.number

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.number and not control.should_save:
            control.should_save = True  # after the last substep
            drop_lost_output()
            tqdm.write("stopping after this step, to save a checkpoint; once more stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.number:
            drop_lost_output()
            control.should_log, control.should_evaluate, control.should_save = True, False, True
            args.save_only_model = False  # or else the checkpoint could not be resumed from

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.of_any():  # the step before the evaluation is whole
            output = Path(str(args.output_dir))
            is_saved = ranks.of_first(state.global_step in complete_checkpoints(output))
            if self.trainer.is_in_train and state.global_step and not is_saved:
                args.save_only_model = False
                self.trainer._save_checkpoint(self.trainer.model)
            self.on_save(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.number:
            raise Interrupted(last_checkpoint(Path(str(args.output_dir))), self.number)


class NothingLeft(Exception):
    """A resumed run has no step to train."""


class Owed(TrainerCallback):
    """Does the evaluation that the run was stopped before or in, for metrics.jsonl, the best
    checkpoint and early stopping. Raises NothingLeft if it then has no further step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if state.global_step and owes_evaluation(trainer, state):
            trainer._determine_best_metric(trainer._evaluate(None, None), None)
            if control.should_training_stop or state.global_step >= state.max_steps:
                raise NothingLeft


def owes_evaluation(trainer: Any, state: Any) -> bool:
    """Whether the evaluation after the last step of a checkpoint's state is due and not in its log.
    Where no best model is chosen, metrics.jsonl may have it."""
    args, step = trainer.args, state.global_step
    steps, batches = trainer.lengths_of_run()
    state.compute_steps(args, steps)
    if args.eval_strategy == "steps":
        is_due = step % state.eval_steps == 0 or step >= steps  # Trainer evaluates the last one
        is_due &= args.eval_delay <= step
    else:
        per_epoch = -(-batches // args.gradient_accumulation_steps)
        is_end = (step - trainer.rows_from) % per_epoch == 0 or step >= steps
        is_due = args.eval_strategy == "epoch" and is_end and args.eval_delay <= state.epoch
    logs = list(state.log_history)
    if args.metric_for_best_model is None:
        logs += read_metrics(Path(str(args.output_dir)))
    is_due &= not any(row["step"] == step and "eval_loss" in row for row in logs)
    return bool(ranks.of_first(is_due))  # which writes that file


def tokens_of(batch: Any) -> Tensor:
    """The number of tokens in a batch without padding, on its device."""
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()


class FiniteSteps(TrainerCallback):
    """Skips the steps whose loss or gradient is not finite, and prints their rows, as it does for
    spikes of the loss. It counts the tokens of each step as well, where a GPU is waited for anyway.

    A run stops after `limit` such steps in a row; not in a row, after as many and more than a tenth
    of its steps, so that one bad row does not end a run of many epochs.

    A step is also the test of the adapter that it begins with: `sound_step` is the last one at
    whose end the adapter was known to give a finite loss; `is_sound`, whether the last test passed.
    """

    def __init__(self, trainer: Any, limit: int = 5) -> None:
        self.trainer, self.limit = trainer, limit
        self.batches: list[tuple[Any, Tensor]] = []  # of this step, with their losses
        self.losses = deque[float](maxlen=SPIKE_STEPS.stop - 1)  # of the last steps
        self.skipped, self.in_a_row, self.most = 0, 0, float(limit)  # steps
        self.sound_step, self.is_sound = 0, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sound_step = state.global_step - 1  # a checkpoint is saved after a finite loss
        steps = state.max_steps - state.global_step
        self.most = max(self.limit - 1, steps / 10)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model, scaler = self.trainer.model, getattr(self.trainer.accelerator, "scaler", None)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # a loss scale above 1 makes fp16 gradients overflow: its scaler skips the step, lowers it
        is_scaled = scaler is not None and scaler.get_scale() > 1
        batches, self.batches = self.batches, []
        norm = get_total_norm(gradients)
        tests = [norm.isfinite(), *(loss.isfinite() for _, loss in batches)]
        is_counted = self.trainer.args.include_num_input_tokens_seen == "non_padding"
        counts = [tokens_of(inputs) for inputs, _ in batches] if is_counted else []
        losses = [loss for _, loss in batches]
        read = [n.to(norm.device, torch.float64) for n in (*tests, *losses, *counts)]
        has_norm, *numbers = torch.stack(read).tolist()  # a GPU is waited for once per step
        finite, values = numbers[: len(batches)], numbers[len(batches) : 2 * len(batches)]
        broken = [inputs for (inputs, _), ok in zip(batches, finite, strict=True) if not ok]
        of_all = (len(broken), sum(finite), sum(values), sum(numbers[2 * len(batches) :]))
        bad, good, sums, tokens, signals = ranks.numbers(*of_all, self.trainer.on_signal.noted)
        if ranks.count() > 1:
            self.trainer.on_signal.number = int(max(signals))
        state.num_input_tokens_seen += int(sum(tokens))
        if not any(bad) and (is_scaled or has_norm):
            self.sound_step, self.is_sound, self.in_a_row = state.global_step, True, 0
            self._look_for_spike(sum(sums) / len(sums), batches, state.global_step + 1)
            return
        if scaler is None:
            model.zero_grad()  # optimizers skip parameters without a gradient
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.is_sound = any(bad) and any(good)
        if self.is_sound:  # of the other batches: the rows are the cause, not the adapter
            self.sound_step = state.global_step
        if any(bad):
            self.trainer.logs_nan = True
        step, what = state.global_step + 1, "loss" if any(bad) else "gradient"
        shown = broken if any(bad) else [inputs for inputs, _ in batches]
        rows = self.show(shown, self.trainer.train_dataset)
        tqdm.write(f"step {step}: the {what} is not finite, the adapter stays as it was{rows}")
        if self.in_a_row == self.limit or self.skipped > self.most:
            ranks.refuse(self.fault())

    def show(self, batches: list[Any], dataset: Any) -> str:
        """`show_rows` of the batches of all ranks."""
        rows = show_rows(batches, dataset, self.trainer.processing_class) if batches else ""
        return "".join(ranks.gathered(rows))

    def _look_for_spike(self, loss: float, batches: list[Any], step: int) -> None:
        """Print the rows of a step whose loss is far above that of the steps before."""
        if len(self.losses) in SPIKE_STEPS:
            mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
            if loss > mean * SPIKE_SHARE and loss > mean + SPIKE * deviation:
                rows = self.show([inputs for inputs, _ in batches], self.trainer.train_dataset)
                before = f"{mean:.4f} in the last {len(self.losses)} steps"
                tqdm.write(f"step {step}: the loss is {loss:.4f}, it was {before}{rows}")
        self.losses.append(loss)

    def passes_again(self) -> bool:
        """Whether one of `limit` batches has a finite loss: those of the last step had not."""
        trainer, one = self.trainer, torch.tensor(1, device=self.trainer.args.device)
        if not self.skipped:  # an evaluation had not
            return False

        def is_finite(inputs: Any) -> bool:
            batch = trainer._prepare_inputs(inputs)
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=one)
            return bool(loss.isfinite())

        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # as in check_data
            batches = islice(trainer.get_train_dataloader(), self.limit)
            if not is_sharded(trainer.model):
                return bool(ranks.most(any(map(is_finite, batches))))
            passes = [*map(is_finite, batches)]  # all of them, and as many on each rank
            for _ in range(self.limit - len(passes)):
                is_finite(blank_batch(trainer.args.device))
            return bool(ranks.most(any(passes)))

    def fault(self) -> str:
        """What went wrong, the last good checkpoint, and how to mend it. Later checkpoints are
        renamed, so that --resume goes on from the good one; by the first rank."""
        if not ranks.is_first():
            return "the loss or its gradient was not finite"
        output = Path(str(self.trainer.args.output_dir))
        checkpoints = complete_checkpoints(output)
        good = [n for n in checkpoints if n <= self.sound_step]
        last = f"The last good checkpoint is {output}/checkpoint-{max(good, default='')}"
        last = last if good else "There is no good checkpoint"
        for folder in (checkpoints[n] for n in checkpoints.keys() - set(good)):
            aside = folder.with_name(f"{NOT_FINITE}{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            last += f", {folder.name} is now {aside.name}"
        return (
            f"the loss or its gradient was not finite ({self.skipped} steps were skipped), so "
            f"training has ended and no adapter was written. {last}. Lower --learning-rate, remove "
            "the rows named above, or give --compute-dtype fp32"
        )


class EarlyStop(EarlyStoppingCallback):
    """transformers' early stopping, said, and with its count kept in a resumed run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        super().on_train_begin(args, state, control, **named)  # type: ignore[no-untyped-call]
        self.early_stopping_patience_counter = bad_evaluations(state)
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # Trainer's save wants it

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = (), **named: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **named)  # type: ignore[no-untyped-call]
        if control.should_training_stop:
            count = self.early_stopping_patience_counter
            tqdm.write(
                f"step {state.global_step}: no new best in {count} evaluation{'s' * (count > 1)}, "
                f"training stops; the best was at step {state.best_global_step}"
            )


def bad_evaluations(state: Any) -> int:
    """The evaluations without a new best that a checkpoint's state has counted."""
    saved = state.stateful_callbacks.get(EarlyStop.__name__) or {}
    return int(saved.get("attributes", {}).get("early_stopping_patience_counter", 0))


class FreeCores(TrainerCallback):
    """Sets torch's threads, between steps, to the number of cores that other processes leave free.

    The threads that compute a product wait for each other at its end. A thread whose core another
    process holds keeps all of them waiting: with one busy process on two cores, steps of two
    threads take three times as long as steps of one (benchmarks/contention.py).

    The number is at least one, and never above that at the start. Sums by another number of threads
    differ in their last digits: a run under OMP_NUM_THREADS keeps that number.
    """

    def __init__(self) -> None:
        self.most, self.is_told = torch.get_num_threads(), False
        self.process, self.looked_at = psutil.Process(), 0.0
        every = range(psutil.cpu_count() or 1)
        # macOS binds no process to cores
        self.cores = [*getattr(os, "sched_getaffinity", lambda _: every)(0)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._cores_of_others()  # psutil measures from here

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_set = args.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ
        if is_set or time.perf_counter() - self.looked_at < SECONDS:
            return
        others = self._cores_of_others()
        threads = min(self.most, max(1, round(len(self.cores) - others)))
        if threads < self.most and not self.is_told:
            self.is_told = True
            tqdm.write(
                f"Other processes use {others:.1f} of {len(self.cores)} cores: training goes on "
                f"with {threads} of {self.most} threads, and with more when cores are free. "
                "OMP_NUM_THREADS sets a number that stays"
            )
        torch.set_num_threads(threads)

    def _cores_of_others(self) -> float:
        """The cores that other processes have used since the last call."""
        self.looked_at = time.perf_counter()
        busy, own = psutil.cpu_percent(percpu=True), self.process.cpu_percent()
        return max(0.0, float(sum(busy[core] for core in self.cores) - own)) / 100
