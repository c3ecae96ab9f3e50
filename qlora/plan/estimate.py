"""`plan(config)`: the memory that a run will need, from config.json alone.

What a step allocates is counted (qlora.plan.step, qlora.plan.optimizer). Two parts are not, and
are assumed: the CUDA context, and an allowance for what the allocator rounds up and cannot reuse.

On a CPU the peak is of resident memory above that at the process's start, its packages imported.
Assumed are there what tokenizer, data and Trainer take, and the allocator. Loading may be the peak:
the files of weights are mapped, and their pages are resident until the model is loaded; the system
may take them back, which it does where memory is short. On a GPU loading is none: weights are
quantized one after another, and one in 16 bits is less than a step takes.

With several GPUs each has all of it, or a shard of the base (qlora.plan.shards), and between the
last backward pass and the optimizer's step the flat copy of the gradients that travels
(qlora.training.ranks).
"""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from qlora.base.modules import is_quantized
from qlora.base.shards import parse_size
from qlora.config import TrainConfig
from qlora.errors import UserError, require
from qlora.plan.meter import Segment
from qlora.plan.optimizer import STATE, STEP, OptimizerBytes, optimizer_bytes
from qlora.plan.shards import Shards
from qlora.plan.source import Source, read_source
from qlora.plan.step import EMBEDDING, HEAD, LINEAR, OTHER, Sample, joined, quietly
from qlora.training import ranks
from qlora.training.ranks import buckets_of
from qlora.training.start import with_settings_of_adapter

CONTEXT, ALLOWANCE = "CUDA context (assumed)", "fragmentation (assumed)"
CONTEXT_BYTES = 512 << 20
ALL_REDUCE, SHARDS = "gradients of all GPUs", "shards of the base"
PROCESS, FILES, LOADING = "tokenizer, data, Trainer (assumed)", "mapped files", "loading"
# bitsandbytes' operator holds a weight's values, their quotients and the clamped ones, in fp32
QUANTIZING, QUANTIZING_BYTES = "quantization of a weight", 12
DATA_BYTES, TRAINER_BYTES = 56 << 20, 64 << 20  # of PROCESS, before loading and after it
ALLOWED_SHARE = 0.03  # of what is counted
CHECKPOINTS = 3  # while the third is written; then the last two are kept


@dataclass(frozen=True)
class Plan:
    """The memory of a run, in bytes."""

    config: TrainConfig
    rows: int
    """rows of a micro-batch"""
    length: int
    """tokens of a row"""
    segments: list[Segment]
    """of a micro-batch and the optimizer's step, in their order"""
    parts: dict[str, int]
    """by kind, at the peak"""
    peak_at: str
    """the part of the step with the peak"""
    host: dict[str, int]
    disk: dict[str, int]
    gradient_bytes: int
    """that an all-reduce sums over the GPUs, once a step"""
    shards: Shards | None = None
    """of the base, if each GPU holds one"""
    budget_bytes: int | None = None
    """of the card, if it is known"""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """None without a budget."""
        return None if self.budget_bytes is None else self.peak_bytes <= self.budget_bytes

    @property
    def gpus(self) -> int:
        return gpus_of(self.config)

    @property
    def rows_a_step(self) -> int:
        """Rows of an optimizer's step, on all GPUs."""
        return self.rows * self.config.gradient_accumulation_steps * self.gpus

    @property
    def sent_bytes(self) -> int:
        """What each GPU sends in a step: a ring passes on every part of the gradients but one
        twice."""
        return 2 * (self.gpus - 1) * self.gradient_bytes // self.gpus + self.sent_of_base

    @property
    def gathered_bytes(self) -> int:
        """Of a sharded base, in each forward and backward pass."""
        return 0 if self.shards is None else self.shards.gathered_bytes

    @property
    def sent_of_base(self) -> int:
        """Of it the shards, in all micro-batches."""
        sent = 0 if self.shards is None else self.shards.sent_bytes
        return self.config.gradient_accumulation_steps * sent

    def record(self) -> dict[str, Any]:
        """The object of --json."""
        return {
            "peak_bytes": self.peak_bytes, "budget_bytes": self.budget_bytes, "fits": self.fits,
            "parts": self.parts, "peak_at": self.peak_at, "rows": self.rows,
            "tokens_per_row": self.length, "host": self.host, "disk": self.disk,
            "gpus": self.gpus, "rows_a_step": self.rows_a_step, "sent_bytes": self.sent_bytes,
            "sharding": self.config.sharding, "sent_of_base": self.sent_of_base,
        }  # fmt: skip


