"""The adapter files that PEFT, transformers, vLLM, SGLang and llama.cpp read.

    adapter_config.json        PEFT's LoraConfig, sorted keys, indent 2
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, in) and lora_B (out, r)

An adapter called "default" stands in the folder itself, any other in a sub-folder of its name.
Beside PEFT's `format: pt`, the safetensors metadata carries one entry of our own, `qlora`: how the
base was quantized and its fingerprint, so that a merge knows what was trained on and an adapter is
not put on another base. Consumers ignore it.

Reading is strict: every missing, unexpected, misshapen or non-finite tensor is named, all at once
(PEFT warns or stays silent), and a config that asks for more than a plain adapter is refused by
name. Pickled adapters (adapter_model.bin) are not opened.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora.adapters import Model, adapter_configs, matches, require_new_name, set_adapter, wrap
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.lora import LoRALinear, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Inits that change the base weights, so that the adapter is right only over the changed base.
REBASING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Keys of PEFT's config that are read here, or that change nothing about A and B as they are saved.
# Any other that is set asks for more than a plain adapter.
UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: for each module its A (r, in) and B (out, r), as stored."""

    folder: Path
    config: LoraConfig
    pairs: dict[str, tuple[Tensor, Tensor]]
    base_model: str | None
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


# ---- writing ----


def save_adapter(model: nn.Module, folder: str | Path, *, adapter_name: str = "default") -> Path:
    """Write adapter `adapter_name` so that PEFT loads it; returns the folder it stands in."""
    configs = adapter_configs(model)
    if adapter_name not in configs:
        raise UserError(f"no adapter {adapter_name!r} to save; the model has: {', '.join(configs)}")
    folder = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
    folder.mkdir(parents=True, exist_ok=True)
    layers = {n: m for n, m in lora_layers(model).items() if adapter_name in m.lora_A}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A[adapter_name].detach().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B[adapter_name].detach().cpu()
    metadata = {"format": "pt", "qlora": json.dumps(getattr(model, "qlora_base", {}))}
    save_file(tensors, folder / f".{WEIGHTS}", metadata=metadata)
    text = json.dumps(_peft_config(model, configs[adapter_name], list(layers)), indent=2)
    (folder / f".{CONFIG}").write_text(text + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f".{name}", folder / name)
    return folder


def _peft_config(model: nn.Module, config: LoraConfig, layers: list[str]) -> dict[str, Any]:
    base: Any = getattr(model, "config", None)
    values: dict[str, Any] = {
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": any(_was_conv1d(model.get_submodule(name)) for name in layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": getattr(model, "qlora_base", {}).get("revision"),
        "target_modules": portable_targets(model, layers),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(values.items()))


def _was_conv1d(layer: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as (in, out), as GPT-2's Conv1D does."""
    source = getattr(getattr(layer, "base_layer", layer), "source_cls", None)
    return getattr(source, "__name__", None) == "Conv1D"


def portable_targets(model: nn.Module, layers: list[str]) -> list[str]:
    """Name endings that select just `layers` where such exist, else their full names."""
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    hit = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | LoRALinear)
        and ".base_layer" not in name
        and any(matches(name, leaf, is_regex=False) for leaf in leaves)
    ]
    return leaves if set(hit) == set(layers) else sorted(layers)


