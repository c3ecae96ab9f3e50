"""The adapter files that PEFT, transformers, vLLM, SGLang and llama.cpp read; and back on a model.

    adapter_config.json        PEFT's LoraConfig, sorted keys, indent 2
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, in) and lora_B (out, r)

An adapter called "default" stands in the folder itself, any other in a sub-folder of its name.
Beside PEFT's `format: pt`, the safetensors metadata carries one entry of our own, `qlora`: how the
base was quantized and its fingerprint, so that a merge knows what was trained on and an adapter is
not put on another base. Consumers ignore it.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from qlora.adapter_reader import (
    CONFIG,
    DORA,
    WEIGHTS,
    AdapterFile,
    raise_faults,
    read_adapter,
    require_same_base,
)
from qlora.adapter_tensors import PREFIX
from qlora.adapters import (
    Model,
    active_adapters,
    adapter_configs,
    known_adapters,
    require_new_name,
    require_unmerged,
    set_adapter,
    wrap,
)
from qlora.config import LoraConfig
from qlora.errors import UserError
from qlora.lora import LoRALinear, lora_layers, was_conv1d
from qlora.matching import matches
from qlora.portable import portable_subset

# ---- writing ----


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    portable: bool = False,
) -> Path:
    """Write adapter `adapter_name` so that PEFT loads it; returns the folder it stands in.

    Args:
        portable: write it so that vLLM, SGLang, llama.cpp and TGI compute the same, too
            (qlora.portable); raises UserError for what they cannot, such as DoRA.
    """
    configs = adapter_configs(model)
    if adapter_name not in configs:
        raise UserError(f"no adapter {adapter_name!r} to save; the model has: {', '.join(configs)}")
    folder = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
    layers = {n: m for n, m in lora_layers(model).items() if adapter_name in m.lora_A}
    tensors = {}
    for name, layer in layers.items():
        for kind, parameter in layer.parameters_of(adapter_name).items():
            ending = "" if kind == "lora_magnitude_vector" else ".weight"
            tensors[f"{PREFIX}{name}.{kind}{ending}"] = parameter.detach().cpu()
    values = _peft_config(model, configs[adapter_name], list(layers))
    if portable:
        values, tensors = portable_subset(values, tensors, folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "qlora": json.dumps(getattr(model, "qlora_base", {}))}
    save_file(tensors, folder / f".{WEIGHTS}", metadata=metadata)
    (folder / f".{CONFIG}").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f".{name}", folder / name)
    return folder


def _peft_config(model: nn.Module, config: LoraConfig, layers: list[str]) -> dict[str, Any]:
    base: Any = getattr(model, "config", None)
    values: dict[str, Any] = {
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": any(map(was_conv1d, _bases(model, layers))),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "revision": getattr(model, "qlora_base", {}).get("revision"),
        "target_modules": portable_targets(model, layers),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(values.items()))


def _bases(model: nn.Module, layers: list[str]) -> list[nn.Module]:
    found = map(model.get_submodule, layers)
    return [m.base_layer if isinstance(m, LoRALinear) else m for m in found]


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


# ---- on a model ----


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
    require_plain(adapter)
    check_fits(model, adapter)
    attach(model, adapter, adapter_name)
    if trainable:
        set_adapter(model, adapter_name)
    return model


def swap_adapter(model: Model, folder: str | Path, *, adapter_name: str = "default") -> Model:
    """Put a saved adapter, frozen, in the place of one on `model`: of any rank, on any layers.

    It is active where the old one was, and the others stay as they are.

    Raises:
        UserError: the files are at fault or of another base, there is no such adapter, or it is
            merged; the model is then untouched.
    """
    adapter = read_adapter(folder)
    known_adapters(model, adapter_name)
    require_plain(adapter)
    check_fits(model, adapter)
    require_unmerged(model, adapter_name)
    active = active_adapters(model)
    _place(model, adapter, adapter_name)
    for name, layer in lora_layers(model).items():
        if name not in adapter.pairs:
            layer.remove_adapter(adapter_name)
        layer.active_adapters = tuple(n for n in active if n in layer.lora_A)
        if not layer.lora_A:
            model.set_submodule(name, layer.base_layer, strict=True)
    return model


def attach(model: nn.Module, adapter: AdapterFile, adapter_name: str = "default") -> None:
    """The linear layers' A and B of `adapter` on `model`, in place, active and frozen."""
    _place(model, adapter, adapter_name)
    set_adapter(model, adapter_name)
    model.requires_grad_(False)


