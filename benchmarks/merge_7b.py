"""Time and memory of merging a 7B model on the CPU, against reading, rounding and writing it.

    python benchmarks/merge_7b.py
    python benchmarks/merge_7b.py --format gguf-q4_0 --tokenizer FOLDER

A random bf16 checkpoint in the shape of Llama-2-7B (13.5 GB, in files of at most 5 GB) and a random
adapter (r=16, all linear layers, fp32) are merged by merge_dequant.py with its defaults, bf16 onto
NF4, in a separate process. The time is that of the whole process, imports included. The memory is
the peak above a process that only imports torch: resident, with pages of mapped files, and
anonymous, without them. It needs twice the checkpoint's size on disk.

The baseline reads every tensor with safetensors, writes its bytes to a new file, and rounds every
linear weight to NF4 and back, tensor by tensor, once before the merge and once after it, in
separate processes and without the time of imports.

With another `--format`, codes are chosen without calibration, which would load the model. The
`--tokenizer` of a model of 32,000 words keeps the checkpoint at 13.5 GB.
llama.cpp's converter, whose memory is included, needs a tokenizer, and the model its vocabulary.

Every part starts in the same state: earlier output is on disk, and the checkpoint is not in the
page cache (posix_fadvise). Writing out the page cache at the end is timed separately ("flushed").
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from results import record
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig
from watch import Held, make_cold, watch

from qlora.adapters.format import CONFIG, WEIGHTS
from qlora.adapters.tensors import PREFIX
from qlora.base.checkpoint import quantized_layers, skeleton
from qlora.base.shards import Entry, parse_size, write_shards
from qlora.config import QuantConfig
from qlora.files import publishing
from qlora.ops import nf4

MERGE = Path(__file__).parents[1] / "merge_dequant.py"
R = 16


def llama(hidden: int, intermediate: int, layers: int, vocabulary: int) -> LlamaConfig:
    """A Llama config with these sizes, in bf16."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


SHAPES = {"llama2-7b": llama(4096, 11008, 32, 32000), "tiny": llama(1024, 2752, 14, 8000)}
SHARD_SIZES = {"llama2-7b": "5GB", "tiny": "150MB"}


# ---- the inputs ----


def make(folder: Path, shape: str, tokenizer: str | None) -> None:
    """Write base and adapter to `folder` as a stream, unless they exist."""
    if folder.exists():
        return
    config = copy(SHAPES[shape])
    generator = torch.Generator().manual_seed(0)
    with publishing(folder) as partial:
        base, adapter = partial / "base", partial / "adapter"
        if tokenizer:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
            loaded.save_pretrained(base)
            config.vocab_size = max(config.vocab_size, len(loaded))
        config.save_pretrained(base)
        model = skeleton(base)
        entries = [Entry(n, torch.bfloat16, tuple(t.shape)) for n, t in model.state_dict().items()]
        room = 2.1 * sum(entry.nbytes for entry in entries)
        if shutil.disk_usage(partial).free < room:
            raise SystemExit(f"{folder} needs {room / 1e9:.0f} GB of disk: give another --folder")
        tensors = (draw(entry.shape, generator).bfloat16() for entry in entries)
        write_shards(base, entries, tensors, max_bytes=parse_size(SHARD_SIZES[shape]))
        make_adapter(adapter, model, generator)


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values, as small as a model's."""
    return torch.randn(shape, generator=generator).mul_(0.02)


def make_adapter(folder: Path, model: torch.nn.Module, generator: torch.Generator) -> None:
    """A random adapter on every layer that is quantized, in PEFT's files."""
    folder.mkdir()
    layers = list(quantized_layers(model, QuantConfig()))
    tensors = {}
    for name in layers:
        out_features, in_features = model.get_submodule(name).weight.shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = draw((R, in_features), generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = draw((out_features, R), generator)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": R,
        "lora_alpha": 2 * R,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }
    (folder / CONFIG).write_text(json.dumps(values))


# ---- measurements ----


def yardstick(base: Path, output: Path) -> dict[str, float]:
    """Seconds to copy the checkpoint tensor by tensor, and to round what the merge rounds."""
    rounded = {f"{name}.weight" for name in quantized_layers(skeleton(base), QuantConfig())}
    output.mkdir()
    copying = rounding = 0.0
    for source in sorted(base.glob("*.safetensors")):
        with safe_open(source, "pt") as tensors, (output / source.name).open("wb") as target:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                started = time.perf_counter()
                tensor = tensors.get_tensor(name)
                target.write(memoryview(tensor.view(torch.int16).numpy()))
                copied = time.perf_counter()
                copying += copied - started
                if name in rounded:
                    nf4.round_trip(tensor, QuantConfig())
                    rounding += time.perf_counter() - copied
    return {"seconds": copying + rounding, "copying": copying, "rounding": rounding}


