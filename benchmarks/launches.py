"""Kernel launches, host time and waits for the GPU of a training step, counted without a GPU.

    python benchmarks/launches.py [--shape llama2-7b] [--seq 2048] [--parts launches host waits]

launches  of a decoder layer in a step with gradient checkpointing, bf16, ours and PEFT's: two
          models that differ in one layer run on meta tensors (benchmarks/meta_gpu.py). An operator
          of torch that writes memory is one launch; views, empty tensors and numbers are none. A
          Triton kernel is one; an operator of bitsandbytes is those that its CUDA code makes: the
          decoding of a doubly quantized weight 3, `gemm_4bit` of many tokens 4. cuBLAS may split a
          product, and attention's backward pass is several: they count as one on both sides.
host      CPU time of a layer with tensors so small that computing takes none: the difference
          between two small models on the CPU, both sides by turns in one process. Our code makes
          the choices that it makes on a GPU, without values. What a CPU has otherwise: Triton's
          launches take no time, and no operator hands one to a driver (some microseconds each); a
          weight is decoded into a new tensor; torch's norm is several operators, and attention is
          replaced by one. PEFT's side has its autocast.
waits     of the host for the GPU in an optimizer step: benchmarks/waits.py

PEFT's adapters are in bf16 too. Meta tensors know no autocast, which would add casts to its side.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from meta_gpu import (
    KERNELS,
    choose_as_on_gpu,
    decode_on_cpu,
    empty,
    replace,
    stand_ins,
    widen,
    write_narrow,
)
from results import record
from shapes import on_meta, shape
from step_sides import SIDES, Setup, Side
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig
from waits import count_waits

from qlora.errors import UserError
from qlora.ops import nf4
from qlora.plan.meta import backward

NAMES = ("ours", "peft")
PARTS = ("launches", "host", "waits")
# by bitsandbytes' CUDA code (0.50), of a doubly quantized weight and more than 1,536 tokens
LAUNCHES = {"bitsandbytes::gemm_4bit": 4}
NONE = (
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided", "aten::_unsafe_view", "aten::resize_", "aten::set_",
    "prim::device", "aten::lift_fresh", "aten::is_same_size",
)  # fmt: skip


# ---- launches ----


class Launches(TorchDispatchMode):
    """Counts the launches of operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name, leaves = func._schema.name, tree_leaves((made, args, kwargs))
        on_gpu = [x for x in leaves if isinstance(x, Tensor) and x.is_meta and x.numel()]
        if on_gpu and not func.is_view and name not in NONE:
            self.found[name] += LAUNCHES.get(name, 1)
        return made


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config with fewer layers."""
    made = copy.deepcopy(config)
    made.num_hidden_layers = layers
    if getattr(made, "layer_types", None):
        made.layer_types = made.layer_types[:layers]
    return made


def side_of(name: str, config: PretrainedConfig) -> Side:
    """That side of a narrow model of this config, with bf16 adapters."""
    with tempfile.TemporaryDirectory() as folder:
        write_narrow(config, folder)
        side = SIDES[name](Setup(base=folder, seq=0, dtype="bf16"))
    for parameter in side.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return side


def launches_of(side: Side, ids: Tensor) -> list[Counter[str]]:
    """Launches of the second micro-batch's forward pass, and of its backward pass."""
    for _ in range(2):
        forward, back = Launches(), Launches()
        with forward:
            loss = side.forward(ids)
        forward.found += KERNELS
        KERNELS.clear()
        backward(loss, back)
        back.found += KERNELS
        KERNELS.clear()
    return [forward.found, back.found]


def launch_sides(config: PretrainedConfig) -> dict[tuple[str, int], Side]:
    """Narrow models of one layer and of two."""
    return {(name, n): side_of(name, with_layers(config, n)) for name in NAMES for n in (1, 2)}


def count_launches(
    sides: Mapping[tuple[str, int], Side], config: PretrainedConfig, seq: int
) -> dict[str, dict[str, Any]]:
    """By side, the launches of a layer forward and backward, and what makes them."""
    stand_ins()
    replace(nf4, "_has_room", lambda *_: True)
    found: dict[tuple[str, int], list[Counter[str]]] = {}
    ids = empty((1, seq), torch.int64)
    for (name, n), side in sides.items():
        widen(side.model, on_meta(with_layers(config, n)), Setup(base="", seq=seq).r)
        found[name, n] = launches_of(side, ids)
        if name == "ours":
            with patch.object(nf4, "GPU_DECODER", "triton"):
                found["ours-triton", n] = launches_of(side, ids)
    rows = {}
    for name in ("ours", "ours-triton", "peft"):
        forward, back = (b - a for a, b in zip(found[name, 1], found[name, 2], strict=True))
        made_by = {"forward": dict(forward.most_common()), "backward": dict(back.most_common())}
        rows[name] = {"forward": forward.total(), "backward": back.total(), "made_by": made_by}
    return rows


