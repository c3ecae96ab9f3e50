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
    """What an operation adds the adapter's A and B to."""

    COPY = "nothing: the tensor is the checkpoint's, or the adapter's own, with one cast"
    WEIGHT = "the weight as the checkpoint has it"
    ROUND_TRIP = "the weight after quantization to 4 bits, as in training"
    REBASED = (
        "the same, quantized without what qlora.adapters.rebase subtracts, which is added back"
    )
    PACKED = "the weight that the checkpoint holds as 4-bit codes"


@dataclass(frozen=True)
class MergeOp:
    """How one weight of the output is made."""

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
    """whether the codes of the base are of the format that is written"""


@dataclass(frozen=True)
class Plan:
    """All that is known before a weight is read."""

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
    """What to do with each tensor, from headers alone, in the model's order.

    Raises:
        UserError: something of the adapter is not in the checkpoint, or has another shape there;
            all of it is named.
    """
    if adapter.parameters:
        raise UserError(
            f"adapter {adapter.folder} changes {', '.join(adapter.parameters)}, which a checkpoint "
            "stores in another form than the model: use load_adapter, merge_and_unload and "
            "save_pretrained instead"
        )
    model = skeleton(
        checkpoint.folder,
        task=adapter.task,
        labels=_labels(checkpoint, adapter),
        trust_remote_code=config.trust_remote_code,
    )
    return _Planner(checkpoint, adapter, config, model).plan()


class _Planner:
    """Checkpoint and adapter matched by name through the model; `faults`: what does not fit."""

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
        self.out_dtype = nf4.DTYPES[_out_dtype(config, self.quant)]
        self.faults: list[str] = []

        is_conv1d = quantized_layers(model, self.quant)
        self.quantized = {m for m in is_conv1d if f"{m}.weight" not in adapter.full_params}
        """layers that training quantized"""
        self.rounds = config.onto == "nf4" and not checkpoint.is_quantized
        """whether these go through 4-bit codes; those of a 4-bit base hold them already"""
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
            tied_to = disk_name(checkpoint, model, f"{self.embedding}.weight")
            self.places[f"{self.head}.weight"] = f"{self.head}.weight"
            self.sources[f"{self.head}.weight"] = tied_to or f"{self.head}.weight"
        self.new: set[str] = set()
        """parameters of a classifier's head that are the adapter's, whatever the checkpoint has"""
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
            if not _is_part_of_record(self.checkpoint, name)
        ]
        changes = self._config_changes(ops)
        raise_faults(
            f"adapter {self.adapter.folder} does not fit {self.checkpoint.folder}",
            self.faults,
            mend="Give the base it was trained on as --base-model",
        )
        turn = {place: i for i, place in enumerate(self.places.values())}
        ops.sort(key=lambda op: turn.get(op.name, -1))
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
        """Put the adapter's head in place of the checkpoint's, which may be another task's."""
        params = dict(self.model.named_parameters())
        of_head = {param for param in params if is_in(param, heads(self.model))}
        full = params.keys() & self.adapter.full_params.keys()
        self.new = {param for param in full if param in of_head or self.places[param] is None}
        for param in self.new:
            self.places[param] = place = self.places[param] or param
            self.sources.setdefault(place, place)
        lacks = {p for p in of_head - self.new if not disk_name(self.checkpoint, self.model, p)}
        self.faults += [f"{param} is in neither of the two" for param in sorted(lacks)]
        for name in _of_other_heads(self.checkpoint, self.model):
            del self.sources[name]

    def _find_missing(self) -> None:
        untouched = self.quantized - set(self.adapter.pairs)
        for param, place in self.places.items():
            if place is None and (self.rounds or param.removesuffix(".weight") not in untouched):
                self.faults.append(f"{param} is not in the checkpoint")
        if self.unties and self.adapter.rows:
            self.faults.append("it has trained token rows, and unties head and embedding")

    def _op(self, name: str, source: str, param: str | None) -> MergeOp:
        if param in self.new:
            shape = tuple(self.adapter.full_params[param].shape)
            return MergeOp(name, source, (Entry(name, self.out_dtype, shape),), param=param)
        adapter, header = self.adapter, self.checkpoint.tensors[source]
        module = param.removesuffix(".weight") if param and param.endswith(".weight") else None
        record = _record_state(self.checkpoint, source)
        shape = tuple(record["shape"]) if record else header.shape
        is_float = bool(record) or header.dtype.is_floating_point
        if param in adapter.full_params:
            full = tuple(adapter.full_params[param].shape)
            resizable = module in (self.embedding, self.head)
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

    def _kind(self, module: str | None, record: dict[str, Any]) -> tuple[Kind, bool]:
        """The kind, and whether the base's codes are of the output's format."""
        if record:
            grid = record["quant_type"], record["blocksize"], "nested_blocksize" in record
            return Kind.PACKED, grid == _grid(self.out_quant)
        if self.rounds and module in self.quantized:
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
            self.faults.append(f"embedding and output head have {sizes} rows, not one number")
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
    """The adapter's class names, else one for each row of its head; () for the checkpoint's own."""
    if adapter.labels or not (task_named(adapter.task).trains_head and adapter.full_params):
        return adapter.labels
    count = min(tensor.shape[0] for tensor in adapter.full_params.values())
    if len(checkpoint.labels) == count:
        return ()
    return tuple(f"LABEL_{i}" for i in range(count))


def _of_other_heads(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """Tensors of the checkpoint outside its base model that `model` does not have."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        return []  # saved without a head
    used = {disk_name(checkpoint, model, name) for name in model.state_dict()}
    return [n for n in checkpoint.tensors if not n.startswith(prefix) and n not in used]


def _out_dtype(config: MergeConfig, quant: QuantConfig) -> str:
    """The dtype asked for; beside 4-bit codes the 16-bit one of training."""
    if config.format != "nf4":
        return config.format
    return "fp16" if quant.compute_dtype == "fp16" else "bf16"


def _grid(quant: QuantConfig) -> tuple[str, int, bool]:
    return quant.quant_type, quant.blocksize, quant.double_quant


def _is_part_of_record(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor belongs to the 4-bit record of another one."""
    weight = name.partition(".weight.")[0] + ".weight"
    return weight != name and bool(_record_mark(checkpoint, weight))


def _record_mark(checkpoint: Checkpoint, name: str) -> str | None:
    """The tensor that holds the quantization state of the 4-bit weight `name`, if it is one."""
    marks = (f"{name}{nf4.RECORD_MARK}{quant_type}" for quant_type in ("nf4", "fp4"))
    return next((mark for mark in marks if mark in checkpoint.tensors), None)


def _record_state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """quant_type, blocksize and shape (out, in) of a 4-bit weight; empty for any other tensor."""
    mark = _record_mark(checkpoint, name)
    return dict(unpack_tensor_to_dict(checkpoint.read(mark))) if mark else {}