def measure_yardstick(folder: Path) -> dict[str, float]:
    """The same in a fresh process, and the seconds until its output is on disk."""
    with part(folder) as output, fresh_process() as process:
        process.submit(skeleton, folder / "base").result()  # imports
        found = process.submit(yardstick, folder / "base", output).result()
        found["flushed"] = found["seconds"] + flush_seconds()
    return found


def measure_merge(folder: Path, format: str) -> dict[str, Any]:
    """Merge in a fresh process; its time, and its memory above a process that only imports."""
    wait = "; import time; time.sleep(0.1)"  # long enough to be seen
    bare = watch([sys.executable, "-c", f"import torch{wait}"])
    modules = "qlora.merge.run, transformers.models.llama.modeling_llama"
    imported = watch([sys.executable, "-c", f"import {modules}{wait}"])
    flags: dict[str, Any] = {"adapter": folder / "adapter", "base-model": folder / "base"}
    flags |= {"format": format} | ({} if format == "bf16" else {"calibration": "none"})
    with part(folder) as output:
        words = [f"--{flag}={path}" for flag, path in {**flags, "output-dir": output}.items()]
        run = watch([sys.executable, str(MERGE), *words])
        flushed = run.seconds + flush_seconds()
        files = (*output.glob("*.safetensors"), *output.glob("*.gguf"))
        written = sum(file.stat().st_size for file in files)
    return {
        "merge_seconds": run.seconds,
        "merge_flushed_seconds": flushed,
        "import_seconds": imported.seconds - 0.1,
        "written_bytes": written,
        **_bytes("torch", bare.peak),
        **_bytes("above_torch", above(run.peak, bare.peak)),
        **_bytes("above_imports", above(run.peak, imported.peak)),
    }


@contextmanager
def part(folder: Path) -> Iterator[Path]:
    """A new output folder, removed at the end; the page cache starts cold and written out."""
    output = folder / "written"
    shutil.rmtree(output, ignore_errors=True)
    make_cold(file for file in folder.rglob("*") if file.is_file())
    try:
        yield output
    finally:
        shutil.rmtree(output, ignore_errors=True)


@contextmanager
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """An executor that runs its calls in one new interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def flush_seconds() -> float:
    """Seconds to write out the page cache."""
    started = time.perf_counter()
    os.sync()
    return time.perf_counter() - started


def above(peak: Held, floor: Held) -> Held:
    """Memory of `peak` above `floor`."""
    return Held(*(high - low for high, low in zip(peak, floor, strict=True)))


def _bytes(name: str, amount: Held) -> dict[str, int]:
    return {f"{name}_{kind}_bytes": count for kind, count in amount._asdict().items()}


# ---- output ----


def show(row: Mapping[str, Any]) -> None:
    """Print the merge against the baseline."""
    print(
        f"merge      {row['merge_seconds']:7.1f} s, on the disk after "
        f"{row['merge_flushed_seconds']:.1f} s (imports {row['import_seconds']:.1f} s)"
    )
    for when in ("before", "after"):
        found = row[f"yardstick_{when}"]
        print(
            f"yardstick  {found['seconds']:7.1f} s, on the disk after {found['flushed']:.1f} s "
            f"(copying {found['copying']:.1f} s, rounding {found['rounding']:.1f} s), {when}"
        )
    print(f"merge / yardstick {row['ratio']:.2f}, on the disk {row['flushed_ratio']:.2f}")
    for floor in ("torch", "imports"):
        resident, anonymous = (
            row[f"above_{floor}_{kind}_bytes"] / 1e6 for kind in ("resident", "anonymous")
        )
        print(f"peak above {floor}: resident {resident:.0f} MB, anonymous {anonymous:.0f} MB")


def main() -> None:
    """Create the inputs, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--folder", type=Path, help="keep checkpoint and adapter here, for reuse")
    parser.add_argument("--format", default="bf16", help="of the merged weights")
    parser.add_argument("--tokenizer", help="folder of one, for a GGUF file")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # of the processes started from here
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute() / given.shape
        make(folder, given.shape, given.tokenizer)
        files = list((folder / "base").glob("*.safetensors"))
        before = measure_yardstick(folder)
        merged = measure_merge(folder, given.format)
        after = measure_yardstick(folder)
        size = sum(file.stat().st_size for file in files)
    mean = {kind: math.fsum((before[kind], after[kind])) / 2 for kind in ("seconds", "flushed")}
    row = {
        "shape": given.shape,
        "format": given.format,
        "threads": given.threads,
        "checkpoint_bytes": size,
        "files": len(files),
        **merged,
        "yardstick_before": before,
        "yardstick_after": after,
        "ratio": merged["merge_seconds"] / mean["seconds"],
        "flushed_ratio": merged["merge_flushed_seconds"] / mean["flushed"],
    }
    show(row)
    record("merge_7b" if given.format == "bf16" else "merge_7b_gguf", row)


if __name__ == "__main__":
    main()
