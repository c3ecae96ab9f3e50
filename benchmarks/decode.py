"""Speed of decoding NF4 weights on a GPU, and of products with them, for each implementation.

    python benchmarks/decode.py [--dtype bf16] [--rounds 30] [--models llama3.1-8b ...]

Weights have the shapes of a block's linear layers, and double quantization. Implementations are
timed in turn in one run, with CUDA events, with the caches overwritten before each, as in a
training step; seconds are medians of the rounds. A decode is also given as a share of the bandwidth
that the card copies a large tensor with. A decoder whose weight differs from
qlora.ops.nf4.dequantize's is an error.

Products are of 1 to 256 tokens: with a weight decoded before, and by bitsandbytes' own layer, which
for few tokens multiplies without storing the weight.

The last line says which decoder takes the least time for all layers of all models, if it takes 3 %
less than bitsandbytes' kernel, and which one qlora.ops.nf4.fastest_decoder has found.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import bitsandbytes
import torch
from results import record
from torch import Tensor
from torch.nn import functional as F

from qlora.config import QuantConfig
from qlora.ops.nf4 import (
    DECODERS,
    DTYPES,
    Quantized,
    dequantize,
    fastest_decoder,
    into_scratch,
    quantize,
    triton_decodes,
)

Shape = tuple[int, int]
Run = Callable[[], Any]

# (out, in) of the linear layers of a block, and how often it has them
MODELS: dict[str, dict[Shape, int]] = {
    "llama2-7b": {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1},
    "llama3.1-8b": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
    "qwen2.5-7b": {(3584, 3584): 2, (512, 3584): 2, (18944, 3584): 2, (3584, 18944): 1},
}
TOKENS = [2**i for i in range(9)]
WARM_UP = 3  # rounds, of which the first compile
COPIED = 1 << 30  # bytes
CACHES = 1 << 30  # bytes, more than any card's: what is timed is all queued when they are written
GAIN = 0.97


def timed(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each call, timed in turn."""
    dirt = torch.empty(CACHES, dtype=torch.uint8, device="cuda")
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(rounds + WARM_UP):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dirt.zero_()
            start.record()
            run()
            stop.record()
            marks[name].append((start, stop))
    torch.cuda.synchronize()
    return {
        name: statistics.median(a.elapsed_time(b) / 1000 for a, b in pairs[WARM_UP:])
        for name, pairs in marks.items()
    }


def copy_bandwidth(rounds: int) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / timed({"copy": partial(target.copy_, source)}, rounds)["copy"]


def weight_of(shape: Shape) -> Quantized:
    """A random one."""
    return quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02, QuantConfig())


def traffic(weight: Quantized, dtype: torch.dtype) -> int:
    """Bytes that decoding must read and write."""
    state = weight.state
    read = (weight.packed, state.absmax, state.state2.absmax)
    return sum(t.nbytes for t in read) + state.shape.numel() * dtype.itemsize


def ways(dtype: torch.dtype) -> dict[str, Callable[[Quantized], Tensor]]:
    """The decoders that run here; "plain" allocates a tensor each time."""
    device = torch.device("cuda", torch.cuda.current_device())
    into_buffers = {
        name: partial(into_scratch, dtype=dtype, slot=0, decode=decode)
        for name, decode in DECODERS.items()
        if name != "triton" or triton_decodes(device, dtype)
    }
    return {"plain": partial(dequantize, dtype=dtype), **into_buffers}


def decodes(weight: Quantized, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds of each way."""
    wanted = dequantize(weight, dtype)
    runs = {}
    for name, way in ways(dtype).items():
        if not torch.equal(way(weight), wanted):
            raise SystemExit(f"error: {name} decodes {tuple(weight.state.shape)} wrongly")
        runs[name] = partial(way, weight)
    return timed(runs, rounds)


def products(weight: Quantized, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of each way to multiply with a weight."""
    x = torch.randn(tokens, weight.state.shape[1], device="cuda", dtype=dtype)
    runs: dict[str, Run] = {
        f"{name}, then product": lambda way=way: F.linear(x, way(weight))
        for name, way in ways(dtype).items()
    }
    packed, state = weight
    runs["bitsandbytes' layer"] = lambda: bitsandbytes.matmul_4bit(x, packed.t(), state)
    return timed(runs, rounds)


def show(label: str, seconds: Mapping[str, float], suffix: Callable[[float], str]) -> None:
    """A line of a table."""
    cells = (f"{name} {s * 1e6:.1f} us{suffix(s)}" for name, s in seconds.items())
    print(f"{label:32}" + ", ".join(cells))


@torch.no_grad()
def main() -> None:
    """Print tables and the fastest implementation, and record both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a GPU, and torch sees none")
    dtype, facts = DTYPES[given.dtype], {"dtype": given.dtype, "rounds": given.rounds}
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(given.rounds)
    facts["copy_bytes_per_second"] = bandwidth
    print(f"the card copies {bandwidth / 1e9:.0f} GB/s, counting what is read and what is written")
    totals: dict[str, float] = {}
    for model, shapes in ((model, MODELS[model]) for model in given.models):
        for shape, times in shapes.items():
            weight = weight_of(shape)
            least = traffic(weight, dtype) / bandwidth
            seconds = decodes(weight, dtype, given.rounds)
            for name, took in seconds.items():
                totals[name] = totals.get(name, 0) + times * took
            show(f"{model} {shape}", seconds, lambda s, least=least: f" ({least / s:.0%})")
            of_copy = {name: least / took for name, took in seconds.items()}
            row = {"what": "decode", "model": model, "shape": shape, "seconds": seconds}
            record("decode", {**row, "of_copy_bandwidth": of_copy, **facts})
            for tokens in TOKENS:
                seconds = products(weight, dtype, tokens, given.rounds)
                show(f"    {tokens} tokens", seconds, lambda s: "")
                row = {"what": "product", "model": model, "shape": shape, "tokens": tokens}
                record("decode", {**row, "seconds": seconds, **facts})
    best = min(totals, key=totals.__getitem__)
    if totals[best] > GAIN * totals["bitsandbytes"]:
        best = "bitsandbytes"
    shown = ", ".join(f"{name} {took * 1e3:.2f} ms" for name, took in totals.items())
    found = fastest_decoder(torch.device("cuda", torch.cuda.current_device()), dtype)
    lines = [
        f"fastest: {best}; found at the start: {found}",
        f"a block of each model takes {shown}",
    ]
    print("\n".join(lines))
    facts |= {"found": found, "shown": lines}
    record("decode", {"what": "verdict", "way": best, "seconds": totals, **facts})


if __name__ == "__main__":
    main()
