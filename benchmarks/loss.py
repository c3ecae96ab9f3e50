"""Memory and time of a language model's loss, with full logits and chunked, in turn in one run.

    python benchmarks/loss.py [--rows 4] [--length 256] [--vocab 49152] [--dim 576]
                              [--dtype bf16] [--masked 0] [--softcap 30] [--rounds 5]

Forward and backward of head and loss, from hidden states (rows, length, dim) to their gradient, as
in transformers' models: head, softcap, ForCausalLMLoss; with the plain head, and with LanguageHead.
Seconds are medians of the rounds. Memory is the peak above the inputs: on a GPU as counted by the
allocator, on a CPU by the profiler, in a separate round. The other figures are the relative
differences of loss and gradient.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from results import record
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

from qlora.fast.head import LanguageHead
from qlora.training.outputs import show_bytes

Way = Callable[[], tuple[Tensor, Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def loss_and_gradient(
    head: nn.Module, softcap: float | None, hidden: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss as a model's forward pass computes it."""
    logits = head(hidden)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    loss: Tensor = ForCausalLMLoss(logits, labels, logits.shape[-1])
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def peak(run: Way, device: str) -> int:
    """Peak bytes of a run above those allocated before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return max(accumulate(changes(seen.profiler)), default=0)


def changes(profiler: Any) -> Iterable[int]:
    """Bytes allocated (positive) or freed (negative), in order of time."""
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]


def seconds(run: Way, device: str) -> float:
    """Wall-clock seconds of a run."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rows", 4), ("length", 256), ("vocab", 49152), ("dim", 576)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--masked", type=float, default=0.0, help="share of tokens without a label")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = nn.Linear(given.dim, given.vocab, bias=False, device=device, dtype=DTYPES[given.dtype])
    layer.requires_grad_(False)
    hidden = torch.randn(given.rows, given.length, given.dim, device=device).to(DTYPES[given.dtype])
    labels = torch.randint(given.vocab, (given.rows, given.length), device=device)
    labels[torch.rand(labels.shape, device=device) < given.masked] = -100
    inputs = given.softcap, hidden.requires_grad_(), labels
    ways: dict[str, Way] = {
        "plain": partial(loss_and_gradient, layer, *inputs),
        "ours": partial(loss_and_gradient, LanguageHead(layer), *inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.rounds + 1):  # the first one warms up
        for name, run in ways.items():
            took = seconds(run, device)
            if turn:
                times[name].append(took)
    found = {
        name: {"peak_bytes": peak(run, device), "seconds": statistics.median(times[name])}
        for name, run in ways.items()
    }
    for name, row in found.items():
        print(f"{name:8}{show_bytes(int(row['peak_bytes'])):>12}{row['seconds'] * 1000:12.1f} ms")
    (loss, gradient), (wanted, theirs) = ways["ours"](), ways["plain"]()
    apart = {
        "loss_apart": float((loss - wanted).abs() / wanted),
        "gradient_apart": float((gradient - theirs).norm() / theirs.norm()),
    }
    print(apart)
    record("loss", {**vars(given), **found, **apart})


if __name__ == "__main__":
    main()