# ---- reading ----


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read and check an adapter's two files.

    Raises:
        UserError: a file is missing or damaged, the config asks for what is not supported, or
            tensors are missing, unexpected, misshapen or not finite; all offenders are named.
    """
    folder = Path(folder)
    values = _read_config(folder)
    config = _lora_config(values, folder)
    tensors, metadata = _read_tensors(folder)
    pairs = _pair_up(tensors, config, folder)
    return AdapterFile(
        folder=folder,
        config=config,
        pairs=pairs,
        base_model=values.get("base_model_name_or_path"),
        revision=values.get("revision"),
        fan_in_fan_out=bool(values.get("fan_in_fan_out")),
        base=_read_base_record(metadata, folder),
    )


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
    if values.get("bias", "none") != "none":
        unsupported.append(f"bias={values['bias']!r}")
    if isinstance(init, str) and init.startswith(REBASING_INITS):
        unsupported.append(f"init_lora_weights={init!r} (it changes the base weights)")
    if unsupported:
        raise UserError(
            f"{folder / CONFIG} asks for what is not there yet: {', '.join(unsupported)}. "
            "Wanted a plain LoRA adapter"
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


def _pair_up(
    tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {}
    faults = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            faults.append(f"unexpected {key}")
            continue
        sides.setdefault(match["module"], {})[match["side"]] = tensor
        rank_axis = 0 if match["side"] == "A" else 1
        if tensor.ndim != 2 or tensor.shape[rank_axis] != config.r:
            faults.append(f"{key} has shape {tuple(tensor.shape)}, its config says r={config.r}")
        elif not tensor.is_floating_point():
            faults.append(f"{key} is {tensor.dtype}, wanted floating point")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{key} holds NaN or infinity")
    for module, found in sides.items():
        faults += [f"missing {PREFIX}{module}.lora_{s}.weight" for s in "AB" if s not in found]
    if not sides:
        faults.append("no lora_A or lora_B tensor")
    _raise_faults(
        f"{folder / WEIGHTS}", faults, mend="Save the adapter again, or take an earlier checkpoint"
    )
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _raise_faults(what: str, faults: Iterable[str], *, mend: str) -> None:
    faults = list(faults)
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"{what}: {'; '.join(faults[:8])}{more}. {mend}")


def load_adapter(
    model: Model,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
) -> Model:
    """Put a saved adapter on `model`, in place, and make it the active one.

    Raises:
        UserError: the files are at fault, or belong to another base; the model is then untouched.
    """
    adapter = read_adapter(folder)
    require_new_name(model, adapter_name)
    check_fits(model, adapter)
    model.requires_grad_(False)
    for name, (lora_A, lora_B) in adapter.pairs.items():
        layer = wrap(model, name)
        device = layer.weight.device
        layer.lora_A[adapter_name] = nn.Parameter(lora_A.to(device))
        layer.lora_B[adapter_name] = nn.Parameter(lora_B.to(device))
        layer.scaling[adapter_name] = adapter.config.scaling
        layer.dropout[adapter_name] = adapter.config.lora_dropout
    adapter_configs(model)[adapter_name] = adapter.config
    set_adapter(model, adapter_name)
    if not trainable:
        model.requires_grad_(False)
    return model


def load_adapter_weights(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default"
) -> None:
    """Overwrite the values of an adapter the model already has, as resuming a run does."""
    adapter = read_adapter(folder)
    config = adapter_configs(model).get(adapter_name)
    if config is None:
        raise UserError(f"the model has no adapter {adapter_name!r} to load weights into")
    layers = {n: m for n, m in lora_layers(model).items() if adapter_name in m.lora_A}
    faults = [f"{name} has no adapter on the model" for name in adapter.pairs if name not in layers]
    faults += [f"{name} is not in the files" for name in layers if name not in adapter.pairs]
    if (adapter.config.r, adapter.config.scaling) != (config.r, config.scaling):
        faults.append(
            f"r={adapter.config.r} and scaling={adapter.config.scaling:g} in the files, "
            f"r={config.r} and scaling={config.scaling:g} on the model"
        )
    check_fits(model, adapter)
    _raise_faults(
        f"{adapter.folder} is no checkpoint of this run",
        faults,
        mend="Give the settings the run was started with, or a new --output-dir",
    )
    with torch.no_grad():
        for name, (lora_A, lora_B) in adapter.pairs.items():
            layers[name].lora_A[adapter_name].copy_(lora_A)
            layers[name].lora_B[adapter_name].copy_(lora_B)


def check_fits(model: nn.Module, adapter: AdapterFile) -> None:
    """Refuse an adapter of another base: by fingerprint where known, and by every shape."""
    base: dict[str, Any] = getattr(model, "qlora_base", {})
    require_same_base(adapter, base.get("fingerprint"), "this model")
    modules = dict(model.named_modules())
    faults = []
    for name, (lora_A, lora_B) in adapter.pairs.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | LoRALinear):
            faults.append(f"{name} is no linear layer of this model")
            continue
        shape = (layer.out_features, layer.in_features)
        if (lora_B.shape[0], lora_A.shape[1]) != shape:
            faults.append(
                f"{name} is {shape} in this model, the adapter wants "
                f"{(lora_B.shape[0], lora_A.shape[1])}"
            )
    _raise_faults(
        f"adapter {adapter.folder} does not fit this model",
        faults,
        mend="Load the base it was trained on",
    )


def require_same_base(adapter: AdapterFile, fingerprint: str | None, what: str) -> None:
    """Refuse a base whose fingerprint is not the one the adapter remembers, if both are known."""
    wanted = adapter.base.get("fingerprint")
    if wanted and fingerprint and wanted != fingerprint:
        raise UserError(
            f"adapter {adapter.folder} belongs to another base: it was trained on "
            f"{adapter.base_model} (fingerprint {wanted[:12]}), {what} is {fingerprint[:12]}. "
            "Give the base it was trained on"
        )
