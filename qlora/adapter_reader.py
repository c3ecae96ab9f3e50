"""Read an adapter's files: strictly, and whatever PEFT's LoRA can put into them.

    <module>.lora_A.weight (r, in), lora_B.weight (out, r)        a linear layer's change
    <module>.lora_magnitude_vector (out,)                         DoRA's magnitudes beside it
    <module>.lora_B.bias (out,)                                   lora_bias, added to the bias
    <module>.lora_embedding_A (r, vocab), lora_embedding_B (dim, r)      an embedding's change
    <module>.token_adapter.trainable_tokens_delta (n, dim)        rows of an embedding, anew
    <module>.weight, .bias                                        trained in full

each after the prefix `base_model.model.`. Every missing, unexpected, misshapen or non-finite tensor
is named, all at once (PEFT warns or stays silent), and a config that asks for what is not
understood is refused by name. Pickled adapters (adapter_model.bin) are not opened.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.lora import Factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    "token_adapter.trainable_tokens_delta": "rows",
}
VOCABULARY = ("embed_tokens", "lm_head")  # PEFT saves these whole where they were resized
# Inits that change the base weights, so that the adapter is right only over the changed base.
REBASING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Keys of PEFT's config that are read here, or that change nothing about what was saved. Any other
# that is set asks for what is not there.
UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: tensors as stored, under the model's own names."""

    folder: Path
    config: LoraConfig
    pairs: dict[str, Factors]
    """of each adapted module: a linear layer, or an embedding as one from vocab to dim"""
    base_model: str | None
    embeddings: frozenset[str] = frozenset()
    """those of `pairs` that are embeddings"""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """parameters trained in full"""
    bias_changes: dict[str, Tensor] = field(default_factory=dict)
    """what is added to a module's bias (out,)"""
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """of an embedding: ids (n,) and the rows (n, dim) that take their place"""
    fan_in_fan_out: bool = False
    revision: str | None = None
    base: dict[str, Any] = field(default_factory=dict)
    """How its base was quantized, and the base's fingerprint; empty for adapters of others."""

    @property
    def quantization(self) -> QuantConfig:
        """How the base was quantized in training; QLoRA's defaults where the file does not say."""
        if not self.base:
            return QuantConfig()
        return QuantConfig(
            quant_type=self.base["quant_type"],
            blocksize=self.base["blocksize"],
            double_quant=self.base["double_quant"],
            compute_dtype=self.base["compute_dtype"],
            skip_modules=tuple(self.base["skip_modules"]),
        )

    def parts(self, embedding: str | None, head: str | None) -> bool:
        """Whether an embedding and an output head that were one are two with this adapter."""
        if any(m in self.pairs for m in (embedding, head)):
            return True
        own = [self.whole.get(f"{m}.weight") for m in (embedding, head)]
        if own[0] is None or own[1] is None:
            return own[0] is not own[1]
        return not torch.equal(own[0], own[1])

    @property
    def extras(self) -> list[str]:
        """What it holds beside A and B of linear layers, in words."""
        found = {
            "DoRA's magnitudes": any(f.magnitude is not None for f in self.pairs.values()),
            "embeddings": bool(self.embeddings),
            "parameters trained in full": bool(self.whole),
            "biases": bool(self.bias_changes),
            "trained token rows": bool(self.rows),
        }
        return [name for name, is_there in found.items() if is_there]


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read and check an adapter's two files.

    Raises:
        UserError: a file is missing or damaged, the config asks for what is not supported, or
            tensors are missing, unexpected, misshapen or not finite; all offenders are named.
    """
    folder = Path(folder).expanduser()
    values = _read_config(folder)
    config = _lora_config(values, folder)
    tensors, metadata = _read_tensors(folder)
    parts, whole, faults = _sort(tensors, values)
    pairs, embeddings = _pair_up(parts, values, faults)
    bias_changes, rows = _others(parts, pairs, values, faults)
    if not (parts or whole):
        faults.append("no lora_A or lora_B tensor")
    raise_faults(
        f"{folder / WEIGHTS}", faults, mend="Save the adapter again, or take an earlier checkpoint"
    )
    return AdapterFile(
        folder=folder,
        config=config,
        pairs=pairs,
        base_model=values.get("base_model_name_or_path"),
        embeddings=embeddings,
        whole=whole,
        bias_changes=bias_changes,
        rows=rows,
        revision=values.get("revision"),
        fan_in_fan_out=bool(values.get("fan_in_fan_out")),
        base=_read_base_record(metadata, folder),
    )


def combine(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> AdapterFile:
    """One adapter whose change is the weighted sum of theirs: sum of w * scaling * B A, exactly.

    A's are stacked and B's stand side by side, so the ranks add up.

    Raises:
        UserError: they were trained on different bases, or hold more than A and B.
    """
    first = adapters[0]
    if len(adapters) == 1 and tuple(weights) == (1.0,):
        return first
    for adapter in adapters:
        more = [what for what in adapter.extras if what != "embeddings"]
        if more:
            raise UserError(
                f"{adapter.folder} holds {' and '.join(more)}, of which no weighted sum is made: "
                "merge it alone, without a weight"
            )
        if (adapter.base, adapter.fan_in_fan_out) != (first.base, first.fan_in_fan_out):
            raise UserError(
                f"{adapter.folder} and {first.folder} were trained on different bases, or on one "
                "that was quantized differently: they cannot be merged together"
            )
    pairs = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        found = [
            (weight * factors.scaling, factors)
            for adapter, weight in zip(adapters, weights, strict=True)
            if (factors := adapter.pairs.get(name))
        ]
        shapes = {(f.lora_B.shape[0], f.lora_A.shape[1]) for _, f in found}
        if len(shapes) > 1:
            raise UserError(f"{name} has the shapes {shapes} in these adapters: they do not fit")
        pairs[name] = Factors(
            torch.cat([factors.lora_A.float() for _, factors in found]),
            torch.cat([scaling * factors.lora_B.float() for scaling, factors in found], dim=1),
            1.0,
        )
    embeddings = frozenset().union(*(adapter.embeddings for adapter in adapters))
    return replace(first, pairs=pairs, embeddings=embeddings)


def require_same_base(adapter: AdapterFile, fingerprint: str | None, what: str) -> None:
    """Refuse a base whose fingerprint is not the one the adapter remembers, if both are known."""
    wanted = adapter.base.get("fingerprint")
    if wanted and fingerprint and wanted != fingerprint:
        raise UserError(
            f"adapter {adapter.folder} belongs to another base: it was trained on "
            f"{adapter.base_model} (fingerprint {wanted[:12]}), {what} is {fingerprint[:12]}. "
            "Give the base it was trained on"
        )


def raise_faults(what: str, faults: Iterable[str], *, mend: str) -> None:
    """One UserError that names all `faults`, if there are any."""
    faults = list(faults)
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"{what}: {'; '.join(faults[:8])}{more}. {mend}")


# ---- the config ----


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        what = "does not exist" if not folder.is_dir() else f"holds no {CONFIG}"
        raise UserError(
            f"adapter {folder} {what}: give the folder with {CONFIG} and {WEIGHTS}, "
            "as train.py wrote it"
        )
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is no JSON: {error}. Save the adapter again") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{folder / CONFIG} is no LoRA adapter: peft_type is {kind!r}, wanted LORA")
    return values


def _lora_config(values: Mapping[str, Any], folder: Path) -> LoraConfig:
    init = values.get("init_lora_weights", True)
    unsupported = [f"{k}={v!r}" for k, v in values.items() if v and k not in UNDERSTOOD]
    if isinstance(init, str) and init.startswith(REBASING_INITS):
        unsupported.append(f"init_lora_weights={init!r} (it changes the base weights)")
    if unsupported:
        raise UserError(
            f"{folder / CONFIG} asks for what is not there yet: {', '.join(unsupported)}. "
            "Wanted a LoRA adapter without it"
        )
    targets = values.get("target_modules") or "all-linear"
    if not isinstance(values.get("r", 8), int):
        raise UserError(f"{folder / CONFIG}: r must be a whole number, got {values['r']!r}")
    return LoraConfig(
        r=values.get("r", 8),  # PEFT's own defaults
        lora_alpha=values.get("lora_alpha", 8),
        lora_dropout=values.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(values.get("use_rslora")),
    )


def _of_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of `module`, by PEFT's rule."""
    found = (v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", module))
    return next(found, default)


# ---- the tensors ----


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle and is not opened: save it as safetensors)"
        raise UserError(
            f"{folder} holds no {WEIGHTS}"
            f"{pickled if (folder / 'adapter_model.bin').exists() else ''}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again") from error


