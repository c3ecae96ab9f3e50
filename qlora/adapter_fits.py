"""Does an adapter belong on a model? All that is wrong with that, before anything is put on."""

from typing import Any

from torch import nn

from qlora.adapter_module import base_modules, plain
from qlora.adapter_reader import AdapterFile, raise_faults, require_same_base
from qlora.config import LoraConfig
from qlora.frozen import is_quantized, matrix_shape, was_conv1d
from qlora.layers import expert_sizes
from qlora.matching import matches, takes_adapter
from qlora.rebase import require_originals
from qlora.targets import has_rows


def parameters_meant(name: str, module: nn.Module, config: LoraConfig) -> list[str]:
    """Which parameters of a module target_parameters means, in the module's order."""
    return [
        leaf
        for leaf, _ in module.named_parameters(recurse=False)
        if any(matches(f"{name}.{leaf}", e, is_regex=False) for e in config.target_parameters)
    ]


def check_fits(model: nn.Module, adapter: AdapterFile) -> None:
    """Refuse an adapter of another base: by fingerprint where known, and by every shape."""
    base: dict[str, Any] = getattr(model, "qlora_base", {})
    require_same_base(adapter, base.get("fingerprint"), "this model")
    modules = {name: plain(module) for name, module in base_modules(model).items()}
    faults = []
    labels = tuple(base.get("labels") or ())
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
    require_originals(model, adapter.taken)


def _misfits_of_parameters(modules: dict[str, Any], adapter: AdapterFile) -> list[str]:
    """What is trained in full, and parameters that are no layer's."""
    faults = []
    for name, value in adapter.whole.items():
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
