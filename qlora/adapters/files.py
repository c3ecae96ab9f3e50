"""PEFT's adapter files: save an adapter of a model, and load one onto a model.

    adapter_config.json        PEFT's LoraConfig, sorted keys, indent 2
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, in) and lora_B (out, r)

The adapter "default" is saved in the folder itself, any other in a sub-folder of its name. The
safetensors metadata has PEFT's `format: pt` and `qlora`, which other programs ignore: the base's
fingerprint and quantization, with which a merge rebuilds the trained base and loading refuses
another one.

An adapter whose base was changed for it (qlora.adapters.rebase: PiSSA, OLoRA, LoftQ of several
iterations) is saved with rank 2r over the unchanged base: A stacked on A', B beside -B', the same
scaling. `rebased` in `qlora` is r of each layer: our loaders re-quantize the base and use A and B
only, which is the trained function. Over the plain 4-bit base, as in PEFT and vLLM, it differs by
the difference between two quantizations of each weight; over the original weights by the error of
the changed base.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from qlora.adapters import apply, rebase
from qlora.adapters.apply import Model, adapter_configs
from qlora.adapters.format import (
    CONFIG,
    WEIGHTS,
    AdapterFile,
    peft_values,
    raise_faults,
    read_adapter,
    require_fused_experts,
    require_one_size,
    require_same_base,
    with_tied,
    without_rebase,
)
from qlora.adapters.fuse import require_unfused
from qlora.adapters.layers import LoRAExperts, expert_sizes, lora_class
from qlora.adapters.lora import lora_layers
from qlora.adapters.portable import portable_subset
from qlora.adapters.targets import has_rows
from qlora.adapters.tensors import PREFIX, matches_any
from qlora.adapters.trained import TokenRows, TrainedModule
from qlora.adapters.wrappers import (
    adapted,
    base_modules,
    plain,
    remove_adapter,
    separate_embeddings,
)
from qlora.base.load import share_pad
from qlora.base.modules import (
    is_in,
    is_quantized,
    matrix_shape,
    state_of,
    task_of,
    tied_modules,
    use_codes_as_stored,
    vocabulary,
    was_conv1d,
)
from qlora.config import LoraConfig
from qlora.errors import some
from qlora.files import ids_in, read_json, replacing

# ---- save ----


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    portable: bool = False,
) -> Path:
    """Write adapter `adapter_name` in PEFT's format; returns its folder.

    Args:
        portable: write the form that vLLM, SGLang, llama.cpp and TGI compute correctly as well
            (qlora.adapters.portable); UserError for what they cannot compute, such as DoRA.
    """
    apply.known_adapters(model, adapter_name)
    folder = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
    parameters = parameters_by_file_name(model, adapter_name)
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    tensors |= resized_vocabulary(model, tensors)
    config, base = adapter_configs(model)[adapter_name], state_of(model).record()
    if subtracted := rebase.subtracted_parts(model):
        for name, part in subtracted.items():
            key_A, key_B = (f"{PREFIX}{name}.lora_{side}.weight" for side in "AB")
            tensors[key_A] = torch.cat([tensors[key_A], part.lora_A.cpu()])  # (2r, in)
            tensors[key_B] = torch.cat([tensors[key_B], -part.lora_B.cpu()], dim=1)  # (out, 2r)
        config = config.with_ranks(2)
        base = {**base, "rebased": {name: len(part.lora_A) for name, part in subtracted.items()}}
    layers = {n: w for n, w in lora_layers(model).items() if w.parameters_of(adapter_name)}
    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
    values = peft_values(
        config,
        base_model_name_or_path=name_or_path or None,
        fan_in_fan_out=any(was_conv1d(layer.plain) for layer in layers.values()),
        revision=state_of(model).revision,
        target_modules=target_suffixes(model, list(layers)),
        task_type=config.task_type or getattr(task_of(model), "task_type", None),
    )
    if portable:
        values, tensors = portable_subset(values, tensors, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS, folder / CONFIG) as [weights, settings]:
        save_file(tensors, weights, metadata={"format": "pt", "qlora": json.dumps(base)})
        sort_metadata(weights)
        settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: safetensors writes them in random order,
    and equal adapters shall be equal files, byte for byte."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the rest is padding
            file.seek(8)
            file.write(text.ljust(size))


def parameters_by_file_name(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """All parameters of adapter `adapter_name`, by their names in the files."""
    layers = {n for n, layer in lora_layers(model).items() if layer.parameters_of(adapter_name)}
    parameters = {}
    for name, wrapper in adapted(model):
        infix = ".base_layer" if isinstance(wrapper, TrainedModule) and name in layers else ""
        for ending, parameter in wrapper.parameters_of(adapter_name).items():
            parameters[f"{PREFIX}{name}{infix}.{ending}"] = parameter
    return parameters


def resized_vocabulary(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embedding and head, by name in the files, if their rows are not those of the model on
    disk and `tensors` lacks them; as PEFT saves them. One of two that are tied."""
    named = {name: plain(model.get_submodule(name)) for name in filter(None, vocabulary(model))}
    named = {name: module for name, module in named.items() if has_rows(module)}
    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
    quiet: Any = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    path = cached_file(name_or_path, "config.json", **quiet) if name_or_path else None
    if path is None:
        return {}
    values, added = read_json(Path(path)), dict[Any, str]()
    size = (values.get("text_config") or values).get("vocab_size")
    if size is None or all(len(module.weight) == size for module in named.values()):
        return {}
    config: Any = model.config
    with torch.device("meta"):  # other numbers of rows may be the family's, such as Mllama's
        on_disk = type(model)(type(config).from_pretrained(Path(path).parent))
    for name, module in named.items():
        is_adapted, rows = f"{PREFIX}{name}.lora_", len(on_disk.get_parameter(f"{name}.weight"))
        keys = [f"{PREFIX}{name}{infix}.weight" for infix in ("", ".base_layer")]
        if len(module.weight) != rows and not {*keys} & {*tensors}:
            added.setdefault(module.weight, keys[any(is_adapted in key for key in tensors)])
    return {key: weight.detach().cpu().contiguous() for weight, key in added.items()}


