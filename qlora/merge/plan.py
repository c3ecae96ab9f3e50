"""The plan of a merge, from file headers alone: each tensor's name, dtype, shape and computation.

Operations are in the order of the model's layers, in which calibration collects their moments.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import nn

from qlora.adapters.format import AdapterFile, raise_faults, require_same_base, require_same_codes
from qlora.base.checkpoint import Checkpoint, disk_name, linear_layers, quantized_layers, skeleton
from qlora.base.modules import heads, is_in, is_tied, vocabulary
from qlora.base.shards import Entry
from qlora.config import MergeConfig, QuantConfig
from qlora.config.tasks import task_named
from qlora.errors import UserError
from qlora.ops import nf4


class Kind(Enum):
    """The base that an operation adds B A to."""

    COPY = "none: the checkpoint's tensor, or the adapter's own, with one cast"
    WEIGHT = "the checkpoint's weight"
    ROUND_TRIP = "the weight after quantization to 4 bits, as in training"
    REBASED = "as ROUND_TRIP, but qlora.adapters.rebase's part is not quantized with the rest"
    PACKED = "the checkpoint's 4-bit codes"


@dataclass(frozen=True)
class MergeOp:
    """How one weight of the output is computed."""

    name: str
    source: str
    """the checkpoint's tensor that is read: `name`, or the embedding for a head that was tied"""
    entries: tuple[Entry, ...]
    """the tensors to write: one, or those of a 4-bit record"""
    kind: Kind = Kind.COPY
    param: str | None = None
    """the adapter's name of the parameter, if the adapter or quantization changes it"""
    module: str | None = None
    """the adapter's name of the layer, if it has A and B"""
    transposed: bool = False
    """whether the checkpoint stores the weight as (in, out)"""
    in_4_bits: bool = False
    """whether it is written as 4-bit codes"""
    same_grid: bool = False
    """whether the base's codes have the format that is written"""


@dataclass(frozen=True)
class Plan:
    """The operations of a merge and the output's formats."""

    ops: list[MergeOp]
    quant: QuantConfig
    """of the base in training"""
    out_quant: QuantConfig
    """of a 4-bit output"""
    out_dtype: torch.dtype
    """of tensors that are not written as codes"""
    linear: dict[str, str | None]
    """linear layer -> the checkpoint's name of its weight"""
    config_changes: dict[str, Any]
    """entries of the base's config.json that the merge changes"""
    task: str

    @property
    def params(self) -> set[str]:
        """The adapter's names of the parameters that change."""
        return {op.param for op in self.ops if op.param}

    @property
    def in_4_bits(self) -> set[str]:
        """The weights that are written as 4-bit codes."""
        return {op.name for op in self.ops if op.in_4_bits}

    @property
    def entries(self) -> list[Entry]:
        return [entry for op in self.ops for entry in op.entries]


