"""CPU threads of a run on a CPU: fewer while other processes use cores.

The threads that compute a product wait for each other at its end. A thread whose core another
process holds keeps all of them waiting: with one busy process on two cores, steps of two threads
take three times as long as steps of one (benchmarks/contention.py).
"""

import os
import time
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

SECONDS = 2.0  # from one look at the load to the next


class FreeCores(TrainerCallback):
    """Sets torch's threads, between steps, to the number of cores that other processes leave free.

    It is at least one, and never above the number at the start. Sums by another number of threads
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