def target_suffixes(model: nn.Module, layers: list[str]) -> list[str]:
    """Last components of names if they match exactly `layers`, else the full names."""
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    known = [name for name, module in base_modules(model).items() if lora_class(plain(module))]
    matched = {name for name in known if matches_any(name, leaves)}
    return leaves if matched == set(layers) else sorted(layers)


# ---- load ----


def load_adapter(
    model: Model,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
) -> Model:
    """Add a saved adapter to `model`, in place, as the active one.

    Raises:
        UserError: the files are damaged or of another base; the model is then unchanged.
    """
    adapter = read_adapter(folder)
    apply.require_new_name(model, adapter_name)
    use_codes_as_stored(model)
    apply.require_only_biases(model, adapter.config.bias)
    if adapter.subtracted:
        rebase.require_alone(model, f"adapter {adapter.folder}")
    attach(model, adapter, adapter_name)
    if trainable:
        apply.set_adapter(model, adapter_name)
    return model


def swap_adapter(model: Model, folder: str | Path, *, adapter_name: str = "default") -> Model:
    """Replace an adapter on `model` by a saved one, frozen, of any rank and on any layers.

    It is active if the old one was; other adapters do not change.

    Raises:
        UserError: the files are damaged or of another base, the model has no such adapter, or it is
            merged; the model is then unchanged.
    """
    adapter = read_adapter(folder)
    apply.known_adapters(model, adapter_name)
    check_fits(model, adapter)
    rebase.require_unchanged_base(model, "swap_adapter")
    if adapter.subtracted:
        rebase.require_alone(model, f"adapter {adapter.folder}")
    require_unfused(model, adapter_name)
    if adapter_configs(model)[adapter_name].bias == "none":
        apply.require_only_biases(model, adapter.config.bias)
    active = apply.active_adapters(model)
    remove_adapter(model, adapter_name)
    _place(model, adapter, adapter_name)
    apply.activate(model, active)
    return model


def attach(model: nn.Module, adapter: AdapterFile, adapter_name: str = "default") -> None:
    """Add `adapter` to `model`, active and frozen; an error leaves the model unchanged."""
    separate_embeddings(model)
    check_fits(model, adapter)
    with apply.all_or_nothing(model, adapter_name):
        _place(model, adapter, adapter_name)
        apply.set_adapter(model, adapter_name)
        model.requires_grad_(False)
    share_pad(model, adapter.base.get("pad_token_id"))


