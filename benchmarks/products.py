"""fp32 products of a training step on a CPU, by torch (MKL) and by oneDNN, in turn in one run.

    python benchmarks/products.py [--tokens 1024] [--rounds 9]

GFLOP/s are from the median of the rounds. The errors are relative to the product in fp64. The
shapes are those of SmolLM2-135M, and one of Llama-2-7B.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from results import record
from torch import Tensor
from torch.nn import functional as F

from qlora.ops.lora import by_onednn, inner, linear

SHAPES = {"q": (576, 576), "k": (576, 192), "up": (576, 1536), "down": (1536, 576)}
LARGE = {"7B up": (4096, 11008)}
RANK = 16

Product = Callable[[], Tensor]


def products(tokens: int) -> dict[str, tuple[Product, Product, Product, int]]:
    """Name -> torch's product, ours, the product in fp64, and its FLOP."""
    found = {}
    for name, (inputs, outputs) in {**SHAPES, **LARGE}.items():
        x, dy = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        weight = torch.randn(outputs, inputs)
        of_x, of_dy = (x, weight), (dy, weight.T)
        for kind, pair in ((f"{name}: y = x W'", of_x), (f"{name}: dx = dy W", of_dy)):
            found[kind] = (*_three(F.linear, linear, *pair), 2 * tokens * inputs * outputs)
    x, dy = torch.randn(tokens, 576), torch.randn(tokens, 1536)
    lora_A, low = torch.randn(RANK, 576), torch.randn(tokens, RANK)
    found["up: x A'"] = (*_three(F.linear, linear, x, lora_A), 2 * tokens * RANK * 576)
    found["up: dA = dlow' x"] = (*_three(_inner, inner, low, x), 2 * tokens * RANK * 576)
    found["up: dB = dy' low"] = (*_three(_inner, inner, dy, low), 2 * tokens * RANK * 1536)
    return found


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return x.T @ y


def _three(
    torchs: Callable[..., Tensor], ours: Callable[..., Tensor], *given: Tensor
) -> tuple[Product, Product, Product]:
    wide = partial(torchs, *(tensor.double() for tensor in given))
    return partial(torchs, *given), partial(ours, *given), wide


def seconds(run: Product) -> float:
    """Wall-clock seconds of a run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.manual_seed(0)
    found = {}
    print(f"{'GFLOP/s':24}{'torch':>8}{'ours':>8}{'ratio':>8}{'apart':>20}")
    for name, (*pair, exact, flop) in products(given.tokens).items():
        times: list[list[float]] = [[], []]
        for turn in range(given.rounds + 1):  # the first one warms up
            for taken, run in zip(times, pair, strict=True):
                took = seconds(run)
                if turn:
                    taken.append(took)
        rates = [flop / statistics.median(taken) / 1e9 for taken in times]
        wanted = exact()
        apart = [float((run() - wanted).norm() / wanted.norm()) for run in pair]
        print(
            f"{name:24}{rates[0]:8.0f}{rates[1]:8.0f}{rates[1] / rates[0]:8.2f}"
            f"{apart[0]:10.1e}{apart[1]:10.1e}"
        )
        found[name] = {"gflops": rates, "apart": apart}
    onednn = by_onednn(torch.ones(1))
    record("products", {**vars(given), "onednn": onednn, "torch_and_ours": found})


if __name__ == "__main__":
    main()
