"""The adapter files that PEFT, transformers, vLLM, SGLang and llama.cpp read; and back on a model.

    adapter_config.json        PEFT's LoraConfig, sorted keys, indent 2
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, in) and lora_B (out, r)

An adapter called "default" stands in the folder itself, any other in a sub-folder of its name.
Beside PEFT's `format: pt`, the safetensors metadata carries one entry of our own, `qlora`: how the
base was quantized and its fingerprint, so that a merge knows what was trained on and an adapter is
not put on another base. Consumers ignore it.

An adapter whose base was changed for it (qlora.adapters.rebase: PiSSA, OLoRA, LoftQ of several
rounds) is saved as one of rank 2r over the base as it was: A over A', B beside -B', the same
scaling. `qlora` then says in `rebased` where in each layer A ends, and who knows what that means
makes the base anew and takes A and B alone: this is the function that was trained. Over the plain
4-bit base, as PEFT and vLLM have it, that function is off by the difference between two
quantizations of each weight; over the original weights by the error of the changed base alone.

Does an adapter belong on a model? All that is wrong with that, before anything is put on.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora.adapters.apply import (
    Model,
    activate,
    active_adapters,
    adapter_configs,
    all_or_nothing,
    known_adapters,
    require_new_name,
    require_only_biases,
    set_adapter,
    wrap,
    wrap_layer,
    wrap_rows,
)
from qlora.adapters.format import (
    CONFIG,
    WEIGHTS,
    AdapterFile,
    raise_faults,
    read_adapter,
    require_same_base,
    without_rebase,
)
from qlora.adapters.fuse import require_unmerged
from qlora.adapters.layers import LoRAExperts, expert_sizes
from qlora.adapters.lora import Factors, lora_layers
from qlora.adapters.portable import portable_subset
from qlora.adapters.rebase import (
    require_alone,
    require_originals,
    require_own_base,
    set_bases,
    subtracted_parts,
)
from qlora.adapters.targets import has_rows, matches, takes_adapter
from qlora.adapters.tensors import PREFIX
from qlora.adapters.trained import TrainedModule
from qlora.adapters.wrappers import adapted, base_modules, plain, take_off
from qlora.base.modules import is_quantized, matrix_shape, state_of, task_of, was_conv1d
from qlora.config import LoraConfig
from qlora.errors import UserError
from qlora.files import replacing

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
            (qlora.adapters.portable); raises UserError for what they cannot, such as DoRA.
    """
    configs = adapter_configs(model)
    if adapter_name not in configs:
        raise UserError(f"no adapter {adapter_name!r} to save; the model has: {', '.join(configs)}")
    folder = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
    own = parameters_by_file_name(model, adapter_name)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in own.items()}
    config, base = configs[adapter_name], state_of(model).record()
    if taken := subtracted_parts(model):
        tensors |= _with_taken(tensors, taken)
        config = config.with_ranks(2)
        base = {**base, "rebased": {name: len(out.lora_A) for name, out in taken.items()}}
    values = _peft_config(model, config, adapter_name)
    if portable:
        values, tensors = portable_subset(values, tensors, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS, folder / CONFIG) as [weights, settings]:
        save_file(tensors, weights, metadata={"format": "pt", "qlora": json.dumps(base)})
        settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def parameters_by_file_name(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """All that adapter `adapter_name` is on the model, under the names that files give it."""
    layers = {name for name, layer in lora_layers(model).items() if adapter_name in layer.adapters}
    found = {}
    for name, wrapper in adapted(model):
        behind = ".base_layer" if isinstance(wrapper, TrainedModule) and name in layers else ""
        for ending, parameter in wrapper.parameters_of(adapter_name).items():
            found[f"{PREFIX}{name}{behind}.{ending}"] = parameter
    return found


def _with_taken(tensors: dict[str, Tensor], taken: dict[str, Factors]) -> dict[str, Tensor]:
    """A and B of layers whose base was changed, with what undoes that change behind."""
    found = {}
    for name, out in taken.items():
        side_A, side_B = (f"{PREFIX}{name}.lora_{side}.weight" for side in "AB")
        found[side_A] = torch.cat([tensors[side_A], out.lora_A.cpu()])
        found[side_B] = torch.cat([tensors[side_B], -out.lora_B.cpu()], dim=1)
    return found


def _peft_config(model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, Any]:
    base: Any = getattr(model, "config", None)
    task = task_of(model)
    found = lora_layers(model).items()
    layers = {name: layer for name, layer in found if adapter_name in layer.adapters}
    token_ids: Any = config.trainable_token_indices
    if isinstance(token_ids, tuple):
        token_ids = list(token_ids)
    else:
        token_ids = {name: list(ids) for name, ids in token_ids.items()}
    values: dict[str, Any] = {
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "bias": config.bias,
        "fan_in_fan_out": any(was_conv1d(layer.plain) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "revision": state_of(model).revision,
        "target_modules": portable_targets(model, list(layers)),
        "target_parameters": list(config.target_parameters) or None,
        "task_type": config.task_type or (task.task_type if task else None),
        "trainable_token_indices": token_ids or None,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(values.items()))


def portable_targets(model: nn.Module, layers: list[str]) -> list[str]:
    """Name endings that select just `layers` where such exist, else their full names."""
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    hit = [
        name
        for name, module in base_modules(model).items()
        if takes_adapter(plain(module))
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
    require_only_biases(model, adapter.config.bias)
    if adapter.subtracted:
        require_alone(model, f"adapter {adapter.folder}")
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
    check_fits(model, adapter)
    require_own_base(model, "swap_adapter")
    if adapter.subtracted:
        require_alone(model, f"adapter {adapter.folder}")
    require_unmerged(model, adapter_name)
    if adapter_configs(model)[adapter_name].bias == "none":
        require_only_biases(model, adapter.config.bias)
    active = active_adapters(model)
    take_off(model, adapter_name)
    _place(model, adapter, adapter_name)
    activate(model, active)
    return model


def attach(model: nn.Module, adapter: AdapterFile, adapter_name: str = "default") -> None:
    """`adapter` on `model`, in place, active and frozen.

    Raises:
        UserError: it does not fit; the model is then untouched.
    """
    check_fits(model, adapter)
    with all_or_nothing(model, adapter_name):
        _place(model, adapter, adapter_name)
        set_adapter(model, adapter_name)
        model.requires_grad_(False)


def _place(model: nn.Module, adapter: AdapterFile, adapter_name: str) -> None:
    adapter = without_rebase(adapter)
    own: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in adapter.full_params.items():
        module, _, leaf = name.rpartition(".")
        # PEFT saves embeddings whole beside their A and B, as they were
        if module in adapter.pairs and torch.equal(value, model.get_parameter(name).to(value)):
            continue
        own.setdefault(module, {})[leaf] = value
    for name, values in own.items():
        wrap(model, name, TrainedModule).put_adapter(adapter_name, values)
    for name, factors in adapter.pairs.items():
        bias = adapter.lora_biases.get(name)
        dropout = adapter.config.lora_dropout
        wrap_layer(model, name).put_adapter(adapter_name, factors, dropout, bias)
    set_bases(model, adapter.subtracted)
    for name, pairs in adapter.parameters.items():
        leaves = parameters_meant(name, plain(model.get_submodule(name)), adapter.config)
        lora_A = {leaf: pair[0] for leaf, pair in zip(leaves, pairs, strict=True)}
        lora_B = {leaf: pair[1] for leaf, pair in zip(leaves, pairs, strict=True)}
        scaling = {leaf: adapter.config.of(f"{name}.{leaf}").scaling for leaf in leaves}
        wrap(model, name, LoRAExperts).put_adapter(adapter_name, lora_A, lora_B, scaling)
    for name, (ids, rows) in adapter.rows.items():
        wrap_rows(model, name).put_adapter(adapter_name, ids.tolist(), rows)
    adapter_configs(model)[adapter_name] = adapter.config


def load_adapter_weights(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default"
) -> None:
    """Overwrite the values of an adapter the model already has, as resuming a run does."""
    adapter = without_rebase(read_adapter(folder))
    config = adapter_configs(model).get(adapter_name)
    if config is None:
        raise UserError(f"the model has no adapter {adapter_name!r} to load weights into")
    require_unmerged(model, adapter_name)
    check_fits(model, adapter)
    own = parameters_by_file_name(model, adapter_name)
    faults = _differences(config, adapter)
    more, less = adapter.tensors.keys() - own.keys(), own.keys() - adapter.tensors.keys()
    faults += [f"{module} has no adapter on the model" for module in _modules_of(more)]
    faults += [f"{module} is not in the files" for module in _modules_of(less)]
    raise_faults(
        f"{adapter.folder} is no checkpoint of this run",
        faults,
        mend="Give the settings the run was started with, or a new --output-dir",
    )
    set_bases(model, adapter.subtracted)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter.tensors[name])


def _modules_of(names: Iterable[str]) -> list[str]:
    """The modules whose tensors have these names in a file."""
    ending = r"(\.base_layer)*\.(lora_|token_adapter).*$|(\.base_layer)?\.(weight|bias)$"
    return sorted({re.sub(ending, "", name.removeprefix(PREFIX)) for name in names})


def _differences(config: LoraConfig, adapter: AdapterFile) -> list[str]:
    """How an adapter's settings differ from those of the one on the model."""
    faults = []
    for field in ("use_dora", "bias"):
        saved, own = getattr(adapter.config, field), getattr(config, field)
        if saved != own:
            faults.append(f"{field}={saved} in the files, {own} on the model")
    differ: dict[tuple[float, ...], str] = {}
    for name, factors in adapter.pairs.items():
        found = (len(factors.lora_A), factors.scaling, config.of(name).r, config.of(name).scaling)
        if found[0] != found[2] or not math.isclose(found[1], found[3]):
            differ.setdefault(found, name)
    return faults + [
        f"r={r} and scaling={scaling:g} in the files, r={own_r} and scaling={own_scaling:g} on the "
        f"model ({name})"
        for (r, scaling, own_r, own_scaling), name in differ.items()
    ]


def parameters_meant(name: str, module: nn.Module, config: LoraConfig) -> list[str]:
    """Which parameters of a module target_parameters means, in the module's order."""
    return [
        leaf
        for leaf, _ in module.named_parameters(recurse=False)
        if any(matches(f"{name}.{leaf}", e, is_regex=False) for e in config.target_parameters)
    ]


def check_fits(model: nn.Module, adapter: AdapterFile) -> None:
    """Refuse an adapter of another base: by fingerprint where known, and by every shape."""
    require_same_base(adapter, state_of(model).fingerprint, "this model")
    modules = {name: plain(module) for name, module in base_modules(model).items()}
    faults = []
    labels = state_of(model).labels
    if labels and adapter.labels and labels != adapter.labels:
        faults.append(
            f"its labels are {', '.join(adapter.labels)}, and the model was loaded with "
            f"{', '.join(labels)}"
        )
    for name, factors in adapter.pairs.items():
        layer = modules.get(name)
        if layer is None or not takes_adapter(layer):
            faults.append(f"{name} is no layer of this model that takes A and B")
            continue
        if (name in adapter.embeddings) != isinstance(layer, nn.Embedding):
            faults.append(
                f"{name} is a {type(layer).__name__}, which the adapter's tensors do not fit"
            )
        elif factors.shape != matrix_shape(layer):
            shape = matrix_shape(layer)
            faults.append(f"{name} is {shape} in this model, the adapter wants {factors.shape}")
    faults += adapter.missing(name for name, layer in modules.items() if takes_adapter(layer))
    faults += _misfits_of_parameters(modules, adapter)
    for name, (ids, rows) in adapter.rows.items():
        layer = modules.get(name)
        if layer is None or not has_rows(layer):
            faults.append(f"{name} is no embedding or head of this model")
        elif int(ids.max()) >= len(layer.weight) or rows.shape[1] != layer.weight.shape[1]:
            wanted = f"row {int(ids.max())} of {rows.shape[1]} values"
            faults.append(f"{name} is {tuple(layer.weight.shape)}, the adapter wants {wanted}")
    raise_faults(
        f"adapter {adapter.folder} does not fit this model",
        faults,
        mend="Load the base it was trained on",
    )
    require_originals(model, adapter.subtracted)


def _misfits_of_parameters(modules: dict[str, Any], adapter: AdapterFile) -> list[str]:
    """What is trained in full, and parameters that are no layer's."""
    faults = []
    for name, value in adapter.full_params.items():
        module, _, leaf = name.rpartition(".")
        own = getattr(modules.get(module), leaf, None)
        if own is None:
            faults.append(f"{name} is no parameter of this model")
            continue
        shape = own.shape
        if leaf == "weight" and is_quantized(modules[module]):
            shape = own.quant_state.shape  # (out, in)
            shape = shape[::-1] if was_conv1d(modules[module]) else shape
        grown = leaf == "weight" and len(value) > len(own) and shape[1:] == value.shape[1:]
        if shape != value.shape and not grown:  # a vocabulary may have grown
            faults.append(
                f"{name} is {tuple(shape)} in this model, {tuple(value.shape)} in the adapter"
            )
    for name, pairs in adapter.parameters.items():
        leaves = parameters_meant(name, modules[name], adapter.config) if name in modules else []
        if len(leaves) != len(pairs):
            faults.append(
                f"{name} has {len(leaves)} of target_parameters, the adapter has {len(pairs)}"
            )
            continue
        for leaf, (lora_A, lora_B) in zip(leaves, pairs, strict=True):
            experts, out_features, in_features = expert_sizes(modules[name], leaf)
            ranks = experts * adapter.config.of(f"{name}.{leaf}").r
            wanted = (ranks, in_features), (out_features, ranks)
            found = tuple(lora_A.shape), tuple(lora_B.shape)
            if found != wanted:
                faults.append(
                    f"{name}.{leaf} takes A {wanted[0]} and B {wanted[1]}, the adapter has "
                    f"{found[0]} and {found[1]}"
                )
    return faults
