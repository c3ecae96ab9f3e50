"""What an adapter's tensors are: sorted by their names, and checked against its config.

    <module>.lora_A.weight (r, in), lora_B.weight (out, r)        a linear layer's change
    <module>.lora_A.weight (r, in, *kernel), lora_B (out, r, 1…)  a convolution's, read as matrices
    <module>[.base_layer…].lora_A.weight (E * r, in), …           those of a module's parameters
    <module>.lora_magnitude_vector (out,)                         DoRA's magnitudes beside it
    <module>.lora_B.bias (out,)                                   lora_bias, added to the bias
    <module>.lora_embedding_A (r, vocab), lora_embedding_B (dim, r)      an embedding's change
    <module>.token_adapter.trainable_tokens_delta (n, dim)        rows of an embedding, anew
    <module>.weight, .bias                                        trained in full

each after the prefix `base_model.model.`: PEFT's format.

Several adapters read as one: for a merge, the weighted sum of their changes, exactly.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.adapters.targets import matches
from qlora.config import LoraConfig
from qlora.config.tasks import TASKS, task_typed

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
PEFT_HEADS = ("classifier", "score")  # it lists both, of which a classifier has one
VOCABULARY = ("embed_tokens", "lm_head")  # PEFT saves these whole where they were resized


class Contents(NamedTuple):
    """What an adapter holds, under the model's own names."""

    pairs: dict[str, Factors]
    """of each adapted module: a linear layer, or an embedding as one from vocab to dim"""
    embeddings: frozenset[str]
    """those of `pairs` that are embeddings"""
    full_params: dict[str, Tensor]
    """parameters trained in full"""
    lora_biases: dict[str, Tensor]
    """B's own biases (out,), which a module's scaling is yet to multiply"""
    parameters: dict[str, list[tuple[Tensor, Tensor]]]
    """of modules that are no layer: A (E * r, in) and B (out, r * E) of some of their parameters,
    in the module's order"""
    rows: dict[str, tuple[Tensor, Tensor]]
    """of an embedding: ids (n,) and the rows (n, dim) that take their place"""


def sort_out(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], config: LoraConfig
) -> tuple[Contents, list[str]]:
    """What `tensors` are, and everything that is wrong with them.

    Args:
        tensors: of adapter_model.safetensors, by their names there.
        values: adapter_config.json.
        config: what was read from it.
    """
    parts, full_params, faults = _sort(tensors, values)
    parameters = _parameters(parts, config, faults)
    pairs, embeddings = _pair_up(parts, values, config, faults)
    lora_biases, rows = _others(parts, pairs, values, faults)
    if not (parts or full_params or parameters):
        faults.append("no lora_A or lora_B tensor")
    return Contents(pairs, embeddings, full_params, lora_biases, parameters, rows), faults


