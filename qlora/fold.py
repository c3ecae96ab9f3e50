"""The tensors of a merged checkpoint, one after the other, as a plan says.

Choosing 4-bit codes is slow and full of small steps, which a second core hardly helps along; so on
a CPU several weights are worked on at a time, each by one thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from qlora import nf4
from qlora.adapter_reader import AdapterFile
from qlora.checkpoint import Checkpoint
from qlora.config import QuantConfig
from qlora.errors import UserError
from qlora.export import Facts, Folding, in_4_bits, in_full
from qlora.merge_plan import MergeOp, Plan
from qlora.shards import Entry

Result = TypeVar("Result")
MAX_WORKERS = 8


def merged_tensors(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    plan: Plan,
    device: str,
    moments: Callable[[str], Tensor] | None,
    layers: dict[str, Facts],
) -> Iterator[Tensor]:
    """The output's tensors in the order of `plan.entries`; facts of adapted layers go to `layers`.

    Args:
        moments: gives an adapted layer's sum of x x' over its inputs, for a 4-bit output.
    """

    def tasks() -> Iterator[Callable[[], tuple[list[Tensor], Facts]]]:
        for op in plan.ops:
            # Here and not in the task: gathering moments runs the model, on all threads.
            known = moments(op.module) if moments and op.module and op.in_4_bits else None
            yield partial(_fold, checkpoint, adapter, plan, op, device, known)

    slow = device == "cpu" and any(op.module and op.in_4_bits for op in plan.ops)
    workers = min(torch.get_num_threads(), MAX_WORKERS) if slow else 1
    for op, (done, found) in zip(plan.ops, _in_turn(tasks(), workers), strict=True):
        if op.module:
            layers[op.module] = found
        while done:
            yield done.pop(0)  # held no longer than it takes to write it


def _in_turn(tasks: Iterable[Callable[[], Result]], workers: int) -> Iterator[Result]:
    """What each task returns, in their order; `workers` run at a time, a few ahead of the turn."""
    if workers == 1:
        for task in tasks:
            yield task()
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    ahead: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(task))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _fold(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    plan: Plan,
    op: MergeOp,
    device: str,
    moments: Tensor | None,
) -> tuple[list[Tensor], Facts]:
    """What is written for one weight, on the CPU, and what is to be reported of it."""
    if not (op.module or op.round_trip or op.packed or op.in_4_bits):
        (entry,) = op.entries
        return [_cast(_value(checkpoint, adapter, op), entry)], {}
    folding = _read(checkpoint, adapter, op, plan.quant, device)
    if op.in_4_bits:
        quantized, found = in_4_bits(folding, plan.out_quant, moments)
        quantized.state.dtype = plan.out_dtype
        record = nf4.to_record(quantized)
        suffixes = [entry.name.removeprefix(op.name).lstrip(".") for entry in op.entries]
        return [record[suffix].cpu() for suffix in suffixes], found
    (entry,) = op.entries
    weight, found = in_full(folding, entry.dtype)
    weight = weight.T if op.transposed else weight.view(entry.shape)  # of a convolution: as it was
    return [_cast(weight, entry)], found


def _read(
    checkpoint: Checkpoint, adapter: AdapterFile, op: MergeOp, quant: QuantConfig, device: str
) -> Folding:
    """The weight of `op`, with what the adapter adds to it, on `device`."""
    factors = adapter.pairs[op.module].to(device) if op.module else None
    if op.packed:
        record = checkpoint.record(op.source)
        assert record is not None
        codes = nf4.from_record(record, device)
        return Folding(factors=factors, codes=codes)
    weight = _value(checkpoint, adapter, op).to(device)
    _require_finite(weight, op.name)
    weight = weight.T if op.transposed else weight.flatten(1)
    if not op.round_trip:
        return Folding(weight, factors, original=weight)
    # Loading casts to the compute dtype before it quantizes; of a bf16 checkpoint this is no cast.
    weight = weight.to(nf4.DTYPES.get(quant.compute_dtype, weight.dtype))
    taken = adapter.taken.get(op.module) if op.module else None
    if taken is None:
        codes = nf4.quantize(weight, quant)
        return Folding(None, factors, codes, original=weight)
    # the base was quantized without it, and the adapter is a change of the two together
    part = taken.to(device).change(weight)
    base = nf4.round_trip(weight.float() - part, quant).add_(part)
    return Folding(base, factors, original=weight)


def _value(checkpoint: Checkpoint, adapter: AdapterFile, op: MergeOp) -> Tensor:
    """The tensor of `op` with what the adapter puts in its place, or adds but for A and B."""
    if op.param is None:
        return checkpoint.read(op.source)
    value = adapter.whole.get(op.param)
    if value is None:
        value = checkpoint.read(op.source)
    module, _, kind = op.param.rpartition(".")
    if kind == "bias" and module in adapter.bias_changes:
        value = value.float() + adapter.bias_changes[module]
    if kind == "weight" and module in adapter.rows:
        ids, rows = adapter.rows[module]
        value = value.float().index_copy(0, ids, rows.float())
    return value


def _cast(tensor: Tensor, entry: Entry) -> Tensor:
    out = tensor.to("cpu", entry.dtype)
    _require_finite(out, entry.name)
    return out


def _require_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise UserError(
            f"{name} does not fit {tensor.dtype}: it holds NaN, or values beyond its range. "
            "Use --format bf16 or fp32; if the base itself holds NaN, download it again"
        )
