"""`python train.py` without --plan: the plan of the run in one line, then the run."""

from pathlib import Path

import torch

import qlora.training
from qlora.config import TrainConfig
from qlora.errors import first_line
from qlora.training.outputs import show_bytes


def run(config: TrainConfig) -> Path:
    """`qlora.training.train`, which then logs the planned peak beside the measured one."""
    return qlora.training.train(config, planned_bytes=planned_bytes(config))


def planned_bytes(config: TrainConfig) -> int | None:
    """The planned peak memory, which is printed; None where there is no plan, which is no error."""
    if not torch.cuda.is_available():  # the plan is of a GPU
        return None
    from qlora.plan.estimate import plan  # takes a moment to import

    try:
        with torch.random.fork_rng(devices=[]):  # the run draws the same numbers without a plan
            made = plan(config)
    except Exception as error:  # of a model's code, too
        print(f"plan: none for this run: {first_line(error)}")
        return None
    of = f" of {show_bytes(made.budget_bytes)}" if made.budget_bytes else ""
    fits = {None: "", True: ", it fits", False: ", it may not fit: --plan --fit tells what would"}
    print(f"plan: peak memory {show_bytes(made.peak_bytes)}{of}{fits[made.fits]}")
    return made.peak_bytes
