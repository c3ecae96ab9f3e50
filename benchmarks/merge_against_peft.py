"""merge_dequant.py against PEFT's merge_and_unload, from the 16-bit checkpoint to a merged one.

    python benchmarks/merge_against_peft.py --model base --adapter out/mine

PEFT merges in two ways: onto the base loaded in 16 bits, as is usual, and onto the base loaded in 4
bits, dequantized afterwards and saved in 16. Ours merges onto the dequantized 4-bit base, by
default, and onto the original weights. benchmarks/merge.py measures how much each keeps; this
benchmark measures their cost on the CPU.

Every merge is a separate process, the methods alternate, and the table has medians: seconds from
the start of the interpreter to its end, seconds from the end of the imports until the files are
written, and the peak of memory above that after the imports (resident counts pages of mapped files,
anonymous does not). The base is in the page cache.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from results import record
from watch import Held, held, watch

Merge = Callable[[str, str, str], None]  # of base, adapter, output


# ---- the methods: each imports what it needs and returns a function that merges ----


def ours(*flags: str) -> Callable[[], Merge]:
    """Merge as merge_dequant.py does with these flags."""

    def load() -> Merge:
        from qlora.cli import parse
        from qlora.config import MergeConfig
        from qlora.merge import run as merge

        def run(base: str, adapter: str, output: str) -> None:
            words = ["--base-model", base, "--adapter", adapter, "--output-dir", output, *flags]
            merge.merge(parse(MergeConfig, words, prog="merge_dequant.py"))

        return run

    return load


def pefts(*, in_4_bits: bool) -> Callable[[], Merge]:
    """Load base and adapter, merge_and_unload, save."""

    def load() -> Merge:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings: dict[str, Any] = {"dtype": torch.bfloat16}
        if in_4_bits:
            import bitsandbytes  # noqa: F401

            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )

        def run(base: str, adapter: str, output: str) -> None:
            model = AutoModelForCausalLM.from_pretrained(base, **settings)
            merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
            (merged.dequantize() if in_4_bits else merged).save_pretrained(output)

        return run

    return load


WAYS: dict[str, Callable[[], Merge]] = {
    "ours, onto NF4 (the default)": ours(),
    "ours, onto the original weights": ours("--onto", "original"),
    "PEFT, base in 16 bits": pefts(in_4_bits=False),
    "PEFT, base in 4 bits, dequantized": pefts(in_4_bits=True),
}


# ---- measured ----


def child(way: str, base: str, adapter: str, output: str) -> None:
    """One merge in this process; the last line printed has its figures."""
    from transformers import AutoConfig, AutoModelForCausalLM

    merge = WAYS[way]()
    with torch.device("meta"):  # imports the code of this model family
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    before, started = held(), time.perf_counter()
    merge(base, adapter, output)
    seconds = time.perf_counter() - started
    print(f"\n{json.dumps({'imported': before, 'seconds': seconds})}")


def measure(way: str, base: str, adapter: str) -> dict[str, float]:
    """One merge in a fresh process."""
    os.sync()  # earlier output is on disk
    with tempfile.TemporaryDirectory() as folder:
        words = ["--child", way, "--model", base, "--adapter", adapter, "--output", f"{folder}/out"]
        run = watch([sys.executable, __file__, *words])
        files = list(Path(folder, "out").glob("*.safetensors"))
        written = sum(file.stat().st_size for file in files)
    inside = json.loads(run.output.splitlines()[-1])
    imported = Held(*inside["imported"])
    return {
        "seconds": run.seconds,
        "seconds_without_imports": inside["seconds"],
        "peak_resident_bytes": run.peak.resident - imported.resident,
        "peak_anonymous_bytes": run.peak.anonymous - imported.anonymous,
        "written_bytes": written,
    }


def read_all(folder: str) -> int:
    """Bytes of the checkpoint, each read once."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                total += len(piece)
    return total


# ---- output ----


def show(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print each method, and PEFT's time and memory relative to our default."""
    titles = f"{'seconds':>9}{'no imports':>12}{'resident':>12}{'anonymous':>12}"
    print(f"{'':36}{titles}")
    for way, row in rows.items():
        print(
            f"{way:36}{row['seconds']:9.1f}{row['seconds_without_imports']:12.1f}"
            f"{row['peak_resident_bytes'] / 1e6:9.0f} MB{row['peak_anonymous_bytes'] / 1e6:9.0f} MB"
        )
    first, *others = rows
    print(f"\ntimes what {first} takes:")
    for way in others:
        ratios = {key: rows[way][key] / rows[first][key] for key in list(rows[first])[:4]}
        print(
            f"{way:36}{ratios['seconds']:9.2f}{ratios['seconds_without_imports']:12.2f}"
            f"{ratios['peak_resident_bytes']:12.2f}{ratios['peak_anonymous_bytes']:12.2f}"
        )


def main() -> None:
    """Measure, print and record each method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the 16-bit base")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.model, given.adapter, given.output)
        return
    size = read_all(given.model)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(given.repeats):
        for way, found in runs.items():
            found.append(measure(way, given.model, given.adapter))
    rows = {}
    for way, found in runs.items():
        rows[way] = {key: statistics.median(run[key] for run in found) for key in found[0]}
        each = {"each_seconds": [round(run["seconds"], 2) for run in found]}
        facts = {"checkpoint_bytes": size, "repeats": given.repeats}
        record("merge_against_peft", {"way": way, **rows[way], **each, **facts})
    show(rows)


if __name__ == "__main__":
    main()
