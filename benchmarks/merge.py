"""How much of the training each merge method keeps, for a given adapter and data.

    python benchmarks/merge.py --adapter out/mine --verify held_out.jsonl

For each method: the share of the gain kept, the KL divergence to the live adapter and the agreement
of the most likely token, all from merge_dequant.py's --verify; and the seconds of the merge,
without verification. A GGUF file runs in llama.cpp, where xllamacpp is installed. PEFT's row is its
merge_and_unload on the 4-bit model; other rounding methods are in other_roundings.py.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from other_roundings import (
    Method,
    descent,
    descent_from_original,
    gptq,
    instead,
    on_the_adapters_space,
)
from results import record
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from qlora.adapters.format import read_adapter
from qlora.base.checkpoint import resolve
from qlora.base.load import load_base
from qlora.config import MergeConfig
from qlora.merge import merge
from qlora.merge.codes import choose_codes
from qlora.merge.measure import Verifier, read_examples


def ours(rounding: Method = choose_codes, **settings: Any) -> Callable[..., None]:
    """Merge with these flags, and with another rounding method if given."""

    def run(adapter: str, base: str, output: Path, **more: Any) -> None:
        files = {"adapter": adapter, "base_model": base, "output_dir": str(output)}
        with instead(rounding):
            merge(MergeConfig(**files, **settings, **more))

    return run


def pefts(adapter: str, base: str, output: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """PEFT's merge into the 4-bit layers: quantize(dequantize(W4) + delta)."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=settings)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)


WAYS: dict[str, Callable[..., None]] = {
    "bf16 onto NF4 (the default)": ours(),
    "bf16 onto the original weights": ours(onto="original"),
    "NF4 by PEFT": pefts,
    "NF4, quantize(W16 + delta), no data": ours(format="nf4", calibration="none"),
    "NF4, errors kept off A, no data": ours(
        on_the_adapters_space, format="nf4", calibration="none"
    ),
    "NF4, GPTQ": ours(gptq, format="nf4"),
    "NF4, two sweeps from W4": ours(descent, format="nf4"),
    "NF4, two sweeps from W16 + delta": ours(descent_from_original, format="nf4"),
    "NF4, text of its own": ours(format="nf4", calibration="self"),
    "NF4, calibrated": ours(format="nf4"),
    "Q8_0, to nearest": ours(format="gguf-q8_0"),
    "int4 with zero points, calibrated": ours(format="int4", symmetric=False),
} | {
    f"{name}, {way}": ours(format=format, **settings)
    for name, format in {
        "Q4_0": "gguf-q4_0", "Q4_1": "gguf-q4_1", "Q4_K_M": "gguf-q4_k_m", "int4": "int4",
    }.items()
    for way, settings in {
        "to nearest": {"calibration": "none"},
        "text of its own": {"calibration": "self"},
        "calibrated": {},
    }.items()
}  # fmt: skip


def main() -> None:
    """Print and record each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--verify", required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="ways whose name has one of these")
    parser.add_argument("--tokens", type=int, default=8192, help="supervised ones to measure on")
    parser.add_argument("--calibration-tokens", type=int, help="of calibrated ways of ours")
    given = parser.parse_args()
    more = {"calibration_tokens": given.calibration_tokens} if given.calibration_tokens else {}
    transformers_logging.set_verbosity_error()
    adapter = read_adapter(given.adapter)
    base = str(resolve(str(adapter.base_model)))
    examples = read_examples(given.verify, Path(given.adapter), given.tokens)
    # bf16's own rounding, of the live model alone, is a KL divergence of 0.0006 on SmolLM2-135M
    verifier = Verifier(adapter, base, examples, device="cpu", compute_dtype="fp32")
    rows = []
    ways = WAYS | {"NF4, 4-bit base only, calibrated": four_bit_base(base)}
    ways = {name: way for name, way in ways.items() if any(part in name for part in given.only)}
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "merged"
            started = time.perf_counter()
            way(given.adapter, base, output, **more)
            seconds = time.perf_counter() - started
            found = verifier.measure(output)
        row = {
            "way": name,
            "kept": found.kept,
            "kl": found.kl,
            "kl_base": found.kl_base,
            "agreement": found.agreement,
            "loss_base": found.loss_base,
            "loss_live": found.loss_live,
            "loss_merged": found.loss_merged,
            "seconds": round(seconds, 1),
            "adapter": Path(given.adapter).name,
            "r": adapter.config.r,
            "data": Path(given.verify).stem,
            "tokens": found.tokens,
            "compute": "fp32",
            **more,
        }
        record("merge", row)
        rows.append(row)
    print(f"\n{'':38}{'kept':>9}{'KL':>10}{'same token':>12}{'seconds':>9}")
    for row in rows:
        print(
            f"{row['way']:38}{row['kept']:9.2%}{row['kl']:10.5f}{row['agreement']:12.2%}"
            f"{row['seconds']:9.1f}"
        )


def four_bit_base(base: str) -> Callable[[str, str, Path], None]:
    """The calibrated merge from a 4-bit checkpoint, without the 16-bit weights."""

    def run(adapter: str, _: str, output: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            load_base(base, device="cpu").save_pretrained(folder)
            ours(format="nf4")(adapter, folder, output)

    return run


if __name__ == "__main__":
    main()
