"""Seconds that the search for 4-bit codes takes for one layer of Llama-2-7B.

    python benchmarks/search_7b.py [--grid Q4_0] [--device cuda]

`keep_outputs` of qlora.merge.codes, or `keep_adapter` for NF4, on the seven matrices, with random
weights, an adapter (r=16) whose change is 1 % of them, and moments of inputs and gradients with a
spectrum that falls as 1 / i, as that of activations roughly does. Calibration, reading and writing
are not included.
"""

import argparse
import time

import torch
from results import record

from qlora.config import QuantConfig
from qlora.merge import codes, grids
from qlora.merge.moments import Moments
from qlora.ops import nf4

HIDDEN, INTERMEDIATE, LAYERS, R = 4096, 11008, 32, 16
SHAPES = {  # (out, in)
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("gate_proj", "up_proj"), (INTERMEDIATE, HIDDEN)),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


def main() -> None:
    """Time each matrix, and print and record the sums."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", default="Q4_0", choices=["Q4_0", "Q4_1", "Q4_K", "Int4", "NF4"])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    kind = getattr(grids, args.grid, None)
    moments = {width: spread(width, args.device) for width in (HIDDEN, INTERMEDIATE)}

    def one(name: str) -> float:
        out, width = SHAPES[name]
        generator = torch.Generator(args.device).manual_seed(0)
        new = {"generator": generator, "device": args.device}
        weight = torch.randn(out, width, **new) * 0.02
        lora_A, lora_B = torch.randn(R, width, **new), torch.randn(out, R, **new)
        change = lora_B @ lora_A
        weight += change * (0.01 * weight.norm() / change.norm())
        if args.device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        if kind:
            of_layer = Moments(moments[width], moments[out], drift=0.01 * moments[width])
            codes.keep_outputs(kind(weight.T.contiguous()), weight, of_layer)
        else:
            start = nf4.quantize(weight, QuantConfig())
            codes.keep_adapter(grids.NF4Grid(start), weight, lora_A, lora_B, moments[width])
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    one("q_proj")  # compiles
    seconds = {name: one(name) for name in SHAPES}
    layer = sum(seconds.values())
    for name, each in seconds.items():
        print(f"{name:10} {SHAPES[name]!s:15} {each:7.1f} s")
    print(f"all seven: {layer:.1f} s; {LAYERS} layers: {layer * LAYERS / 60:.0f} minutes")
    row = {"grid": args.grid, "layer_seconds": round(layer, 1), "threads": torch.get_num_threads()}
    record("search_7b", row | {name: round(each, 1) for name, each in seconds.items()})


def spread(width: int, device: str) -> torch.Tensor:
    """Moments (n, n) of vectors whose covariance has eigenvalues of about 1 / i."""
    generator = torch.Generator(device).manual_seed(1)
    directions = torch.randn(width // 2, width, generator=generator, device=device)
    directions /= torch.arange(1, width // 2 + 1, device=device)[:, None].sqrt()
    moments = directions.T @ directions
    moments.diagonal().add_(moments.diagonal().mean() * 0.01)
    return moments


if __name__ == "__main__":
    main()
