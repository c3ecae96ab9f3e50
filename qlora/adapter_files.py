"""The adapter files that PEFT, transformers, vLLM, SGLang and llama.cpp read; and back on a model.

    adapter_config.json        PEFT's LoraConfig, sorted keys, indent 2
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, in) and lora_B (out, r)

An adapter called "default" stands in the folder itself, any other in a sub-folder of its name.
Beside PEFT's `format: pt`, the safetensors metadata carries one entry of our own, `qlora`: how the
base was quantized and its fingerprint, so that a merge knows what was trained on and an adapter is
not put on another base. Consumers ignore it.

An adapter whose base was changed for it (qlora.rebase: PiSSA, OLoRA, LoftQ of several rounds) is
saved as one of rank 2r over the base as it was: A over A', B beside -B', the same scaling. `qlora`
then says `rebased`, and who knows what that means makes the base anew and takes A and B alone: this
is the function that was trained. Over the plain 4-bit base, as PEFT and vLLM have it, that function
is off by the difference between two quantizations of each weight; over the original weights by the
error of the changed base alone.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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
from qlora.lora import Factors, LoRALinear, lora_layers, was_conv1d
from qlora.matching import matches
from qlora.rebase import (
    original_weight,
    rebase,
    require_alone,
    require_originals,
    require_own_base,
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
        for kind, value in _saved(layer, adapter_name).items():
            ending = "" if kind == "lora_magnitude_vector" else ".weight"
            tensors[f"{PREFIX}{name}.{kind}{ending}"] = value.detach().cpu()
    config, base = configs[adapter_name], getattr(model, "qlora_base", {})
    if any(layer.taken for layer in layers.values()):
        config, base = config.with_ranks(2), {**base, "rebased": True}
    metadata = {"format": "pt", "qlora": json.dumps(base)}
    save_file(tensors, folder / f".{WEIGHTS}", metadata=metadata)
    text = json.dumps(_peft_config(model, config, list(layers)), indent=2)
    (folder / f".{CONFIG}").write_text(text + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f".{name}", folder / name)
    return folder


def _saved(layer: LoRALinear, adapter_name: str) -> dict[str, Tensor]:
    """What is saved of an adapter's part of a layer, by kind."""
    values: dict[str, Tensor] = dict(layer.parameters_of(adapter_name))
    if taken := layer.taken:
        values["lora_A"] = torch.cat([values["lora_A"], taken.lora_A])
        values["lora_B"] = torch.cat([values["lora_B"], -taken.lora_B], dim=1)
    return values


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
    _require_alone(model, adapter)
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
    require_own_base(model, "swap_adapter")
    _require_alone(model, adapter)
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
    for name, factors in trained(adapter).items():
        if name not in adapter.embeddings:
            layer = wrap(model, name)
            layer.remove_adapter(adapter_name)
            layer.put_adapter(adapter_name, factors, adapter.config.lora_dropout)
            if taken := adapter.taken.get(name):
                rebase(layer, original_weight(model, name), taken)
    adapter_configs(model)[adapter_name] = _own_config(adapter)


def trained(adapter: AdapterFile) -> dict[str, Factors]:
    """The factors that were trained, which are all there are but where the base was changed."""
    found = dict(adapter.pairs)
    for name, taken in adapter.taken.items():
        r = len(taken.lora_A)
        pair = found[name]
        found[name] = Factors(pair.lora_A[:r], pair.lora_B[:, :r], pair.scaling)
    return found


def _own_config(adapter: AdapterFile) -> LoraConfig:
    return adapter.config.with_ranks(0.5) if adapter.taken else adapter.config


def _require_alone(model: nn.Module, adapter: AdapterFile) -> None:
    """Refuse an adapter that changes the base, where another is on it."""
    if adapter.taken:
        require_alone(model, f"adapter {adapter.folder}")


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
    values = trained(adapter)
    for name in sorted(layers.keys() & values.keys()):
        own, saved = config.of(name), values[name]
        found = len(saved.lora_A), saved.scaling, own.r, own.scaling
        if found[0] != found[2] or not math.isclose(found[1], found[3]):
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
        for name, factors in values.items():
            tensors = [factors.lora_A, factors.lora_B]
            tensors += [] if factors.magnitude is None else [factors.magnitude]
            parameters = layers[name].parameters_of(adapter_name).values()
            for parameter, value in zip(parameters, tensors, strict=True):
                parameter.copy_(value)
            _set_base(model, name, adapter.taken.get(name))


def _set_base(model: nn.Module, name: str, taken: Factors | None) -> None:
    """The base of layer `name` without `taken`, if it is not that already."""
    layer = lora_layers(model)[name]
    now, wanted = (
        [] if t is None else [f.cpu().float() for f in t[:2]] for t in (layer.taken, taken)
    )
    if len(now) != len(wanted) or not all(map(torch.equal, now, wanted)):
        rebase(layer, original_weight(model, name), taken)


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
    require_originals(model, adapter.taken)
