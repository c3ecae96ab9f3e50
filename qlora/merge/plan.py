"""The plan of a merge, from file headers alone: each tensor's name, dtype, shape and computation.

Operations are in the order of the model's layers, in which calibration collects their moments.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from qlora.adapters.format import (
    AdapterFile,
    raise_faults,
    require_fused_experts,
    require_one_size,
    require_same_base,
    require_same_codes,
    with_tied,
)
from qlora.base.checkpoint import (
    Checkpoint,
    disk_name,
    disk_names,
    fp32_names,
    linear_layers,
    quantized_layers,
    skeleton,
    tied_on_disk,
)
from qlora.base.load import bnb_layers, require_plain_layers, require_unquantized
from qlora.base.modules import (
    can_untie,
    followers,
    heads,
    is_in,
    matrix_shape,
    vocabulary,
    was_conv1d,
)
from qlora.base.shards import Entry
from qlora.config import MergeConfig, QuantConfig
from qlora.config.tasks import task_named
from qlora.errors import UserError, require, some
from qlora.merge import int4
from qlora.merge.codecs import Codec, Int4Codec, NF4Codec
from qlora.ops import nf4


class Kind(Enum):
    """The base that an operation adds B A to."""

    COPY = "none: the checkpoint's tensor, or the adapter's own, with one cast"
    WEIGHT = "the checkpoint's weight"
    ROUND_TRIP = "the weight after quantization to 4 bits, as in training"
    PACKED = "the checkpoint's 4-bit codes"


@dataclass(frozen=True)
class MergeOp:
    """How one weight of the output is computed."""

    name: str
    source: str  # the tensor that is read: `name`, or the embedding for a head that was tied
    entries: tuple[Entry, ...]  # the tensors to write: one, or those of the codec
    kind: Kind = Kind.COPY
    param: str | None = None  # the adapter's name of it, if the adapter or quantization changes it
    module: str | None = None  # the adapter's name of the layer, if it has A and B
    transposed: bool = False  # whether the checkpoint stores the weight as (in, out)
    in_4_bits: bool = False  # whether it is written as 4-bit codes


@dataclass(frozen=True)
class Plan:
    """The operations of a merge and the output's formats."""

    ops: list[MergeOp]
    quant: QuantConfig  # of the base in training
    codec: Codec | None  # of a 4-bit output
    out_dtype: torch.dtype  # of tensors that are not written as codes
    dense: list[str]  # the linear layers that are not written as codes
    dense_on_disk: list[str]  # all matrices that are not, but embeddings, by names on disk
    notes: list[str]  # to print
    config_changes: dict[str, Any]  # entries of the base's config.json that the merge changes
    task: str
    tied: list[list[str]]  # names of modules that share one weight of the base
    adapter: AdapterFile  # with a resized embedding also for the head that is tied to it

    @property
    def in_4_bits(self) -> set[str]:
        """The weights that are written as 4-bit codes."""
        return {op.name for op in self.ops if op.in_4_bits}

    @property
    def entries(self) -> list[Entry]:
        return [entry for op in self.ops for entry in op.entries]


def as_trained(
    config: MergeConfig, adapter: AdapterFile, checkpoint: Checkpoint, base_model: str
) -> MergeConfig:
    """`config` with `trained_on` and `onto`, as given or else by what the adapter's files tell.

    Raises:
        UserError: the files tell another base than `trained_on`, or it is not to be had.
    """
    if config.trained_on == "16bit":
        quant = adapter.quantization
        was = f"adapter {adapter.folder} was trained on {quant.quant_type.upper()}, its files tell"
        fix = "leave --trained-on 16bit out, or merge --onto original"
        require(not adapter.knows_quantization, f"{was}: {fix}")
        fault = f"--trained-on 16bit needs the weights in 16 bits, {checkpoint.folder} is 4-bit"
        require(not checkpoint.is_quantized, f"{fault}: give the 16-bit model as --base-model")
    elif not adapter.knows_quantization:
        print(
            "The adapter does not record how its base was quantized: NF4, blocksize 64 and double"
        )
        print("quantization are assumed, transformers' and PEFT's settings for QLoRA.")
        names = (adapter.base_model or "", base_model)
        is_4_bit = checkpoint.is_quantized or any(n.lower().endswith("bnb-4bit") for n in names)
        if config.trained_on is None and not is_4_bit:
            print("If it was trained on the base in 16 bits, give --trained-on 16bit.")
    trained_on = config.trained_on or "nf4"
    onto = config.onto or ("original" if trained_on == "16bit" else "nf4")
    return replace(config, trained_on=trained_on, onto=onto)


