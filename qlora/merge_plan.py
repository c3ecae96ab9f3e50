"""What a merge will do, from file headers alone: each name, dtype and shape, before it is read.

The plan runs in the model's order, in which calibration gets to know the layers.
"""

from dataclasses import dataclass, replace

import torch
from bitsandbytes.utils import unpack_tensor_to_dict

from qlora import nf4
from qlora.adapter_files import AdapterFile, require_same_base
from qlora.checkpoint import Checkpoint, disk_name, linear_layers, quantized_layers, skeleton
from qlora.config import MergeConfig, QuantConfig
from qlora.errors import UserError
from qlora.shards import Entry


@dataclass(frozen=True)
class MergeOp:
    """What happens to one weight of the checkpoint."""

    name: str
    entries: tuple[Entry, ...]
    """what is written for it: one tensor, or those of a 4-bit record"""
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
    unquantized: list[str]
    """linear layers that stay out of a 4-bit output"""

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


def plan_merge(checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> Plan:
    """What to do with each tensor, from headers alone, in the model's order.

    Raises:
        UserError: an adapted layer is not in the checkpoint or has another shape; all are named.
    """
    quant = adapter.quantization
    model = skeleton(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    layers = quantized_layers(model, quant)
    rounds = config.onto == "nf4" and not checkpoint.is_quantized  # a 4-bit base is as it was
    modules = {**dict.fromkeys(adapter.pairs, adapter.fan_in_fan_out), **layers}
    names = {m: disk_name(checkpoint, model, f"{m}.weight") for m in modules}
    needed = modules if rounds else adapter.pairs
    faults = [f"{m} is not in the checkpoint" for m in needed if names[m] is None]
    module_of = {name: m for m, name in names.items() if name is not None}
    to_4_bits = config.format == "nf4"
    out_quant = replace(
        quant,
        quant_type="nf4",
        blocksize=config.blocksize or quant.blocksize,
        double_quant=quant.double_quant and config.double_quant,
    )
    out_dtype = nf4.DTYPES[_out_dtype(config, quant)]
    ops = []
    for name, header in checkpoint.tensors.items():
        weight = name.partition(".weight.")[0] + ".weight"
        if weight != name and _is_packed(checkpoint, weight):
            continue  # a part of the 4-bit record of `weight`
        packed = _is_packed(checkpoint, name)
        shape = _packed_shape(checkpoint, name) if packed else header.shape
        module = module_of.get(name)
        transposed = module is not None and modules[module]
        matrix = shape[::-1] if transposed and not packed else shape
        if module in adapter.pairs:
            lora_A, lora_B = adapter.pairs[module]
            wanted = (lora_B.shape[0], lora_A.shape[1])
            if matrix != wanted:
                faults.append(f"{name} is {matrix}, the adapter is for {wanted}")
        in_4_bits = to_4_bits and (packed or (module in layers and not checkpoint.is_quantized))
        dtype = out_dtype if header.dtype.is_floating_point or packed else header.dtype
        if in_4_bits:
            layout = nf4.record_layout(matrix, out_quant)
            entries = [Entry(f"{name}.{s}" if s else name, *kind) for s, kind in layout.items()]
        else:
            entries = [Entry(name, dtype, matrix[::-1] if transposed else shape)]
        ops.append(
            MergeOp(
                name=name,
                entries=tuple(entries),
                module=module if module in adapter.pairs else None,
                round_trip=rounds and module in layers,
                packed=packed,
                transposed=transposed,
                in_4_bits=in_4_bits,
            )
        )
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" * (len(faults) > 5))
        raise UserError(
            f"adapter {adapter.folder} does not fit {checkpoint.folder}: {shown}. "
            "Give the base it was trained on as --base-model"
        )
    place = {name: i for i, name in enumerate(names.values())}
    ops.sort(key=lambda op: place.get(op.name, -1))
    coded = {op.name for op in ops if op.in_4_bits}
    kept_whole = [n for n in linear_layers(model) if names.get(n) not in coded]
    return Plan(ops, quant, out_quant, out_dtype, kept_whole)


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
