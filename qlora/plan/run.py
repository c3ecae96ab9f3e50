"""`python train.py` without --plan: the plan of the run in one line, then the run."""

from pathlib import Path

import psutil
import torch

from qlora.config import TrainConfig, flat
from qlora.errors import UserError, first_line, is_first_process
from qlora.plan import estimate
from qlora.training import ranks
from qlora.training.outputs import show_bytes
from qlora.training.run import train


def run(config: TrainConfig) -> Path:
    """`train`, which then logs the planned peak beside the measured one. Ranks join before the
    first one plans: Trainer's arguments would wait for the others otherwise. The others wait for
    the plan, so that the first one is there to tell an error of all."""
    with ranks.joined(flat(config)):
        return train(config, planned_bytes=ranks.of_first(planned_bytes(config)))


def planned_bytes(config: TrainConfig) -> int | None:
    """The planned peak memory, which is printed; None where there is no plan, which is no error.
    On a CPU it is resident memory, with what this process has before it loads the model."""
    if not is_first_process():
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = psutil.Process().memory_info().rss if device == "cpu" else 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tiny tensors: threads would wait for each other
    try:
        with torch.random.fork_rng(devices=[]):  # the run draws the same numbers without a plan
            made = estimate.Planner(config, device=device).plan()
    except Exception as error:  # of a model's code, too
        if not isinstance(error, UserError) or "planned" in str(error):  # else the run says it
            print(f"plan: none for this run: {first_line(error)}")
        return None
    finally:
        torch.set_num_threads(threads)
    of = f" of {show_bytes(made.budget_bytes)}" if made.budget_bytes else ""
    fits = {None: "", True: ", it fits", False: ", it may not fit: --plan --fit tells what would"}
    if device == "cpu":
        of, fits[False] = "", f", more than the {of.removeprefix(' of ')} that are free"
    print(f"plan: peak memory {show_bytes(before + made.peak_bytes)}{of}{fits[made.fits]}")
    return before + made.peak_bytes