def _place(model: nn.Module, adapter: AdapterFile, adapter_name: str) -> None:
    for name, factors in adapter.pairs.items():
        if name not in adapter.embeddings:
            layer = wrap(model, name)
            layer.remove_adapter(adapter_name)
            layer.put_adapter(adapter_name, factors, adapter.config.lora_dropout)
    adapter_configs(model)[adapter_name] = adapter.config


def require_plain(adapter: AdapterFile) -> None:
    """Refuse what only the merge can handle so far."""
    more = [what for what in adapter.extras if what != DORA]
    if more:
        raise UserError(
            f"{adapter.folder} holds {' and '.join(more)}, which cannot be put on a "
            "model yet. merge_dequant.py folds them in"
        )


def load_adapter_weights(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default"
) -> None:
    """Overwrite the values of an adapter the model already has, as resuming a run does."""
    adapter = read_adapter(folder)
    require_plain(adapter)
    config = adapter_configs(model).get(adapter_name)
    if config is None:
        raise UserError(f"the model has no adapter {adapter_name!r} to load weights into")
    require_unmerged(model, adapter_name)
    layers = {n: m for n, m in lora_layers(model).items() if adapter_name in m.lora_A}
    faults = [f"{name} has no adapter on the model" for name in adapter.pairs if name not in layers]
    faults += [f"{name} is not in the files" for name in layers if name not in adapter.pairs]
    differ: dict[tuple[float, ...], str] = {}
    if adapter.config.use_dora != config.use_dora:
        faults.append(
            f"use_dora={adapter.config.use_dora} in the files, {config.use_dora} on the model"
        )
    for name in sorted(layers.keys() & adapter.pairs.keys()):
        own, saved = config.of(name), adapter.pairs[name]
        found = len(saved.lora_A), saved.scaling, own.r, own.scaling
        if found[:2] != found[2:]:
            differ.setdefault(found, name)
    faults += [
        f"r={r} and scaling={scaling:g} in the files, r={own_r} and scaling={own_scaling:g} on the "
        f"model ({name})"
        for (r, scaling, own_r, own_scaling), name in differ.items()
    ]
    check_fits(model, adapter)
    raise_faults(
        f"{adapter.folder} is no checkpoint of this run",
        faults,
        mend="Give the settings the run was started with, or a new --output-dir",
    )
    with torch.no_grad():
        for name, factors in adapter.pairs.items():
            values = [factors.lora_A, factors.lora_B]
            values += [] if factors.magnitude is None else [factors.magnitude]
            parameters = layers[name].parameters_of(adapter_name).values()
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)


def check_fits(model: nn.Module, adapter: AdapterFile) -> None:
    """Refuse an adapter of another base: by fingerprint where known, and by every shape."""
    base: dict[str, Any] = getattr(model, "qlora_base", {})
    require_same_base(adapter, base.get("fingerprint"), "this model")
    modules = dict(model.named_modules())
    faults = []
    for name, factors in adapter.pairs.items():
        layer = modules.get(name)
        if name in adapter.embeddings and isinstance(layer, nn.Embedding):
            continue
        if not isinstance(layer, nn.Linear | LoRALinear):
            faults.append(f"{name} is no linear layer of this model")
            continue
        shape = (layer.out_features, layer.in_features)
        if factors.shape != shape:
            faults.append(f"{name} is {shape} in this model, the adapter wants {factors.shape}")
    raise_faults(
        f"adapter {adapter.folder} does not fit this model",
        faults,
        mend="Load the base it was trained on",
    )
