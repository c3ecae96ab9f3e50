"""What benchmarks/gpu_day.py asks of a GPU before and beside its measurements.

    python benchmarks/gpu_check.py machine     its ceilings: copied bytes and products a second
    python benchmarks/gpu_check.py smoke       every kernel agrees with torch; a few training steps
    python benchmarks/gpu_check.py profile --shape llama2-7b    where the time of a step goes

`profile` lists the kernels that take longest, the share of the step in which any kernel runs, and
how often the host waits for the GPU. On a CPU it lists torch's operators.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from decode import copy_bandwidth
from results import record
from shapes import make
from step_runner import Product, Runner
from step_sides import Setup
from torch.profiler import profile, supported_activities

from qlora.config import QuantConfig
from qlora.errors import require
from qlora.ops import gated, nf4

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SHAPE = (11008, 4096) if ON_GPU else (688, 256)  # of a weight
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
SHOWN = 40  # kernels


def show(name: str, lines: list[str], **facts: Any) -> None:
    """Print and record."""
    print("\n".join(lines))
    record(name, {"shown": lines, **facts})


def machine() -> None:
    """What a step can at most reach here."""
    flops = max(Product(Setup("", 0, device=DEVICE.type)).rate() for _ in range(3))
    lines = [f"products at {flops / 1e12:.3g} TFLOP/s"]
    if ON_GPU:
        card = torch.cuda.get_device_properties(0)
        bandwidth = copy_bandwidth(10)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        lines += [
            f"copies at {bandwidth / 1e12:.2f} TB/s, read and written",
            f"compute capability {card.major}.{card.minor}, {card.multi_processor_count} "
            f"multiprocessors, {free:.1f} of {total:.1f} GiB free, CUDA {torch.version.cuda}",
        ]
    show("gpu_machine", lines)


def smoke() -> None:
    """Raise where a kernel differs from torch, or a training step is broken."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    weight = torch.randn(SHAPE, device=DEVICE).to(dtype)
    quantized = nf4.quantize(weight, QuantConfig())
    exact = nf4.dequantize(quantized, torch.float32).to(dtype)
    ways = ["bitsandbytes", "triton"] if ON_GPU and nf4.triton_decodes(DEVICE, dtype) else []
    for way in ways:
        decoded = nf4.into_scratch(quantized, dtype, 0, nf4.DECODERS[way])
        require(torch.equal(decoded, exact), f"{way} decodes {SHAPE} wrongly")
    kernels = []
    for act in gated.ACTS:
        used = gated.implementation(DEVICE, dtype, act)[0]
        kernels.append("torch" if used is gated.plain_forward else "Triton")
    losses = steps_of("tiny", seq=32, count=4)
    require(losses[-1] < losses[0], f"four steps raise the loss: {losses}")
    found = f"decode: {', '.join(ways) or 'torch'}; gated: {', '.join(kernels)}"
    show("gpu_smoke", [found, f"loss of a tiny model {losses[0]:.3f}, then {losses[-1]:.3f}"])


def steps_of(shape: str, *, seq: int, count: int) -> list[float]:
    """The losses of training steps."""
    with tempfile.TemporaryDirectory() as folder:
        base = make(shape, Path(folder) / shape)
        runner = Runner("ours", Setup(str(base), seq, device=DEVICE.type))
        return [runner.step()[1] for _ in range(count)]


def profiled(shape: str, folder: Path, seq: int, batch: int) -> None:
    """The kernels of one step, and how long none ran."""
    base = make(shape, (folder / shape).absolute())
    runner = Runner("ours", Setup(str(base), seq, batch, device=DEVICE.type))
    runner.warm_up()
    with profile(activities=list(supported_activities())) as seen:
        start = time.perf_counter()
        runner.step()
        wall = (time.perf_counter() - start) * 1e6
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    waits = Counter(e.name for e in seen.events() if e.name in WAITS)
    took: Counter[str] = Counter()
    if ON_GPU:
        for event in events:
            took[event.name] += event.time_range.elapsed_us()
        busy = covered((e.time_range.start, e.time_range.end) for e in events) / wall
    else:
        for average in seen.key_averages():
            took[average.key] += average.self_cpu_time_total
        busy = min(1.0, sum(took.values()) / wall)
    lines = [f"a step takes {wall / 1e3:.1f} ms, busy {busy:.0%}; waits: {sum(waits.values())}"]
    lines += [
        f"{us / 1e3:8.2f} ms {us / wall:5.1%}  {name[:80]}" for name, us in took.most_common(SHOWN)
    ]
    print("\n".join(lines))
    facts = {"waits": waits, "kernels": dict(took.most_common(SHOWN)), "launches": len(events)}
    record("gpu_profile", {"shown": lines[:4], "wall_us": wall, "busy": busy, **facts})


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["machine", "smoke", "profile"])
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    if given.what == "profile":
        profiled(given.shape, given.folder, given.seq, given.batch)
    else:
        {"machine": machine, "smoke": smoke}[given.what]()


if __name__ == "__main__":
    main()