def _read_base_record(metadata: Mapping[str, str], folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(metadata.get("qlora", "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / WEIGHTS}: its qlora metadata is no JSON object") from error


def _sort(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """The parts of each adapted module, the parameters saved whole, and what is wrong so far."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    faults = []
    ends = "|".join(map(re.escape, PARTS))
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            faults.append(f"{key} is {tensor.dtype}, wanted floating point")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{key} holds NaN or infinity")
        name = key.removeprefix(PREFIX)
        if name == key:
            faults.append(f"unexpected {key}")
        elif match := re.fullmatch(rf"(.+)\.({ends})", name):
            parts.setdefault(match[1], {})[match[2]] = tensor
        else:
            whole[name] = tensor
    saved = tuple(values.get("modules_to_save") or ())
    for name in list(whole):
        module, _, kind = name.rpartition(".")
        module = module.removesuffix(".base_layer")
        explained = (
            _ends_in(module, (*saved, *VOCABULARY))
            or (kind == "bias" and values.get("bias", "none") != "none")
            or (".base_layer." in name and module in parts)
        )
        if not explained:
            faults.append(f"unexpected {PREFIX}{name}")
        whole[f"{module}.{kind}"] = whole.pop(name)
    for entry in saved:
        if not any(_ends_in(name.rpartition(".")[0], (entry,)) for name in whole):
            faults.append(f"missing {entry}, which its config says was trained in full")
    return parts, whole, faults


def _ends_in(module: str, entries: Iterable[str]) -> bool:
    """PEFT's rule for modules_to_save: an ending, be it of a word; or of a module above it."""
    return any(module.endswith(entry) or f"{entry}." in module for entry in entries)


def _pair_up(
    parts: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], faults: list[str]
) -> tuple[dict[str, Factors], frozenset[str]]:
    """The factors of each module, and which are embeddings; what is wrong goes to `faults`."""
    pairs, embeddings = {}, set()
    for module, found in parts.items():
        if set(found) == {"token_adapter.trainable_tokens_delta"}:
            continue
        is_embedding = any("embedding" in part for part in found)
        names = [f"lora_embedding_{s}" if is_embedding else f"lora_{s}.weight" for s in "AB"]
        missing = [name for name in names if name not in found]
        faults += [f"missing {PREFIX}{module}.{name}" for name in missing]
        if missing:
            continue
        r = _of_module(values.get("rank_pattern"), module, values.get("r", 8))
        wrong = [
            f"{PREFIX}{module}.{name} has shape {tuple(found[name].shape)}, its config says r={r}"
            for name, axis in zip(names, (0, 1), strict=True)
            if found[name].ndim != 2 or found[name].shape[axis] != r
        ]
        faults += wrong
        if wrong:
            continue
        lora_A, lora_B = (found[name] for name in names)
        magnitude = next((t for part, t in found.items() if PARTS[part] == "magnitude"), None)
        if magnitude is not None and magnitude.shape != (len(lora_B),):
            faults.append(
                f"{PREFIX}{module}.lora_magnitude_vector has shape {tuple(magnitude.shape)}, "
                f"wanted {(len(lora_B),)}"
            )
        if (magnitude is not None) != bool(values.get("use_dora")):
            had = "has" if magnitude is not None else "has no"
            faults.append(
                f"{PREFIX}{module} {had} lora_magnitude_vector, its config says "
                f"use_dora={bool(values.get('use_dora'))}"
            )
        alpha = _of_module(values.get("alpha_pattern"), module, values.get("lora_alpha", 8))
        scaling = float(alpha / (r**0.5 if values.get("use_rslora") else r))
        pairs[module] = Factors(lora_A, lora_B, scaling, magnitude)
        if is_embedding:
            embeddings.add(module)
    return pairs, frozenset(embeddings)


def _others(
    parts: Mapping[str, Mapping[str, Tensor]],
    pairs: Mapping[str, Factors],
    values: Mapping[str, Any],
    faults: list[str],
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """What is added to biases, and the new rows of embeddings."""
    bias_changes, rows = {}, {}
    for module, found in parts.items():
        if values.get("lora_bias") and "lora_B.weight" in found and "lora_B.bias" not in found:
            faults.append(f"missing {PREFIX}{module}.lora_B.bias")
        if "lora_B.bias" in found and module in pairs:
            bias_changes[module] = pairs[module].scaling * found["lora_B.bias"].float()
        for tensor in (t for part, t in found.items() if PARTS[part] == "rows"):
            ids = values.get("trainable_token_indices")
            if isinstance(ids, dict):
                ids = next((v for k, v in ids.items() if _ends_in(module, (k,))), None)
            if not isinstance(ids, list) or len(ids) != len(tensor):
                faults.append(
                    f"{PREFIX}{module} has {len(tensor)} trained token rows, its config names "
                    f"{len(ids) if isinstance(ids, list) else 'none'}"
                )
                continue
            rows[module] = torch.tensor(ids, dtype=torch.long), tensor
    if values.get("trainable_token_indices") and not rows:
        faults.append("missing the rows of trainable_token_indices")
    return bias_changes, rows