def _place(model: nn.Module, adapter: AdapterFile, adapter_name: str) -> None:
    """Wrap the modules that `adapter` changes, with its values."""
    adapter = _with_tied(model, without_rebase(adapter))
    config = adapter.config
    in_full: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.full_params.items():
        module, _, leaf = name.rpartition(".")
        # PEFT saves an embedding's weight beside its A and B, unchanged
        base = getattr(plain(model.get_submodule(module)), leaf)
        is_base = module in adapter.pairs or is_in(module, vocabulary(model))
        if is_base and not adapter.trains(name) and torch.equal(value, base.to(value)):
            continue
        in_full.setdefault(module, {})[leaf] = value
    for name, values in in_full.items():
        apply.wrap(model, name, TrainedModule).put_adapter(adapter_name, values)
    for name, factors in adapter.pairs.items():
        bias = adapter.lora_biases.get(name)
        apply.wrap_layer(model, name).put_adapter(adapter_name, factors, config.lora_dropout, bias)
    rebase.set_bases(model, adapter.subtracted)
    for name, pairs in adapter.parameters.items():
        leaves = _target_leaves(name, plain(model.get_submodule(name)), config)
        lora_A, lora_B = (dict(zip(leaves, side, strict=True)) for side in zip(*pairs, strict=True))
        scaling = {leaf: config.of(f"{name}.{leaf}").scaling for leaf in leaves}
        apply.wrap(model, name, LoRAExperts).put_adapter(adapter_name, lora_A, lora_B, scaling)
    for name, (ids, rows) in adapter.rows.items():
        apply.wrap(model, name, TokenRows).put_adapter(adapter_name, ids.tolist(), rows)
    apply.wrap_followers(model, adapter_name)
    adapter_configs(model)[adapter_name] = config
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and adapter.stop_ids:
        generation.eos_token_id = sorted(ids_in(generation.eos_token_id) | adapter.stop_ids)


def _target_leaves(name: str, module: nn.Module, config: LoraConfig) -> list[str]:
    """The parameters of a module that target_parameters matches, in the module's order."""
    leaves = (leaf for leaf, _ in module.named_parameters(recurse=False))
    return [leaf for leaf in leaves if matches_any(f"{name}.{leaf}", config.target_parameters)]


def load_adapter_weights(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default"
) -> None:
    """Overwrite the values of an adapter on the model, to resume a run."""
    adapter = without_rebase(read_adapter(folder))
    apply.known_adapters(model, adapter_name)
    config = adapter_configs(model)[adapter_name]
    require_unfused(model, adapter_name)
    check_fits(model, adapter)
    parameters, tensors = parameters_by_file_name(model, adapter_name), adapter.tensors
    unused, unset = tensors.keys() - parameters.keys(), parameters.keys() - tensors.keys()
    differ: dict[str, str] = {}  # a difference in settings: the first layer that has it
    for field in ("use_dora", "bias"):
        saved, present = getattr(adapter.config, field), getattr(config, field)
        if saved != present:
            differ[f"{field}={saved} in the files, {present} on the model"] = ""
    for name, factors in adapter.pairs.items():
        r, layer = len(factors.lora_A), config.of(name)
        if r != layer.r or not math.isclose(factors.scaling, layer.scaling):
            saved = f"r={r} and scaling={factors.scaling:g} in the files"
            present = f"r={layer.r} and scaling={layer.scaling:g} on the model"
            differ.setdefault(f"{saved}, {present}", f" ({name})")
    faults = [what + where for what, where in differ.items()]
    faults += [f"{module} has no adapter on the model" for module in _modules_of(unused)]
    faults += [f"{module} is not in the files" for module in _modules_of(unset)]
    fix = "Give the settings of the run's start, or a new --output-dir"
    raise_faults(f"{adapter.folder} is no checkpoint of this run", faults, fix=fix)
    rebase.set_bases(model, adapter.subtracted)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _modules_of(names: Iterable[str]) -> list[str]:
    """The modules of tensors, by the tensors' names in a file."""
    ending = r"(\.base_layer)*\.(lora_|token_adapter).*$|(\.base_layer)?\.(weight|bias)$"
    return sorted({re.sub(ending, "", name.removeprefix(PREFIX)) for name in names})


# ---- whether an adapter fits a model ----