class Planner:
    """Plans of one model with one set of adapters and layers: rows and lengths may vary."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source | None = None,
        *,
        device: str = "cuda",
        direct: bool = False,
    ) -> None:
        budget(config)  # refuses one that is no size, before anything is counted
        alone = "--sharding fsdp is for several GPUs: give --gpus N, or leave it out"
        require(config.sharding != "fsdp" or gpus_of(config) > 1, alone)
        if config.adapter is not None:
            with quietly():
                config = with_settings_of_adapter(config, {})
        self.config, self.source, self.device = config, source or read_source(config), device
        config = replace(config, quant=self.source.quant)
        try:
            self.sample = Sample(config, self.source.config, device=device, direct=direct)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{config.model} {_described(error)}") from error
        self.trained = self.sample.trained()
        self._optimizer: dict[str, OptimizerBytes] = {}
        self._counts: dict[tuple[int, int, bool], tuple[list[Segment], int]] = {}

    def optimizer(self, optim: str) -> OptimizerBytes:
        """Of the optimizer of that name, counted once."""
        if optim not in self._optimizer:
            settings = replace(self.config, optim=optim)
            self._optimizer[optim] = optimizer_bytes(settings, self.trained, self.device)
        return self._optimizer[optim]

    def plan(self, config: TrainConfig | None = None) -> Plan:
        """The plan of the run, or of another `config` that differs in rows, tokens, optimizer and
        where the embedding and the base are."""
        config, longest = config or self.config, self.source.longest
        rows = config.per_device_train_batch_size
        length = min(config.data.max_length, longest or config.data.max_length)
        own = self.optimizer(config.optim)
        accumulates = config.gradient_accumulation_steps > 1
        try:
            segments, activations = self._count(rows, length, accumulates)
        except UserError:
            raise
        except Exception as error:  # of a model's code that reads values
            raise UserError(f"{config.model} {_described(error)}") from error
        buckets = buckets_of(self.trained)
        several = gpus_of(config) > 1
        segments = _with_optimizer(segments, own, max(buckets) if several else 0)
        host = {"offloaded activations": activations} if activations else {}
        if config.offload_embedding:
            host["embedding"] = _without_embedding(segments, self.sample.is_tied)
        if shards := self.shards(config):
            segments = shards.applied(segments)
            host |= {SHARDS: shards.host_bytes} if config.offload_base else {}
        if self.device == "cpu":
            loading = self._loading(segments[0])
            for held in (h for s in segments for h in (s.start, s.peak, s.end)):
                held[PROCESS] = DATA_BYTES + TRAINER_BYTES
            segments = [loading, *segments]
        peak = max(segments, key=lambda segment: sum(segment.peak.values()))
        parts = {kind: size for kind, size in peak.peak.items() if size}
        allowed = int(sum(parts.values()) * ALLOWED_SHARE)
        if self.device == "cuda":
            parts[CONTEXT] = CONTEXT_BYTES
        parts[ALLOWANCE] = allowed
        free = psutil.virtual_memory().available if self.device == "cpu" else budget(config)
        return Plan(
            config, rows, length, segments, parts, _place(segments, peak), host, self._disk(own),
            sum(buckets), shards, free,
        )  # fmt: skip

    def shards(self, config: TrainConfig) -> Shards | None:
        """Of the base, if a rank has no more of it."""
        if config.sharding != "fsdp":
            return None
        sizes: Any = {"gpus": gpus_of(config), "offload": config.offload_base}
        return Shards(self.sample.matrices, self.sample.stands_in, **sizes)

    def anew(self) -> "Planner":
        """A planner of the same model that has counted nothing."""
        made = copy.copy(self)
        made._counts = {}
        return made

    def _count(self, rows: int, length: int, accumulates: bool) -> tuple[list[Segment], int]:
        """Of a micro-batch, counted once."""
        key = rows, length, accumulates
        if key not in self._counts:
            self._counts[key] = self.sample.count(rows, length, accumulates=accumulates)
        return self._counts[key]

    def _loading(self, first: Segment) -> Segment:
        """Loading of the model, whose parts are there when the `first` segment begins. The peak is
        at its end: then all pages of the files are mapped."""
        end = Counter({kind: first.start[kind] for kind in (LINEAR, EMBEDDING, HEAD, OTHER)})
        end[PROCESS] = DATA_BYTES
        modules = [m for m in self.sample.model.modules() if is_quantized(m)]
        most: int = max((m.weight.quant_state.shape.numel() for m in modules), default=0)
        peak = end + Counter({QUANTIZING: QUANTIZING_BYTES * most})
        peak[FILES] = self.source.file_bytes or 2 * self.sample.parameters
        return Segment(LOADING, Counter({PROCESS: DATA_BYTES}), peak, end)

    def _disk(self, own: OptimizerBytes) -> dict[str, int]:
        adapter = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.trained)
        files: dict[str, int] = {"adapter": adapter}
        files["checkpoints"] = CHECKPOINTS * (adapter + own.state)
        if self.source.file_bytes is not None:
            files["model files"] = self.source.file_bytes
        return files | {"merged model in 16 bits": 2 * self.sample.parameters}


def plan(config: TrainConfig, device: str = "cuda") -> Plan:
    """What a run of `config` needs on a GPU, or on this machine's `cpu`. Raises UserError for a
    model that cannot be planned."""
    return Planner(config, device=device).plan()


def gpus_of(config: TrainConfig) -> int:
    """The GPUs of a planned run, or of the run that this process is in."""
    return config.gpus or ranks.count()


def budget(config: TrainConfig) -> int | None:
    """The bytes of `gpu_memory`, or of the card that is there; None without either."""
    if config.gpu_memory is not None:
        try:
            return parse_size(config.gpu_memory)
        except UserError as error:
            raise UserError(f"--gpu-memory: {error}") from None
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def _with_optimizer(segments: list[Segment], own: OptimizerBytes, bucket: int) -> list[Segment]:
    """The segments with the optimizer's state, and after them its step; before that, if there is a
    `bucket`, the sum over all GPUs."""
    start = segments[0].start.copy()
    start[STATE] += own.state
    step = Segment("optimizer step", Counter(), Counter({STEP: own.step}), Counter())
    total = Segment("all-reduce", Counter(), Counter({ALL_REDUCE: bucket}), Counter())
    return joined([*segments, *[total] * bool(bucket), step], start)


def _without_embedding(segments: list[Segment], is_tied: bool) -> int:
    """Take the embedding out of every segment; its bytes."""
    fix = "its embedding is tied to the output head, and then needed on the GPU: leave it out"
    require(not is_tied, f"--offload-embedding: {fix}")
    size = segments[0].start[EMBEDDING]
    for segment in segments:
        for held in (segment.start, segment.peak, segment.end):
            held.pop(EMBEDDING, None)
    return size


def _place(segments: list[Segment], peak: Segment) -> str:
    """Where in the step the peak is, in words."""
    name, _, index = peak.name.partition(" ")
    if not index.isdigit():
        return peak.name
    same = [s for s in segments if s.name.startswith(f"{name} ") and s.name[-1].isdigit()]
    number = next(i for i, s in enumerate(same) if s is peak)
    layer = number if name == "forward" else len(same) - 1 - number
    return f"{name} pass of layer {layer + 1} of {len(same)}"


def _described(error: Exception) -> str:
    """Why a model cannot be planned."""
    said = str(error).strip().partition("\n")[0]
    if "meta tensor" in said or "data-independent" in said:
        why = "its code computes with values, such as the tokens of an expert, and a plan has none"
        return f"cannot be planned: {why}. Try a run with --max-steps 1"
    if "same dtype" in said:
        return f"cannot be planned in 16 bits: {said}. Try --compute-dtype fp32"
    return f"cannot be planned: {type(error).__name__}: {said}"
