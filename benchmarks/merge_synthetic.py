"""How much of a change a merge to 4 bits keeps, by its size, ours and PEFT's.

    python benchmarks/merge_synthetic.py --adapter out/mine --verify held_out.jsonl

The adapter is rescaled so that |delta| is the given share of |W| in every layer, 0.1 % to 10 %;
with --random its directions are random as well. The live model is the teacher: the gain is KL(live
|| base), and the share kept is 1 - KL(live || merged) / KL(live || base). The table also has the
share of the loss that the rescaled adapter gains on the data, if any. All models compute in fp32,
so that the teacher has no noise.
"""

import argparse
import json
import math
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from merge import ours, pefts
from results import record
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from qlora.adapters.format import CONFIG, WEIGHTS, AdapterFile, read_adapter
from qlora.adapters.tensors import PREFIX
from qlora.base.checkpoint import Checkpoint, resolve
from qlora.merge.measure import Verifier, read_examples
from qlora.ops import nf4

WAYS = {
    "PEFT": partial(pefts, dtype=torch.float32),
    "ours, no data": ours(format="nf4", calibration="none"),
    "ours, text of its own": ours(format="nf4", calibration="self"),
    "ours, calibrated": ours(format="nf4"),
}


def main() -> None:
    """Print and record each size and method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--verify", required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="supervised ones to measure on")
    parser.add_argument("--random", action="store_true", help="random directions, same sizes")
    parser.add_argument("--only", nargs="+", default=[""], help="ways whose name has one of these")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03, 0.1])
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    trained = read_adapter(given.adapter)
    base = resolve(str(trained.base_model))
    examples = read_examples(given.verify, Path(given.adapter), given.tokens)
    rows = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / "adapter"
            adapter = rescaled(trained, Checkpoint(base), size, new, given.random)
            verifier = Verifier(adapter, str(base), examples, device="cpu", compute_dtype="fp32")
            for name, way in WAYS.items():
                if not any(part in name for part in given.only):
                    continue
                output = Path(folder) / name
                way(str(adapter.folder), str(base), output)
                found = verifier.measure(output)
                rows.append(
                    {
                        "delta_over_weight": size,
                        "way": name,
                        "kept": 1 - found.kl / found.kl_base,
                        "kept_loss": found.kept,
                        "kl": found.kl,
                        "kl_base": found.kl_base,
                        "directions": "random" if given.random else "trained",
                        "adapter": Path(given.adapter).name,
                        "tokens": found.tokens,
                    }
                )
                record("merge_synthetic", rows[-1])
    print(f"\n{'|delta| / |W|':>14}  {'':24}{'kept':>9}{'of loss':>9}{'KL':>11}{'KL of base':>13}")
    for row in rows:
        print(
            f"{row['delta_over_weight']:14.1%}  {row['way']:24}{row['kept']:9.2%}"
            + ("      n/a" if row["kept_loss"] is None else f"{row['kept_loss']:9.2%}")
            + f"{row['kl']:11.6f}{row['kl_base']:13.5f}"
        )


def rescaled(
    adapter: AdapterFile, base: Checkpoint, size: float, folder: Path, draw: bool
) -> AdapterFile:
    """Write the adapter with |delta| = size |W| in each layer to `folder`, for fp32 compute."""
    folder.mkdir()
    for file in adapter.folder.iterdir():
        if file.is_file() and file.name != WEIGHTS:
            shutil.copyfile(file, folder / file.name)
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        metadata = json.loads(file.metadata()["qlora"]) | {"compute_dtype": "fp32"}
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for module, (lora_A, lora_B, scaling, _) in adapter.pairs.items():
        if draw:
            lora_A = torch.randn(lora_A.shape, generator=generator) / math.sqrt(lora_A.shape[1])
            lora_B = torch.randn(lora_B.shape, generator=generator)
        delta = scaling * lora_B.float() @ lora_A.float()
        weight = nf4.round_trip(base.read(f"{module}.weight").float(), adapter.quantization)
        factor = float(size * weight.norm() / delta.norm())
        tensors[f"{PREFIX}{module}.lora_A.weight"] = lora_A.float().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = lora_B.float() * factor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "qlora": json.dumps(metadata)})
    assert (folder / CONFIG).is_file()
    return read_adapter(folder)


if __name__ == "__main__":
    main()