# ---- host time ----

FEW, MANY = 2, 10
TOKENS = 2
HEAD_DIM = 64  # of the one head: a block of 64 values is a row


def tiny(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config with tensors so small that computing takes no time."""
    made = with_layers(config, layers)
    made.head_dim = HEAD_DIM
    return made


def host_sides(config: PretrainedConfig) -> dict[tuple[str, int], Side]:
    """Tiny models of few layers and of many."""
    return {(name, n): side_of(name, tiny(config, n)) for name in NAMES for n in (FEW, MANY)}


def measure_host(sides: Mapping[tuple[str, int], Side], rounds: int) -> dict[str, dict[str, Any]]:
    """By side, CPU microseconds of a layer forward and backward: of the least of all rounds, as
    other processes only add to it."""
    choose_as_on_gpu(decode_on_cpu)
    replace(nf4, "_has_room", lambda *_: True)
    torch.set_num_threads(1)
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in sides}
    no_attention = patch.object(F, "scaled_dot_product_attention", one_operator)
    with no_attention, torch.backends.mkldnn.flags(enabled=False):
        for _ in range(rounds):
            for key, side in sides.items():
                times[key].append(_seconds(side, torch.arange(TOKENS)[None]))
    rows = {}
    for name in NAMES:
        few, many = (map(min, zip(*times[name, n], strict=True)) for n in (FEW, MANY))
        parts = [1e6 * (b - a) / (MANY - FEW) for a, b in zip(few, many, strict=True)]
        rows[name] = {"forward_us": round(parts[0]), "backward_us": round(parts[1])}
    return rows


def one_operator(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of attention, whose kernel for CPUs takes a millisecond of a few tokens too."""
    return torch.addcmul(q, k, v)


def _seconds(side: Side, ids: Tensor) -> tuple[float, float]:
    start = time.process_time()
    loss = side.forward(ids)
    middle = time.process_time()
    loss.backward()
    return middle - start, time.process_time() - middle


# ---- the command ----


def table(row: Mapping[str, Any]) -> str:
    """The record as a table in Markdown, and a line for each place that waits."""
    lines = ["| of a decoder layer | ours | PEFT | ratio |", "|---|---|---|---|"]
    passes = (("forward", "forward"), ("backward", "backward and recomputation"))
    for side, how in (("ours", "bitsandbytes"), ("ours-triton", "Triton")):
        for key, name in passes if "launches" in row else ():
            ours, pefts = (row["launches"][s][key] for s in (side, "peft"))
            lines.append(_line(f"launches, {name}, decoded by {how}", ours, pefts))
    for key, name in passes if "host" in row else ():
        ours, pefts = (row["host"][side][f"{key}_us"] for side in NAMES)
        lines.append(_line(f"host time, {name}, us", ours, pefts))
    if "waits" in row:
        own = sum(count for place, count in row["waits"].items() if "qlora/" in place)
        total = sum(row["waits"].values())
        lines += ["", f"waits in an optimizer step of 2 micro-batches: {total}, {own} in qlora/"]
        lines += [f"{count:4} {place}" for place, count in row["waits"].items()]
    return "\n".join(lines)


def _line(name: str, ours: int, pefts: int) -> str:
    return f"| {name} | {ours:,} | {pefts:,} | {ours / pefts:.2f} |"


def main() -> None:
    """The command; a user's error is one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shape", default="llama2-7b", help="one without a softcap in its attention"
    )
    parser.add_argument("--seq", type=int, default=2048, help="tokens of the counted micro-batch")
    parser.add_argument("--rounds", type=int, default=15, help="of the host's time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", action="store_true", help="print the record, and do not keep it")
    given = parser.parse_args()
    try:
        config = shape(given.shape)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    row: dict[str, Any] = {"shape": given.shape, "seq": given.seq}
    # what comes later in this order replaces more of this process, for good
    tiny_sides = host_sides(config) if "host" in given.parts else {}
    sides = launch_sides(config) if "launches" in given.parts else {}
    if "waits" in given.parts:
        row["waits"] = count_waits(tiny(config, FEW))
    if "host" in given.parts:
        row["host"] = measure_host(tiny_sides, given.rounds)
    if "launches" in given.parts:
        row["launches"] = count_launches(sides, config, given.seq)
    print(json.dumps(row) if given.json else table(row))
    if not given.json:
        record("launches", row)


if __name__ == "__main__":
    main()
