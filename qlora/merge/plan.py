"""What a merge will do, from file headers alone: each name, dtype and shape, before it is read.

The plan runs in the model's order, in which calibration gets to know the layers.
"""

import math
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class MergeOp:
    """What happens to one weight of the checkpoint."""

    name: str
    source: str
    """the tensor it is made of: its own, or the embedding's for a head that was tied to it"""
    entries: tuple[Entry, ...]
    """what is written for it: one tensor, or those of a 4-bit record"""
    param: str | None = None
    """its name in the adapter, where something is done to it"""
    module: str | None = None
    """the adapter's name of the layer, where one is folded in"""
    round_trip: bool = False
    """go through the 4-bit codes, as the weight did in training"""
    packed: bool = False
    """the checkpoint holds the codes themselves"""
    transposed: bool = False
    """the checkpoint's models keep this weight as (in, out)"""
    in_4_bits: bool = False
    """it is written as codes"""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read."""

    ops: list[MergeOp]
    quant: QuantConfig
    """how the base was quantized in training"""
    out_quant: QuantConfig
    """how a 4-bit output is"""
    out_dtype: torch.dtype
    """of whatever is not written as codes"""
    linear: dict[str, str | None]
    """the linear layers, and the checkpoint's names of their weights"""
    config_changes: dict[str, Any]
    """what is no longer true of the base's config.json"""
    task: str
    """what the merged model is for"""

    @property
    def placed(self) -> set[str]:
        """The adapter's names of the parameters that something is done to."""
        return {op.param for op in self.ops if op.param}

    @property
    def coded(self) -> set[str]:
        """The weights that are written in 4 bits."""
        return {op.name for op in self.ops if op.in_4_bits}

    @property
    def entries(self) -> list[Entry]:
        return [entry for op in self.ops for entry in op.entries]