def check_fits(model: nn.Module, adapter: AdapterFile) -> None:
    """Raise if the adapter is of another base: by fingerprint where known, and by every shape."""
    state = state_of(model)
    require_same_base(adapter, state.fingerprint, "this model")
    modules: dict[str, Any] = {name: plain(module) for name, module in base_modules(model).items()}
    adapter, faults = _with_tied(model, adapter), []
    if state.labels and adapter.labels and state.labels != adapter.labels:
        ours, theirs = ", ".join(state.labels), ", ".join(adapter.labels)
        faults.append(f"its labels are {theirs}, those of the model {ours}")
    require_fused_experts(adapter, modules)
    faults += _misfits(modules, adapter)
    faults += adapter.missing(name for name, layer in modules.items() if lora_class(layer))
    what = f"adapter {adapter.folder} does not fit this model"
    raise_faults(what, faults, fix="Load the base it was trained on")
    full = adapter.full_params
    if any(f"{name}.weight" in full for name in vocabulary(model)):
        found = {name: modules[name] for name in vocabulary(model) if name in modules}
        sizes = {n: len(full.get(f"{n}.weight", m.weight)) for n, m in found.items()}
        if sizes != {name: len(module.weight) for name, module in found.items()}:
            require_one_size(adapter, sizes, "this model")
    rebase.require_originals(model, adapter.subtracted)
    if state.unlike_bnb and not adapter.knows_quantization:
        names, where = some(state.unlike_bnb), "here or there alone"
        print(
            f"adapter {adapter.folder}: if PEFT trained it on 4 bits, its base was another one, as "
            f"{names} are quantized {where}; merge, chat and evaluate load that one"
        )


def _with_tied(model: nn.Module, adapter: AdapterFile) -> AdapterFile:
    """The adapter with a resized embedding also for the head that is tied to it."""
    modules = {name: plain(module) for name, module in base_modules(model).items()}
    tied = tied_modules(modules)
    return with_tied(adapter, {n: len(modules[n].weight) for group in tied for n in group}, tied)


def _misfits(modules: dict[str, Any], adapter: AdapterFile) -> Iterator[str]:
    """What of the adapter has no place in `modules`, or one of another shape."""
    for name, factors in adapter.pairs.items():
        layer = modules.get(name)
        if layer is None or lora_class(layer) is None:
            yield f"{name} is no layer of this model that supports A and B"
        elif (name in adapter.embeddings) != isinstance(layer, nn.Embedding):
            yield f"{name} is a {type(layer).__name__}, which the adapter's tensors do not fit"
        elif factors.shape != (shape := _matrix_shape(name, layer, adapter)):
            yield f"{name} is {shape} in this model, the adapter wants {factors.shape}"
        elif factors.magnitude is not None and shape != matrix_shape(layer):
            yield f"{name} has DoRA's magnitudes over a resized vocabulary, which only a merge has"
    for name, value in adapter.full_params.items():
        module, _, leaf = name.rpartition(".")
        parameter = getattr(modules.get(module), leaf, None)
        if parameter is None:
            yield f"{name} is no parameter of this model"
            continue
        shape = parameter.shape
        if leaf == "weight" and is_quantized(modules[module]):
            shape = parameter.quant_state.shape  # (out, in)
            shape = shape[::-1] if was_conv1d(modules[module]) else shape
        longer = leaf == "weight" and len(value) > len(parameter)
        has_grown = longer and shape[1:] == value.shape[1:]  # a resized vocabulary
        if shape != value.shape and not has_grown:
            yield f"{name} is {tuple(shape)} in this model, {tuple(value.shape)} in the adapter"
    for name, pairs in adapter.parameters.items():
        module, config = modules.get(name, nn.Module()), adapter.config
        leaves = _target_leaves(name, module, config)
        if len(leaves) != len(pairs):
            yield f"{name} has {len(leaves)} of target_parameters, the adapter has {len(pairs)}"
            continue
        for leaf, (lora_A, lora_B) in zip(leaves, pairs, strict=True):
            experts, out_features, in_features = expert_sizes(module, leaf)
            ranks = experts * config.of(f"{name}.{leaf}").r
            wanted = (ranks, in_features), (out_features, ranks)
            if (lora_A.shape, lora_B.shape) != wanted:
                has = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
                yield f"{name}.{leaf} needs A {wanted[0]} and B {wanted[1]}, the adapter has {has}"
    for name, (ids, rows) in adapter.rows.items():
        layer, last = modules.get(name), int(ids.max())
        if layer is None or not has_rows(layer):
            yield f"{name} is no embedding or head of this model"
        elif (
            last >= len(adapter.full_params.get(f"{name}.weight", layer.weight))
            or rows.shape[1] != layer.weight.shape[1]
        ):
            row = f"row {last} of {rows.shape[1]} values"
            yield f"{name} is {tuple(layer.weight.shape)}, the adapter wants {row}"


def _matrix_shape(name: str, layer: nn.Module, adapter: AdapterFile) -> tuple[int, int]:
    """(out, in) of a layer, with the rows of a resized weight in the adapter."""
    full, (out_features, in_features) = (
        adapter.full_params.get(f"{name}.weight"),
        matrix_shape(layer),
    )
    if full is None or not has_rows(layer):
        return out_features, in_features
    return (out_features, len(full)) if name in adapter.embeddings else (len(full), in_features)
