"""Fold a trained adapter into its base: plan, check, stream.

    merged = dequantize(quantize(W)) + scaling * B A      in fp32, then one cast

is, to rounding, the function that was trained: every quantized layer goes through the same 4-bit
codes as in training, also those without an adapter. `onto="original"` folds into the weights as
they were before quantization; the adapter never saw those, so that is another function.

`plan_merge` decides from file headers alone what happens to each tensor, and every shape is
checked before a byte is written. Then tensors go through one at a time, in fp32, into shards: no
model is built, and memory grows with the largest tensor, not with the model.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import Tensor

from qlora import nf4
from qlora.adapter_files import AdapterFile, read_adapter, require_same_base
from qlora.checkpoint import Checkpoint, disk_name, quantized_layers, resolve, skeleton
from qlora.config import MergeConfig, QuantConfig
from qlora.errors import UserError
from qlora.lora import delta_weight
from qlora.report import write_merge_card
from qlora.shards import Entry, parse_size, publishing, replace_text, require_new, write_shards
from qlora.verify import Verification, read_examples, verify_merge

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class MergeOp:
    """What happens to one tensor of the checkpoint."""

    entry: Entry
    """name, dtype and shape in the output"""
    module: str | None = None
    """the adapter's name of the layer, where one is folded in"""
    round_trip: bool = False
    """go through the 4-bit codes, as the weight did in training"""
    packed: bool = False
    """the checkpoint holds the codes themselves"""
    transposed: bool = False
    """the checkpoint's models keep this weight as (in, out)"""