def check_base(checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> None:
    """Refuse a base that is not the one the adapter was trained on."""
    require_same_base(adapter, checkpoint.fingerprint, str(checkpoint.folder))
    if checkpoint.is_quantized and config.onto != "nf4":
        raise UserError(
            f"--onto {config.onto} wants the weights from before quantization, but "
            f"{checkpoint.folder} is 4-bit: give the 16-bit model as --base-model, or merge "
            "--onto nf4"
        )
    require_same_codes(checkpoint, adapter)


def plan_merge(checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> Plan:
    """What to do with each tensor, from headers alone, in the model's order.

    Raises:
        UserError: something of the adapter is not in the checkpoint or has another shape; all of
            it is named.
    """
    return _Planner(checkpoint, adapter, config).plan()


class _Planner:
    """What is known of checkpoint and adapter together, and what is wrong with that."""

    def __init__(self, checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> None:
        self.checkpoint, self.adapter, self.config = checkpoint, adapter, config
        model = skeleton(
            checkpoint.folder,
            task=adapter.task,
            labels=_labels(checkpoint, adapter),
            trust_remote_code=config.trust_remote_code,
        )
        quantized = quantized_layers(model, adapter.quantization)
        weights = {m: f"{m}.weight" for m in linear_layers(model)}
        self.linear = {m: disk_name(checkpoint, model, weight) for m, weight in weights.items()}
        # A weight is (out, in) but for Conv1D's and an embedding's, one from vocab to dim.
        self.transposed = {
            m: m in adapter.embeddings or adapter.fan_in_fan_out for m in adapter.pairs
        }
        self.transposed |= quantized
        self.layers = {m for m in quantized if f"{m}.weight" not in adapter.full_params}
        """quantized in training"""
        self.rounds = config.onto == "nf4" and not checkpoint.is_quantized
        """these go through their codes; those of a 4-bit base are as they were"""
        self.embedding, self.head = vocabulary(model)
        self.parted = is_tied(model) and adapter.unties(self.embedding, self.head)
        """the head was tied to the embedding, and is no longer"""
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        touched = sorted({*self.transposed, *adapter.rows}, key=lambda m: order.get(m, -1))
        params = [f"{m}.weight" for m in touched]
        params += [*adapter.full_params, *(f"{m}.bias" for m in adapter.bias_changes)]
        self.places = {param: disk_name(checkpoint, model, param) for param in params}
        """the checkpoint's name of each parameter that something is done to"""
        self.sources = {name: name for name in checkpoint.tensors}
        if self.parted:
            tied_to = disk_name(checkpoint, model, f"{self.embedding}.weight")
            self.places[f"{self.head}.weight"] = f"{self.head}.weight"
            self.sources[f"{self.head}.weight"] = tied_to or f"{self.head}.weight"
        self.faults: list[str] = []
        self.task = task_named(adapter.task)
        self.new: set[str] = set()
        """a classifier's parameters that are the adapter's, whatever the checkpoint has there"""
        self.of_classifier: dict[str, Any] = {}
        """what config.json says of it"""
        if self.task.trains_head:
            self._place_head(model)
        self.param_of = {place: param for param, place in self.places.items() if place}
        self.quant = adapter.quantization
        self.out_quant = replace(
            self.quant,
            quant_type="nf4",
            blocksize=config.blocksize or self.quant.blocksize,
            double_quant=self.quant.double_quant and config.double_quant,
        )
        self.out_dtype = nf4.DTYPES[_out_dtype(config, self.quant)]

    def plan(self) -> Plan:
        if self.adapter.parameters:
            raise UserError(
                f"adapter {self.adapter.folder} changes {', '.join(self.adapter.parameters)}, "
                "which stand otherwise in a checkpoint than in the model: load_adapter, "
                "merge_and_unload and save_pretrained instead"
            )
        self._find_missing()
        ops = [
            self._op(name, source) for name, source in self.sources.items() if self._is_own(name)
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
            ops,
            self.quant,
            self.out_quant,
            self.out_dtype,
            self.linear,
            changes,
            self.adapter.task,
        )

    def _place_head(self, model: Any) -> None:
        """The adapter's head takes the place of the checkpoint's, which may be another task's."""
        params = dict(model.named_parameters())
        of_head = {param for param in params if is_in(param, heads(model))}
        whole = params.keys() & self.adapter.full_params.keys()
        self.new = {param for param in whole if param in of_head or self.places[param] is None}
        for param in self.new:
            self.places[param] = place = self.places[param] or param
            self.sources.setdefault(place, place)
        lacks = [p for p in of_head - self.new if disk_name(self.checkpoint, model, p) is None]
        self.faults += [f"{param} is in neither of the two" for param in sorted(lacks)]
        for name in _of_other_heads(self.checkpoint, model):
            del self.sources[name]
        names = {str(i): label for i, label in model.config.id2label.items()}
        self.of_classifier = {
            "architectures": [type(model).__name__],
            "id2label": names,
            "label2id": {label: int(i) for i, label in names.items()},
        }
        if self.adapter.base.get("pad_token_id") is not None:
            self.of_classifier["pad_token_id"] = self.adapter.base["pad_token_id"]

    def _is_own(self, name: str) -> bool:
        """Not a part of the 4-bit record of another tensor."""
        weight = name.partition(".weight.")[0] + ".weight"
        return weight == name or not _is_packed(self.checkpoint, weight)

    def _find_missing(self) -> None:
        self.faults += self.adapter.missing(self.linear)
        untouched = self.layers - set(self.adapter.pairs)
        for param, place in self.places.items():
            if place is None and (self.rounds or param.removesuffix(".weight") not in untouched):
                self.faults.append(f"{param} is not in the checkpoint")
        if self.parted and self.adapter.rows:
            self.faults.append("it has trained token rows, and parts head from embedding")

    def _op(self, name: str, source: str) -> MergeOp:
        adapter, param = self.adapter, self.param_of.get(name)
        if param in self.new:
            shape = tuple(adapter.full_params[param].shape)
            return MergeOp(name, source, (Entry(name, self.out_dtype, shape),), param)
        header = self.checkpoint.tensors[source]
        module = param.removesuffix(".weight") if param and param.endswith(".weight") else None
        packed = _is_packed(self.checkpoint, source)
        shape = _packed_shape(self.checkpoint, source) if packed else header.shape
        floats = packed or header.dtype.is_floating_point
        if param in adapter.full_params:
            whole = tuple(adapter.full_params[param].shape)
            resizable = module in (self.embedding, self.head)
            if whole[resizable:] != shape[resizable:]:
                self.faults.append(f"{name} is {shape}, the adapter has it as {whole}")
            packed, shape, floats = False, whole, True
        transposed = module is not None and self.transposed.get(module, False)
        matrix = shape[::-1] if transposed and not packed else shape
        if len(shape) > 2 and module in adapter.pairs:  # a convolution
            matrix = (shape[0], math.prod(shape[1:]))
        if module in adapter.pairs and matrix != adapter.pairs[module].shape:
            wanted = adapter.pairs[module].shape
            self.faults.append(f"{name} is {matrix}, the adapter is for {wanted}")
        if module in adapter.rows and shape[1:] != adapter.rows[module][1].shape[1:]:
            rows = tuple(adapter.rows[module][1].shape)
            self.faults.append(f"{name} is {shape}, the adapter has rows of it as {rows}")
        is_layer = module in self.layers and not self.checkpoint.is_quantized
        in_4_bits = self.config.format == "nf4" and (packed or is_layer)
        if in_4_bits:
            layout = nf4.record_layout(matrix, self.out_quant)
            entries = [Entry(f"{name}.{s}" if s else name, *kind) for s, kind in layout.items()]
        else:
            dtype = self.out_dtype if floats else header.dtype
            entries = [Entry(name, dtype, matrix[::-1] if transposed else shape)]
        return MergeOp(
            name=name,
            source=source,
            entries=tuple(entries),
            param=param,
            module=module if module in adapter.pairs else None,
            round_trip=self.rounds and module in self.layers,
            packed=packed,
            transposed=transposed,
            in_4_bits=in_4_bits,
        )

    def _config_changes(self, ops: list[MergeOp]) -> dict[str, Any]:
        """For config.json, where head and embedding part or the vocabulary grew."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self.parted else {}
        ends = (f"{self.embedding}.weight", f"{self.head}.weight")
        sizes = {op.entries[0].shape[0] for op in ops if op.param in ends}
        if len(sizes) > 1:
            self.faults.append(f"embedding and output head have {sizes} rows, not one number")
        elif sizes and ends[0] in self.adapter.full_params:
            changes["vocab_size"] = sizes.pop()
        return changes | self.of_classifier


def _labels(checkpoint: Checkpoint, adapter: AdapterFile) -> tuple[str, ...]:
    """A classifier's labels, by the rows of its head where the adapter does not name them; none
    where those of the checkpoint's config.json hold."""
    if adapter.labels or not (task_named(adapter.task).trains_head and adapter.full_params):
        return adapter.labels
    count = min(tensor.shape[0] for tensor in adapter.full_params.values())
    if len(checkpoint.labels) == count:
        return ()
    return tuple(f"LABEL_{i}" for i in range(count))


def _of_other_heads(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """Tensors that stand beside the base model in a checkpoint, and that `model` has no use for."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        return []  # it was saved without a head
    own = {disk_name(checkpoint, model, name) for name in model.state_dict()}
    return [n for n in checkpoint.tensors if not n.startswith(prefix) and n not in own]


def _out_dtype(config: MergeConfig, quant: QuantConfig) -> str:
    """What is asked for; beside 4-bit codes, 16 bits as in training."""
    if config.format != "nf4":
        return config.format
    return "fp16" if quant.compute_dtype == "fp16" else "bf16"


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    return any(f"{name}{nf4.RECORD_MARK}{t}" in checkpoint.tensors for t in ("nf4", "fp4"))


def _packed_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    mark = next(n for n in checkpoint.tensors if n.startswith(f"{name}{nf4.RECORD_MARK}"))
    return tuple(unpack_tensor_to_dict(checkpoint.read(mark))["shape"])
