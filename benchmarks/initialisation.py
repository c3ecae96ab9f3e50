"""Initial error to the 16-bit weights with LoftQ and PiSSA, relative to plain NF4.

    python benchmarks/initialisation.py

For each kind of layer ||W - (Q + scaling B A)|| over plain NF4's ||W - Q||, Frobenius norms, with
the adapter in fp32. SmolLM2-135M-Instruct, whose weights come from a 4-bit GGUF file.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from results import record, small_model
from torch import Tensor

from qlora.adapters.lora import delta_weight
from qlora.adapters.starts import loftq, pissa
from qlora.base.checkpoint import Checkpoint, linear_layers, resolve, skeleton
from qlora.config import QuantConfig
from qlora.ops import nf4

QUANT = QuantConfig()
Start = Callable[[Tensor, int, float], Tensor]


def quantize(weight: Tensor) -> Tensor:
    """A weight quantized with NF4 and double quantization, and dequantized."""
    return nf4.round_trip(weight, QUANT)


def with_loftq(iterations: int) -> Start:
    """Q + scaling B A after LoftQ."""

    def start(weight: Tensor, r: int, scaling: float) -> Tensor:
        pair, taken = loftq(weight, r, scaling, quantize, iterations=iterations)
        rest = weight if taken is None else weight - delta_weight(*taken, scaling)
        return quantize(rest) + delta_weight(*pair, scaling)

    return start


def with_pissa(niter: int | None) -> Start:
    """Q + scaling B A after PiSSA."""

    def start(weight: Tensor, r: int, scaling: float) -> Tensor:
        delta = delta_weight(*pissa(weight, r, scaling, niter=niter), scaling)
        return quantize(weight - delta) + delta

    return start


METHODS = {
    "loftq T=1": with_loftq(1),
    "loftq T=5": with_loftq(5),
    "pissa": with_pissa(None),
    "pissa_niter_4": with_pissa(4),
}


def measure(layers: Sequence[int], r: int, scaling: float) -> dict[str, dict[str, list[float]]]:
    """The error relative to plain NF4's, by kind of layer and method, layer by layer."""
    checkpoint = Checkpoint(resolve(str(small_model())))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in linear_layers(skeleton(checkpoint.folder)):
        if not any(f".layers.{layer}." in name for layer in layers):
            continue
        weight = checkpoint.read(f"{name}.weight").float()
        plain = float((weight - quantize(weight)).norm())
        for method, start in METHODS.items():
            error = float((weight - start(weight, r, scaling)).norm())
            found[name.rpartition(".")[2]][method].append(error / plain - 1)
    return found


def main() -> None:
    """Print a table for each lora_alpha, and record it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(30)))
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, nargs="+", default=[16, 32])
    given = parser.parse_args()
    for lora_alpha in given.lora_alpha:
        start = time.perf_counter()
        found = measure(given.layers, given.r, lora_alpha / given.r)
        print(f"\nr {given.r}, lora_alpha {lora_alpha:g}: error against plain NF4's, mean (range)")
        print(f"{'':12}" + "".join(f"{method:>26}" for method in METHODS))
        summary = {}
        for kind, methods in found.items():
            summary[kind] = {
                method: {"mean": sum(v) / len(v), "least": max(v), "most": min(v), "first": v[0]}
                for method, v in methods.items()
            }
            cells = [
                f"{s['mean']:.1%} ({s['least']:.1%} … {s['most']:.1%})"
                for s in summary[kind].values()
            ]
            print(f"{kind:12}" + "".join(f"{cell:>26}" for cell in cells))
        record(
            "initialisation",
            {
                "model": "SmolLM2-135M-Instruct",
                "layers": given.layers,
                "r": given.r,
                "lora_alpha": lora_alpha,
                "seconds": round(time.perf_counter() - start, 1),
                "error_against_nf4": summary,
            },
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