def merge(config: MergeConfig) -> Path:
    """Write the merged checkpoint that `config` describes; returns its folder.

    Raises:
        UserError: adapter and base do not belong together, something is missing, or the output
            folder is in use. Then nothing is written.
    """
    output = Path(config.output_dir).expanduser()
    require_new(output)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU: use --device cpu")
    adapter = read_adapter(Path(config.adapter).expanduser())
    base_model = config.base_model or adapter.base_model
    if not base_model:
        raise UserError(f"adapter {config.adapter} names no base model: give --base-model")
    revision = adapter.revision if base_model == adapter.base_model else None
    checkpoint = Checkpoint(resolve(base_model, revision=revision))
    if not adapter.base:
        print("The adapter does not say how its base was quantized: taken as NF4, blocksize 64, ")
        print("double quantization, as transformers and PEFT load it for QLoRA.")
    quant = adapter.quantization
    check_base(checkpoint, adapter, config)
    ops = plan_merge(checkpoint, adapter, config, quant)
    _require_space(output, ops)
    examples = None
    if config.verify:  # read now: a wrong path should not wait for the merge
        examples = read_examples(config.verify, _tokenizer_folder(checkpoint, adapter))
    layers: dict[str, dict[str, float]] = {}
    with publishing(output) as partial:
        tensors = merged_tensors(checkpoint, adapter, ops, quant, config.device, layers)
        write_shards(
            partial,
            [op.entry for op in ops],
            tensors,
            max_bytes=parse_size(config.max_shard_size),
        )
        _copy_companions(checkpoint, adapter, partial, nf4.DTYPES[config.format])
        _write_report(partial, config, base_model, quant, layers, None)
    _print_summary(config, output, ops, layers)
    if examples:
        verified = verify_merge(
            adapter,
            str(checkpoint.folder),
            output,
            examples,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
        _write_report(output, config, base_model, quant, layers, verified)
        print(verified.table())
    return output


# ---- plan and check ----


def check_base(checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig) -> None:
    """Refuse a base that is not the one the adapter was trained on."""
    require_same_base(adapter, checkpoint.fingerprint, str(checkpoint.folder))
    if checkpoint.is_quantized and config.onto == "original":
        raise UserError(
            f"--onto original wants the weights from before quantization, but {checkpoint.folder} "
            "is 4-bit: give the 16-bit model as --base-model, or merge --onto nf4"
        )


def plan_merge(
    checkpoint: Checkpoint, adapter: AdapterFile, config: MergeConfig, quant: QuantConfig
) -> list[MergeOp]:
    """What to do with each tensor, from headers alone.

    Raises:
        UserError: an adapted layer is not in the checkpoint or has another shape; all are named.
    """
    model = skeleton(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    layers = quantized_layers(model, quant)
    rounds = config.onto == "nf4" and not checkpoint.is_quantized  # a 4-bit base is as it was
    modules = {**dict.fromkeys(adapter.pairs, adapter.fan_in_fan_out), **layers}
    names = {m: disk_name(checkpoint, model, f"{m}.weight") for m in modules}
    needed = modules if rounds else adapter.pairs
    faults = [f"{m} is not in the checkpoint" for m in needed if names[m] is None]
    module_of = {name: m for m, name in names.items() if name is not None}
    out_dtype = nf4.DTYPES[config.format]
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
        dtype = out_dtype if header.dtype.is_floating_point or packed else header.dtype
        ops.append(
            MergeOp(
                entry=Entry(name, dtype, matrix[::-1] if transposed else shape),
                module=module if module in adapter.pairs else None,
                round_trip=rounds and module in layers,
                packed=packed,
                transposed=transposed,
            )
        )
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" * (len(faults) > 5))
        raise UserError(
            f"adapter {adapter.folder} does not fit {checkpoint.folder}: {shown}. "
            "Give the base it was trained on as --base-model"
        )
    return ops


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    return any(f"{name}{nf4.RECORD_MARK}{t}" in checkpoint.tensors for t in ("nf4", "fp4"))


def _packed_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    mark = next(n for n in checkpoint.tensors if n.startswith(f"{name}{nf4.RECORD_MARK}"))
    return tuple(unpack_tensor_to_dict(checkpoint.read(mark))["shape"])


def _require_space(output: Path, ops: list[MergeOp]) -> None:
    needed = sum(op.entry.nbytes for op in ops)
    parent = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free: "
            "make room or give another --output-dir"
        )


# ---- apply ----


def merged_tensors(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    ops: list[MergeOp],
    quant: QuantConfig,
    device: str,
    layers: dict[str, dict[str, float]],
) -> Iterator[Tensor]:
    """The output's tensors in the order of `ops`; notes norms of each adapted layer in `layers`."""
    for op in ops:
        if not (op.module or op.round_trip or op.packed):
            yield _cast(checkpoint.read(op.entry.name), op.entry)
            continue
        weight = _base_weight(checkpoint, op, quant, device)
        if op.module:
            lora_A, lora_B = (matrix.to(device) for matrix in adapter.pairs[op.module])
            delta = delta_weight(lora_A, lora_B, adapter.config.scaling)
            layers[op.module] = _norms(weight, delta)
            weight.add_(delta)
        yield _cast(weight.T if op.transposed else weight, op.entry)


def _base_weight(checkpoint: Checkpoint, op: MergeOp, quant: QuantConfig, device: str) -> Tensor:
    """The weight (out, in) to fold into, fp32, on `device`."""
    if op.packed:
        record = checkpoint.record(op.entry.name)
        assert record is not None
        return nf4.dequantize(nf4.from_record(record, device))
    weight = checkpoint.read(op.entry.name).to(device)
    if op.transposed:
        weight = weight.T
    if not op.round_trip:
        return weight.float()
    # Loading casts to the compute dtype before it quantizes; of a bf16 checkpoint this is no cast.
    return nf4.round_trip(weight.to(nf4.DTYPES.get(quant.compute_dtype, weight.dtype)), quant)


def _norms(weight: Tensor, delta: Tensor) -> dict[str, float]:
    weight_norm, delta_norm = float(weight.norm()), float(delta.norm())
    return {
        "weight_norm": weight_norm,
        "delta_norm": delta_norm,
        "delta_over_weight": delta_norm / weight_norm if weight_norm else math.inf,
    }


def _cast(tensor: Tensor, entry: Entry) -> Tensor:
    out = tensor.to("cpu", entry.dtype)
    if out.is_floating_point() and not torch.isfinite(out).all():
        raise UserError(
            f"{entry.name} does not fit {entry.dtype}: it holds NaN, or values beyond its range. "
            "Use --format bf16 or fp32; if the base itself holds NaN, download it again"
        )
    return out


# ---- what goes beside the weights ----


def _copy_companions(
    checkpoint: Checkpoint, adapter: AdapterFile, output: Path, dtype: torch.dtype
) -> None:
    """config.json without its quantization, and the tokenizer's files byte for byte."""
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    source = _tokenizer_folder(checkpoint, adapter)
    for name in TOKENIZER_FILES:
        file = source / name
        if file.is_file():
            shutil.copyfile(file, output / name)
    for file in [checkpoint.folder / "generation_config.json", *checkpoint.folder.glob("*.py")]:
        if file.is_file():
            shutil.copyfile(file, output / file.name)


def _tokenizer_folder(checkpoint: Checkpoint, adapter: AdapterFile) -> Path:
    """Where training left the tokenizer it used, else the base's own."""
    has_one = (adapter.folder / "tokenizer_config.json").is_file()
    return adapter.folder if has_one else checkpoint.folder


def _write_report(
    folder: Path,
    config: MergeConfig,
    base_model: str,
    quant: QuantConfig,
    layers: Mapping[str, Mapping[str, float]],
    verified: Verification | None,
) -> None:
    report: dict[str, Any] = {
        "adapter": config.adapter,
        "base_model": base_model,
        "onto": config.onto,
        "format": config.format,
        "quant_type": quant.quant_type,
        "blocksize": quant.blocksize,
        "double_quant": quant.double_quant,
        "layers": layers,
        "verify": asdict(verified) if verified else None,
    }
    replace_text(folder / "merge_report.json", json.dumps(report, indent=2) + "\n")
    write_merge_card(folder, report)


def _print_summary(
    config: MergeConfig,
    output: Path,
    ops: list[MergeOp],
    layers: Mapping[str, Mapping[str, float]],
) -> None:
    ratios = sorted(layer["delta_over_weight"] for layer in layers.values())
    onto = "the dequantized 4-bit base" if config.onto == "nf4" else "the original weights"
    size = sum(op.entry.nbytes for op in ops)
    print(f"Merged {len(layers)} layers onto {onto}, {config.format}, {size / 1e9:.2f} GB.")
    print(f"The adapter changes a weight by {ratios[len(ratios) // 2]:.2%} of its norm (median).")
    print(f"\nWritten to {output}. Use it:")
    print(f'  AutoModelForCausalLM.from_pretrained("{output}")      or      vllm serve {output}')