def _sort(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """The parts of each adapted module, the parameters saved in full, and what is wrong so far."""
    parts: dict[str, dict[str, Tensor]] = {}
    full_params: dict[str, Tensor] = {}
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
            full_params[name] = tensor
    saved = tuple(values.get("modules_to_save") or ())
    for name in list(full_params):
        module, _, kind = name.rpartition(".")
        module = module.removesuffix(".base_layer")
        explained = (
            _ends_in(module, (*saved, *VOCABULARY))
            or (kind == "bias" and values.get("bias", "none") != "none")
            or (".base_layer." in name and module in parts)
        )
        if not explained:
            faults.append(f"unexpected {PREFIX}{name}")
        full_params[f"{module}.{kind}"] = full_params.pop(name)
    missing = [
        e for e in saved if not any(_ends_in(n.rpartition(".")[0], (e,)) for n in full_params)
    ]
    if full_params and TASKS[task_typed(values.get("task_type"))].trains_head:
        missing = [entry for entry in missing if entry not in PEFT_HEADS]
    faults += [f"missing {e}, which its config says was trained in full" for e in missing]
    return parts, full_params, faults


def _ends_in(module: str, entries: Iterable[str]) -> bool:
    """PEFT's rule for modules_to_save: an ending, be it of a word; or of a module above it."""
    return any(module.endswith(entry) or f"{entry}." in module for entry in entries)


def _parameters(
    parts: dict[str, dict[str, Tensor]], config: LoraConfig, faults: list[str]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Those of target_parameters, taken out of `parts`. PEFT wraps a module once for each."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in sorted(parts, key=lambda name: -name.count(".base_layer")):
        module = part.replace(".base_layer", "")
        leaves = _leaves_of(module, config)
        if not leaves:
            continue
        held = parts.pop(part)
        ranks = sorted({config.of(f"{module}.{leaf}").r for leaf in leaves})
        lora_A, lora_B = (held.get(f"lora_{s}.weight") for s in "AB")
        if lora_A is None or lora_B is None:
            faults.append(f"{PREFIX}{part} has not both of lora_A.weight and lora_B.weight")
        elif len(lora_A) != lora_B.shape[-1] or all(len(lora_A) % r for r in ranks):
            faults.append(
                f"{PREFIX}{part}.lora_A.weight has shape {tuple(lora_A.shape)} and lora_B.weight "
                f"{tuple(lora_B.shape)}, its config says r={' or '.join(map(str, ranks))} for each "
                "expert"
            )
        else:
            found.setdefault(module, []).append((lora_A, lora_B))
    return found


def _leaves_of(module: str, config: LoraConfig) -> list[str]:
    """The names of the parameters that target_parameters may mean in a module: those that are
    named with it, or alone where target_modules does not mean the module."""
    named = [entry.rpartition(".")[::2] for entry in config.target_parameters]
    found = [leaf for above, leaf in named if above and matches(module, above, is_regex=False)]
    targets = config.target_modules
    is_regex = isinstance(targets, str)
    entries = (targets,) if isinstance(targets, str) else targets
    if any(matches(module, entry, is_regex=is_regex) for entry in entries):
        return found
    return found + [leaf for above, leaf in named if not above]


def _pair_up(
    parts: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
    config: LoraConfig,
    faults: list[str],
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
        own = config.of(module)
        wrong = [
            f"{PREFIX}{module}.{name} has shape {tuple(found[name].shape)}, "
            f"its config says r={own.r}"
            for name, axis in zip(names, (0, 1), strict=True)
            if found[name].ndim < 2 or found[name].shape[axis] != own.r
        ]
        faults += wrong
        if wrong:
            continue
        lora_A, lora_B = (found[name].flatten(1) for name in names)
        if lora_B.shape[1] != own.r:
            shape = tuple(found[names[1]].shape)
            faults.append(
                f"{PREFIX}{module}.{names[1]} has shape {shape}, its config says r={own.r}"
            )
            continue
        magnitude = next((t for part, t in found.items() if PARTS[part] == "magnitude"), None)
        magnitude = magnitude if magnitude is None else magnitude.flatten()
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
        pairs[module] = Factors(lora_A, lora_B, own.scaling, magnitude)
        if is_embedding:
            embeddings.add(module)
    return pairs, frozenset(embeddings)


def _others(
    parts: Mapping[str, Mapping[str, Tensor]],
    pairs: Mapping[str, Factors],
    values: Mapping[str, Any],
    faults: list[str],
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """B's biases, and the new rows of embeddings."""
    lora_biases, rows = {}, {}
    for module, found in parts.items():
        if values.get("lora_bias") and "lora_B.weight" in found and "lora_B.bias" not in found:
            faults.append(f"missing {PREFIX}{module}.lora_B.bias")
        if "lora_B.bias" in found and not values.get("lora_bias"):
            faults.append(f"unexpected {PREFIX}{module}.lora_B.bias")
        elif "lora_B.bias" in found and module in pairs:
            bias, wanted = found["lora_B.bias"], (len(pairs[module].lora_B),)
            if bias.shape != wanted:
                shape = f"shape {tuple(bias.shape)}, wanted {wanted}"
                faults.append(f"{PREFIX}{module}.lora_B.bias has {shape}")
            lora_biases[module] = bias
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
    return lora_biases, rows