def plan_merge(checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> Plan:
    """The operation for each tensor, from headers alone, in the model's order.

    Raises:
        UserError: the adapter was not trained on this base; lists all of the adapter that the
            checkpoint lacks or has in another shape.
    """
    require_same_base(adapter, checkpoint.fingerprint, str(checkpoint.folder))
    if checkpoint.is_quantized and config.onto != "nf4":
        raise UserError(
            f"--onto {config.onto} needs the weights from before quantization, but "
            f"{checkpoint.folder} is 4-bit: give the 16-bit model as --base-model, or merge "
            "--onto nf4"
        )
    require_unquantized(checkpoint)
    require_same_codes(checkpoint, adapter)
    if adapter.parameters:
        raise UserError(
            f"adapter {adapter.folder} changes {', '.join(adapter.parameters)}, which checkpoints "
            "store in another form: use load_adapter, merge_and_unload and save_pretrained instead"
        )
    planner = _Planner(checkpoint, adapter, config)
    if planner.codec:
        what = f"--format {config.format}"
        fit = quantized_layers(planner.model, adapter.quantization)
        require_plain_layers(planner.model, fit, what, "use --format bf16")
    return planner.plan()


class _Planner:
    """Matches checkpoint and adapter by the model's names; collects misfits in `faults`."""

    def __init__(self, checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> None:
        self.checkpoint, self.adapter, self.config = checkpoint, adapter, config
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.quant = adapter.quantization
        self.task, labels = task_named(adapter.task), adapter.labels
        if self.task.trains_head and adapter.full_params and not labels:  # PEFT saves none
            count = min(len(tensor) for tensor in adapter.full_params.values())
            if len(checkpoint.labels) != count:
                labels = tuple(f"LABEL_{i}" for i in range(count))
        trusted = config.trust_remote_code
        self.model: Any = skeleton(
            checkpoint.folder, task=self.task, labels=labels, trust_remote_code=trusted
        )
        self.tied = tied_on_disk(checkpoint, self.model)
        tied = {name for group in self.tied for name in group}
        rows = {name: len(self.model.get_parameter(f"{name}.weight")) for name in tied}
        self.adapter = adapter = with_tied(adapter, rows, self.tied)
        fit = quantized_layers(self.model, self.quant)
        # of layers that training quantized, PEFT's by transformers
        is_conv1d = fit if adapter.knows_quantization else bnb_layers(self.model)
        self.quantized = {m for m in is_conv1d if f"{m}.weight" not in adapter.full_params}
        self.in_16_bits = self.quantized - fit.keys()  # those of them that the codec cannot hold
        self.codec = self._codec()
        plain = "bf16" if config.is_gguf else config.format  # a GGUF file is made of that
        self.out_dtype = self.codec.dtype if self.codec else nf4.DTYPES[plain]
        names = disk_names(checkpoint, self.model).same
        in_fp32 = fp32_names(self.model, self.out_dtype)  # by the model's names
        self.in_fp32 = {place for name, place in names.items() if name in in_fp32}
        # whether these are quantized and dequantized; a 4-bit base already holds the codes
        self.round_trips = config.onto == "nf4" and not checkpoint.is_quantized
        # (in, out) on disk: weights of Conv1D, and of an embedding as a layer from vocab to dim
        conv1d = {name for name, module in self.model.named_modules() if was_conv1d(module)}
        pairs = {m: m in adapter.embeddings or m in conv1d for m in adapter.pairs}
        self.transposed = pairs | is_conv1d

        # 4-bit weight of the checkpoint -> quant_type, blocksize, shape (out, in), and more
        self.records = checkpoint.records
        # tensor of the output -> tensor of the checkpoint; the rest of a record has no entry
        self.sources = {
            name: name
            for name in checkpoint.tensors
            if name.partition(".weight.")[0] + ".weight" not in self.records
        }
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        modules = sorted({*self.transposed, *adapter.rows}, key=lambda m: order.get(m, -1))
        params = [*(f"{m}.weight" for m in modules), *adapter.full_params]
        params += [f"{m}.bias" for m in adapter.bias_changes]
        # parameter that changes -> the checkpoint's name of it, None where it has none
        self.places = {param: disk_name(checkpoint, self.model, param) for param in params}
        self.embedding, self.head = vocabulary(self.model)
        # parameter -> the adapter's name of what it becomes: another one, where it follows that
        self.changes = {param: param for param in params}
        self.unties = False
        self.classifier: set[str] = set()  # parameters of its head, which the adapter brings

    def plan(self) -> Plan:
        checkpoint, adapter, model = self.checkpoint, self.adapter, self.model
        require_fused_experts(adapter, dict(model.named_modules()))
        self._follow()
        for group in self.tied:
            self._tie_or_untie([f"{module}.weight" for module in group])
        if self.task.trains_head:
            self._replace_head()
        linear = {m: disk_name(checkpoint, model, f"{m}.weight") for m in linear_layers(model)}
        self.faults += adapter.missing(linear)
        untouched = self.quantized - set(adapter.pairs)
        for param, place in self.places.items():
            may_lack = not self.round_trips and param.removesuffix(".weight") in untouched
            if place is None and not may_lack:
                self.faults.append(f"{param} is not in the checkpoint")
        changes = self.changes
        params = {place: changes.get(p, p) for p, place in self.places.items() if place}
        ops = [self._op(name, source, params.get(name)) for name, source in self.sources.items()]
        entries = self._config_changes(ops)
        raise_faults(
            f"adapter {adapter.folder} does not fit {checkpoint.folder}",
            self.faults,
            fix="Give the base it was trained on as --base-model",
        )
        order = {place: i for i, place in enumerate(self.places.values())}
        ops.sort(key=lambda op: order.get(op.name, -1))
        formats = self.quant, self.codec, self.out_dtype
        dense = self._dense(linear, ops)
        return Plan(ops, *formats, *dense, self.notes, entries, adapter.task, self.tied, adapter)

    def _codec(self) -> Codec | None:
        """How the layers that training quantized are written, if in 4 bits."""
        config, quant, model = self.config, self.quant, self.model
        if config.format == "nf4":
            half = "fp16" if quant.compute_dtype == "fp16" else "bf16"  # beside 4-bit codes
            out_quant = replace(
                quant,
                quant_type="nf4",
                blocksize=config.blocksize or quant.blocksize,
                double_quant=quant.double_quant and config.double_quant,
            )
            return NF4Codec(out_quant, nf4.DTYPES[half])
        if config.format != "int4":
            return None
        in_4_bits = self.quantized - self.in_16_bits
        layers = {n: layer for n, layer in linear_layers(model).items() if n in in_4_bits}
        columns = {name: matrix_shape(layer)[1] for name, layer in layers.items()}
        fault = "--format int4 needs nn.Linear layers of"
        size = None if any(map(was_conv1d, layers.values())) else int4.group_size(columns.values())
        wide = " or ".join(str(n) for n in int4.SIZES)
        require(size is not None, f"{fault} a multiple of {wide} columns: use --format nf4")
        assert size
        if size < int4.SIZES[0]:
            name = next(
                n for n, count in columns.items() if int4.fits(count) and count % (2 * size)
            )
            odd = f"{name} has {columns[name]} columns"
            self.notes.append(f"int4 with groups of {size}: {odd}, no multiple of {2 * size}.")
        if narrow := [name for name, count in columns.items() if not int4.fits(count)]:
            self.notes.append(f"In 16 bits, as columns are no multiple of 32: {some(narrow)}")
            self.in_16_bits |= set(narrow)
        return Int4Codec(int4.grid_of(size, symmetric=config.symmetric))

    def _dense(
        self, linear: dict[str, str | None], ops: list[MergeOp]
    ) -> tuple[list[str], list[str]]:
        """The linear layers without codes; and all matrices that are not embeddings, on disk:
        also the experts and routers that a server makes linear layers of."""
        in_codes = {op.name for op in ops if op.in_4_bits}
        embeddings = [
            n for n, module in self.model.named_modules() if isinstance(module, nn.Embedding)
        ]
        names = disk_names(self.checkpoint, self.model).same
        left_out = in_codes | {names.get(f"{name}.weight", "") for name in embeddings}
        on_disk = [
            op.name.removesuffix(".weight")
            for op in ops
            if op.name.endswith(".weight") and op.name not in left_out
            if len(op.entries[0].shape) == 2
        ]
        return [module for module, name in linear.items() if name not in in_codes], on_disk

    def _follow(self) -> None:
        """The parameters that follow a changed embedding, as in a live model."""
        adapter, model, modules = self.adapter, self.model, dict(self.model.named_modules())
        for param in list(self.changes):
            module = param.removesuffix(".weight")
            has_rows = module in adapter.rows
            for peer in followers(model, modules, self.tied, module, rows=has_rows):
                follower = f"{peer}.weight"
                if has_rows and self._is_equal(peer, module):
                    self.changes.pop(follower, None)
                if has_rows and follower in self.changes:
                    self.faults.append(f"it has token rows of {module}, and changes {peer} apart")
                self.changes.setdefault(follower, param)
                place = disk_name(self.checkpoint, model, follower)
                self.places.setdefault(follower, place)

    def _is_equal(self, module: str, other: str) -> bool:
        """Whether the adapter has the same whole weight and token rows of both, and no A and B."""
        full, rows = self.adapter.full_params, self.adapter.rows
        pairs = [(full.get(f"{module}.weight"), full.get(f"{other}.weight"))]
        pairs += zip(rows.get(module, ()), rows.get(other, ()), strict=False)
        same = [
            one is two or (one is not None and two is not None and torch.equal(one, two))
            for one, two in pairs
        ]
        return all(same) and module not in self.adapter.pairs

    def _tie_or_untie(self, params: list[str]) -> None:
        """Write one weight for `params`, which share one in the base; or one for each, where the
        adapter changes them differently."""
        changes = [self.changes.get(param) for param in params]
        full, modules = self.adapter.full_params, [p.removesuffix(".weight") for p in params]
        is_same = params[0] in full and not {*modules} & {*self.adapter.pairs, *self.adapter.rows}
        is_same = is_same and all(self._is_equal(module, modules[0]) for module in modules)
        if is_same or len({*changes}) == 1:
            for param in params:
                if self.places.get(param) is None:
                    self.places.pop(param, None)
            return
        self.unties = True
        names = disk_names(self.checkpoint, self.model)
        on_disk = [names.same[param] for param in params if param in names.same]
        for param in params if on_disk else ():
            self.places[param] = place = names.same.get(param) or names.new(param)
            self.sources.setdefault(place, on_disk[0])

    def _replace_head(self) -> None:
        """Use the adapter's head in place of the checkpoint's, which may be another task's."""
        checkpoint, model, full_params = self.checkpoint, self.model, self.adapter.full_params
        params = [param for param, _ in model.named_parameters()]
        of_head = {param for param in params if is_in(param, heads(model))}
        full = full_params.keys() & params
        self.classifier = {p for p in full if p in of_head or self.places.get(p) is None}
        for param in self.classifier:
            self.places[param] = place = self.places.get(param) or param
            self.sources.setdefault(place, place)
        for param in sorted(of_head - self.classifier):
            if not disk_name(checkpoint, model, param):
                self.faults.append(f"{param} is in neither of the two")
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if any(name.startswith(prefix) for name in checkpoint.tensors):  # else saved without a head
            used = {disk_name(checkpoint, model, name) for name in model.state_dict()}
            for name in checkpoint.tensors:
                if not name.startswith(prefix) and name not in used:
                    self.sources.pop(name, None)

    def _op(self, name: str, source: str, param: str | None) -> MergeOp:
        adapter = self.adapter
        if param in self.classifier:
            shape = tuple(adapter.full_params[param].shape)
            return MergeOp(name, source, (Entry(name, self.out_dtype, shape),), param=param)
        header, record = self.checkpoint.tensors[source], self.records.get(source, {})
        module = param.removesuffix(".weight") if param and param.endswith(".weight") else None
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
        if module in adapter.pairs:
            if len(shape) > 2:  # of a convolution: (out, in * kernel)
                matrix = (shape[0], math.prod(shape[1:]))
            if matrix != (wanted := adapter.pairs[module].shape):
                self.faults.append(f"{name} is {matrix}, the adapter is for {wanted}")
        if module in adapter.rows and shape[1:] != adapter.rows[module][1].shape[1:]:
            rows = tuple(adapter.rows[module][1].shape)
            self.faults.append(f"{name} is {shape}, the adapter has rows of it as {rows}")

        quantized = module in self.quantized and not self.checkpoint.is_quantized
        in_4_bits = bool(record) or quantized
        in_4_bits = self.codec is not None and in_4_bits and module not in self.in_16_bits
        kind = Kind.WEIGHT if module in adapter.pairs or in_4_bits else Kind.COPY
        if record:
            kind = Kind.PACKED
        elif self.round_trips and module in self.quantized:
            kind = Kind.ROUND_TRIP
        if in_4_bits and self.codec:
            layout = self.codec.layout(matrix)
            entries = [Entry(f"{name}{suffix}", *tensor) for suffix, tensor in layout.items()]
        else:
            cast_to = torch.float32 if source in self.in_fp32 else self.out_dtype
            dtype = cast_to if is_float else header.dtype
            entries = [Entry(name, dtype, matrix[::-1] if transposed else shape)]
        layer = module if module in adapter.pairs else None
        return MergeOp(name, source, tuple(entries), kind, param, layer, transposed, in_4_bits)

    def _config_changes(self, ops: list[MergeOp]) -> dict[str, Any]:
        """Entries of config.json for an untied head, a grown vocabulary and a classifier."""
        unties = self.unties and can_untie(self.model.config)
        changes: dict[str, Any] = {"tie_word_embeddings": False} if unties else {}
        ends = [f"{module}.weight" for module in (self.embedding, self.head) if module]
        if self.adapter.full_params.keys() & ends:
            places = {
                self.places.get(end) or disk_name(self.checkpoint, self.model, end): end
                for end in ends
            }
            rows = {op.name: op.entries[0].shape[0] for op in ops if op.name in places}
            sizes = {str(places[name]).removesuffix(".weight"): size for name, size in rows.items()}
            # of some families the two differ, such as Mllama's
            if sizes != {name: len(self.model.get_parameter(f"{name}.weight")) for name in sizes}:
                require_one_size(self.adapter, sizes, str(self.checkpoint.folder))
                changes["vocab_size"] = next(iter(sizes.values()))
        if self.task.trains_head:
            names = {str(i): label for i, label in self.model.config.id2label.items()}
            changes["architectures"] = [type(self.model).__name__]
            changes["id2label"] = names
            changes["label2id"] = {label: int(i) for i, label in names.items()}
            if self.adapter.base.get("pad_token_id") is not None:
                changes["pad_token_id"] = self.adapter.base["pad_token_id"]
        return changes
