"""Memory of a training step of a large model on a GPU, counted without a GPU.

    python benchmarks/step_memory.py llama2-7b --seq 2048 [--batch 1] [--r 16] [--offload]

Prints {"loaded": bytes, "peak": bytes} as JSON: the memory of all tensors of the model with
adapters, and of a step without an optimizer, as `train.py --plan` counts it (qlora.plan.step).
Not the kernels' own memory, the CUDA context and fragmentation.

Buffers for decoded weights count once per thread, of which a GPU's steps have two: forward passes
run on the main thread, recomputation and backward passes on autograd's. So do cuBLAS' workspaces,
in Hopper's size.
"""

import argparse
import json
import sys

from shapes import shape

from qlora.config import DataConfig, LoraConfig, TrainConfig
from qlora.errors import UserError
from qlora.plan.meter import WORKSPACES
from qlora.plan.step import SCRATCH, Sample


def count(name: str, *, seq: int, batch: int, r: int, offload: bool) -> dict[str, int]:
    """Bytes of the model with adapters, and the peak of a micro-batch."""
    settings = {"lora": LoraConfig(r=r, lora_alpha=2 * r), "offload_activations": offload}
    config = TrainConfig(model=name, output_dir="", data=DataConfig("rows.jsonl"), **settings)
    segments, _ = Sample(config, shape(name)).count(batch, seq, accumulates=False)
    start = segments[0].start
    loaded = sum(start.values()) - start[SCRATCH] - start[WORKSPACES]
    return {"loaded": loaded, "peak": max(sum(s.peak.values()) for s in segments)}


def main() -> None:
    """The command; a user's error is one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", metavar="shape", help="llama2-7b, llama3.1-8b, …")
    parser.add_argument("--offload", action="store_true", help="as --offload-activations does")
    for flag, default in (("seq", 2048), ("batch", 1), ("r", 16)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    try:
        print(json.dumps(count(**vars(parser.parse_args()))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