def check_base(checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> None:
    """Raise if the adapter was not trained on this base."""
    require_same_base(adapter, checkpoint.fingerprint, str(checkpoint.folder))
    if checkpoint.is_quantized and config.onto != "nf4":
        raise UserError(
            f"--onto {config.onto} needs the weights from before quantization, but "
            f"{checkpoint.folder} is 4-bit: give the 16-bit model as --base-model, or merge "
            "--onto nf4"
        )
    require_same_codes(checkpoint, adapter)


def plan_merge(checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> Plan:
    """The operation for each tensor, from headers alone, in the model's order.

    Raises:
        UserError: lists all of the adapter that the checkpoint lacks or has in another shape.
    """
    if adapter.parameters:
        raise UserError(
            f"adapter {adapter.folder} changes {', '.join(adapter.parameters)}, which checkpoints "
            "store in another form: use load_adapter, merge_and_unload and save_pretrained instead"
        )
    model = skeleton(
        checkpoint.folder,
        task=task_named(adapter.task),
        labels=_labels(checkpoint, adapter),
        trust_remote_code=config.trust_remote_code,
    )
    return _Planner(checkpoint, adapter, config, model).plan()


class _Planner:
    """Matches checkpoint and adapter by the model's names; collects misfits in `faults`."""

    def __init__(
        self, checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig, model: Any
    ) -> None:
        self.checkpoint, self.adapter, self.config, self.model = checkpoint, adapter, config, model
        self.quant = adapter.quantization
        self.out_quant = replace(
            self.quant,
            quant_type="nf4",
            blocksize=config.blocksize or self.quant.blocksize,
            double_quant=self.quant.double_quant and config.double_quant,
        )
        half = "fp16" if self.quant.compute_dtype == "fp16" else "bf16"  # beside 4-bit codes
        self.out_dtype = nf4.DTYPES[half if config.format == "nf4" else config.format]
        self.faults: list[str] = []
        self.records = _records(checkpoint)

        is_conv1d = quantized_layers(model, self.quant)
        self.quantized = {m for m in is_conv1d if f"{m}.weight" not in adapter.full_params}
        """layers that training quantized"""
        self.round_trips = config.onto == "nf4" and not checkpoint.is_quantized
        """whether these are quantized and dequantized; a 4-bit base already holds the codes"""
        # (in, out) on disk: weights of Conv1D, and of an embedding as a layer from vocab to dim
        pairs = {m: m in adapter.embeddings or adapter.fan_in_fan_out for m in adapter.pairs}
        self.transposed = pairs | is_conv1d

        self.embedding, self.head = vocabulary(model)
        self.unties = is_tied(model) and adapter.unties(self.embedding, self.head)
        self.sources = {name: name for name in checkpoint.tensors}
        """tensor of the output -> tensor of the checkpoint"""
        self.places = self._places()
        """parameter that changes -> the checkpoint's name of it, None where it has none"""
        if self.unties:
            head_weight = f"{self.head}.weight"
            tied_to = disk_name(checkpoint, model, f"{self.embedding}.weight")
            self.places[head_weight] = head_weight
            self.sources[head_weight] = tied_to or head_weight
        self.classifier: set[str] = set()
        """parameters of a classifier's head, which the adapter brings"""
        if task_named(adapter.task).trains_head:
            self._replace_head()

    def plan(self) -> Plan:
        linear = {
            m: disk_name(self.checkpoint, self.model, f"{m}.weight")
            for m in linear_layers(self.model)
        }
        self.faults += self.adapter.missing(linear)
        self._find_missing()
        params = {place: param for param, place in self.places.items() if place}
        ops = [
            self._op(name, source, params.get(name))
            for name, source in self.sources.items()
            if not self._is_in_record(name)
        ]
        changes = self._config_changes(ops)
        raise_faults(
            f"adapter {self.adapter.folder} does not fit {self.checkpoint.folder}",
            self.faults,
            fix="Give the base it was trained on as --base-model",
        )
        order = {place: i for i, place in enumerate(self.places.values())}
        ops.sort(key=lambda op: order.get(op.name, -1))
        return Plan(
            ops, self.quant, self.out_quant, self.out_dtype, linear, changes, self.adapter.task
        )

    def _places(self) -> dict[str, str | None]:
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        modules = {*self.transposed, *self.adapter.rows}
        params = [f"{m}.weight" for m in sorted(modules, key=lambda m: order.get(m, -1))]
        params += [*self.adapter.full_params, *(f"{m}.bias" for m in self.adapter.bias_changes)]
        return {param: disk_name(self.checkpoint, self.model, param) for param in params}

    def _replace_head(self) -> None:
        """Use the adapter's head in place of the checkpoint's, which may be another task's."""
        params = dict(self.model.named_parameters())
        of_head = {param for param in params if is_in(param, heads(self.model))}
        full = params.keys() & self.adapter.full_params.keys()
        self.classifier = {p for p in full if p in of_head or self.places[p] is None}
        for param in self.classifier:
            self.places[param] = place = self.places[param] or param
            self.sources.setdefault(place, place)
        others = sorted(of_head - self.classifier)
        lacks = [param for param in others if not disk_name(self.checkpoint, self.model, param)]
        self.faults += [f"{param} is in neither of the two" for param in lacks]
        for name in _of_other_heads(self.checkpoint, self.model):
            del self.sources[name]

    def _find_missing(self) -> None:
        untouched = self.quantized - set(self.adapter.pairs)
        for param, place in self.places.items():
            if place is None and (
                self.round_trips or param.removesuffix(".weight") not in untouched
            ):
                self.faults.append(f"{param} is not in the checkpoint")
        if self.unties and self.adapter.rows:
            self.faults.append("it has trained token rows and unties the head from the embedding")

    def _op(self, name: str, source: str, param: str | None) -> MergeOp:
        if param in self.classifier:
            shape = tuple(self.adapter.full_params[param].shape)
            return MergeOp(name, source, (Entry(name, self.out_dtype, shape),), param=param)
        adapter, header = self.adapter, self.checkpoint.tensors[source]
        module = param.removesuffix(".weight") if param and param.endswith(".weight") else None
        record = self.records.get(source, {})
        shape = tuple(record["shape"]) if record else header.shape
        is_float = bool(record) or header.dtype.is_floating_point
        if param in adapter.full_params:
            full = tuple(adapter.full_params[param].shape)
            resizable = module in (self.embedding, self.head)  # along dimension 0
            if full[resizable:] != shape[resizable:]:
                self.faults.append(f"{name} is {shape}, the adapter has it as {full}")
            record, shape, is_float = {}, full, True
        transposed = module is not None and self.transposed.get(module, False)
        matrix = shape[::-1] if transposed and not record else shape  # (out, in)
        if len(shape) > 2 and module in adapter.pairs:  # of a convolution: (out, in * kernel)
            matrix = (shape[0], math.prod(shape[1:]))
        self._check_shapes(name, module, shape, matrix)

        kind, same_grid = self._kind(module, record)
        is_quantizable = module in self.quantized and not self.checkpoint.is_quantized
        in_4_bits = self.config.format == "nf4" and (bool(record) or is_quantizable)
        if in_4_bits:
            kind = Kind.WEIGHT if kind is Kind.COPY else kind
            layout = nf4.record_layout(matrix, self.out_quant)
            entries = [Entry(f"{name}.{s}" if s else name, *tensor) for s, tensor in layout.items()]
        else:
            dtype = self.out_dtype if is_float else header.dtype
            entries = [Entry(name, dtype, matrix[::-1] if transposed else shape)]
        return MergeOp(
            name=name,
            source=source,
            entries=tuple(entries),
            kind=kind,
            param=param,
            module=module if module in adapter.pairs else None,
            transposed=transposed,
            in_4_bits=in_4_bits,
            same_grid=same_grid,
        )

    def _is_in_record(self, name: str) -> bool:
        """Whether the tensor belongs to the 4-bit record of another one."""
        return ".weight." in name and name.partition(".weight.")[0] + ".weight" in self.records

    def _kind(self, module: str | None, record: dict[str, Any]) -> tuple[Kind, bool]:
        """The kind, and whether the base's codes are of the output's format."""
        if record:
            grid = record["quant_type"], record["blocksize"], "nested_blocksize" in record
            return Kind.PACKED, grid == _grid(self.out_quant)
        if self.round_trips and module in self.quantized:
            rebased = module in self.adapter.subtracted
            kind = Kind.REBASED if rebased else Kind.ROUND_TRIP
            return kind, _grid(self.quant) == _grid(self.out_quant)
        return (Kind.WEIGHT if module in self.adapter.pairs else Kind.COPY), False

    def _check_shapes(
        self, name: str, module: str | None, shape: tuple[int, ...], matrix: tuple[int, ...]
    ) -> None:
        pairs, rows = self.adapter.pairs, self.adapter.rows
        if module in pairs and matrix != pairs[module].shape:
            self.faults.append(f"{name} is {matrix}, the adapter is for {pairs[module].shape}")
        if module in rows and shape[1:] != rows[module][1].shape[1:]:
            trained = tuple(rows[module][1].shape)
            self.faults.append(f"{name} is {shape}, the adapter has rows of it as {trained}")

    def _config_changes(self, ops: list[MergeOp]) -> dict[str, Any]:
        """Entries of config.json for an untied head, a grown vocabulary and a classifier."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self.unties else {}
        ends = (f"{self.embedding}.weight", f"{self.head}.weight")
        sizes = {op.entries[0].shape[0] for op in ops if op.param in ends}
        if len(sizes) > 1:
            self.faults.append(f"embedding and output head have different numbers of rows, {sizes}")
        elif sizes and ends[0] in self.adapter.full_params:
            changes["vocab_size"] = sizes.pop()
        if task_named(self.adapter.task).trains_head:
            names = {str(i): label for i, label in self.model.config.id2label.items()}
            changes["architectures"] = [type(self.model).__name__]
            changes["id2label"] = names
            changes["label2id"] = {label: int(i) for i, label in names.items()}
            if self.adapter.base.get("pad_token_id") is not None:
                changes["pad_token_id"] = self.adapter.base["pad_token_id"]
        return changes


def _labels(checkpoint: Checkpoint, adapter: AdapterFile) -> tuple[str, ...]:
    """The adapter's class names, or one for each row of its head; () for the checkpoint's own."""
    if adapter.labels or not (task_named(adapter.task).trains_head and adapter.full_params):
        return adapter.labels
    count = min(tensor.shape[0] for tensor in adapter.full_params.values())
    if len(checkpoint.labels) == count:
        return ()
    return tuple(f"LABEL_{i}" for i in range(count))


def _of_other_heads(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """Tensors of the checkpoint outside its base model that `model` lacks."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        return []  # saved without a head
    used = {disk_name(checkpoint, model, name) for name in model.state_dict()}
    return [n for n in checkpoint.tensors if not n.startswith(prefix) and n not in used]


def _grid(quant: QuantConfig) -> tuple[str, int, bool]:
    return quant.quant_type, quant.blocksize, quant.double_quant


def _records(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """4-bit weight of the checkpoint -> quant_type, blocksize and shape (out, in), and the rest."""
    states = [name for name in checkpoint.tensors if nf4.RECORD_MARK in name]
    return {
        name.partition(nf4.RECORD_MARK)[0]: dict(unpack_tensor_to_dict(checkpoint.read(name)))
        for name in states
    }
