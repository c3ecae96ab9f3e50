"""The tensors of adapter_model.safetensors, sorted into Contents and checked against the config.

Their names are PEFT's, each after the prefix `base_model.model.`:

    <module>.lora_A.weight (r, in), lora_B.weight (out, r)        a linear layer
    <module>.lora_A.weight (r, in, *kernel), lora_B (out, r, 1…)  a convolution, read as matrices
    <module>[.base_layer…].lora_A.weight (E * r, in), …           target_parameters, as E experts
    <module>.lora_magnitude_vector (out,)                         DoRA's magnitudes
    <module>.lora_B.bias (out,)                                   lora_bias, added to the bias
    <module>.lora_embedding_A (r, vocab), lora_embedding_B (dim, r)      an embedding
    <module>.token_adapter.trainable_tokens_delta (n, dim)        new rows of an embedding
    <module>.weight, .bias                                        trained in full
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.adapters.targets import matches
from qlora.config import LoraConfig
from qlora.config.tasks import TASKS, task_typed

PREFIX = "base_model.model."
PARTS = {  # ending of a tensor's name: its kind
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    "token_adapter.trainable_tokens_delta": "rows",
}
PEFT_HEADS = ("classifier", "score")  # PEFT lists both; a classifier has one of them
VOCABULARY = ("embed_tokens", "lm_head")  # PEFT saves these in full where they were resized


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The parameters of an adapter, by the names of the model's modules."""

    pairs: dict[str, Factors]
    """of each adapted layer; an embedding is a layer from vocab to dim"""
    embeddings: frozenset[str] = frozenset()
    """the embeddings among `pairs`"""
    full_params: dict[str, Tensor] = field(default_factory=dict)
    """by parameter name: values trained in full"""
    lora_biases: dict[str, Tensor] = field(default_factory=dict)
    """biases of B (out,), not yet multiplied by their module's scaling"""
    parameters: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """of target_parameters: A (E * r, in) and B (out, r * E) of each adapted parameter of a module,
    in the module's order"""
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """of an embedding: token ids (n,) and their new rows (n, dim)"""


def sort_tensors(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], config: LoraConfig
) -> tuple[Contents, list[str]]:
    """The tensors of adapter_model.safetensors as Contents, and every fault in them.

    Args:
        values: adapter_config.json.
        config: the same, as read.
    """
    sorter = _Sorter(values, config)
    sorter.split(tensors)
    # in this order: full_params looks at all parts, parameters() takes its own out of them
    full_params, parameters = sorter.full_params(), sorter.parameters()
    pairs = sorter.pairs()
    contents = Contents(
        pairs=pairs,
        embeddings=frozenset(name for name in pairs if "lora_embedding_A" in sorter.parts[name]),
        full_params=full_params,
        lora_biases=sorter.lora_biases(pairs),
        parameters=parameters,
        rows=sorter.rows(),
    )
    if not (sorter.parts or full_params or parameters):
        sorter.faults.append("no lora_A or lora_B tensor")
    return contents, sorter.faults


class _Sorter:
    def __init__(self, values: Mapping[str, Any], config: LoraConfig) -> None:
        self.values, self.config = values, config
        self.parts: dict[str, dict[str, Tensor]] = {}
        """{module: {name in PARTS: tensor}}"""
        self.others: dict[str, Tensor] = {}
        """all other tensors, by their names without PREFIX"""
        self.faults: list[str] = []

    def split(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `parts` and `others`."""
        endings = "|".join(map(re.escape, PARTS))
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                self.faults.append(f"{key} is {tensor.dtype}, wanted floating point")
            elif not torch.isfinite(tensor).all():
                self.faults.append(f"{key} holds NaN or infinity")
            name = key.removeprefix(PREFIX)
            if name == key:
                self.faults.append(f"unexpected {key}")
            elif match := re.fullmatch(rf"(.+)\.({endings})", name):
                self.parts.setdefault(match[1], {})[match[2]] = tensor
            else:
                self.others[name] = tensor

    def full_params(self) -> dict[str, Tensor]:
        """The others by parameter name, without PEFT's `.base_layer`; the config must name each."""
        saved = tuple(self.values.get("modules_to_save") or ())
        full_params = {}
        for name, tensor in self.others.items():
            module, _, leaf = name.rpartition(".")
            module = module.removesuffix(".base_layer")
            is_expected = (
                _ends_in(module, (*saved, *VOCABULARY))
                or (leaf == "bias" and self.values.get("bias", "none") != "none")
                or (".base_layer." in name and module in self.parts)
            )
            if not is_expected:
                self.faults.append(f"unexpected {PREFIX}{name}")
            full_params[f"{module}.{leaf}"] = tensor
        modules = {name.rpartition(".")[0] for name in full_params}
        missing = [entry for entry in saved if not any(_ends_in(m, (entry,)) for m in modules)]
        if modules and TASKS[task_typed(self.values.get("task_type"))].trains_head:
            missing = [entry for entry in missing if entry not in PEFT_HEADS]
        self.faults += [f"missing {e}, which its config says was trained in full" for e in missing]
        return full_params

    def parameters(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Pairs of target_parameters, taken out of `parts`. PEFT wraps the module once for each,
        so the one with most `.base_layer` comes first."""
        parameters: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in sorted(self.parts, key=lambda name: -name.count(".base_layer")):
            module = name.replace(".base_layer", "")
            leaves = _target_parameters(module, self.config)
            if not leaves:
                continue
            tensors = self.parts.pop(name)
            ranks = sorted({self.config.of(f"{module}.{leaf}").r for leaf in leaves})
            lora_A, lora_B = (tensors.get(f"lora_{side}.weight") for side in "AB")
            if lora_A is None or lora_B is None:
                self.faults.append(f"{PREFIX}{name} lacks lora_A.weight or lora_B.weight")
            elif len(lora_A) != lora_B.shape[-1] or all(len(lora_A) % r for r in ranks):
                self.faults.append(
                    f"{PREFIX}{name}.lora_A.weight has shape {tuple(lora_A.shape)} and "
                    f"lora_B.weight {tuple(lora_B.shape)}, its config says "
                    f"r={' or '.join(map(str, ranks))} for each expert"
                )
            else:
                parameters.setdefault(module, []).append((lora_A, lora_B))
        return parameters

    def pairs(self) -> dict[str, Factors]:
        """The factors of each layer, as matrices A (r, in) and B (out, r)."""
        pairs = {}
        for module, tensors in self.parts.items():
            if all(PARTS[part] == "rows" for part in tensors):
                continue
            is_embedding = any("embedding" in part for part in tensors)
            pattern = "lora_embedding_{}" if is_embedding else "lora_{}.weight"
            names, layer = [pattern.format(side) for side in "AB"], self.config.of(module)
            faults = [f"missing {PREFIX}{module}.{name}" for name in names if name not in tensors]
            if not faults:
                faults = [
                    f"{PREFIX}{module}.{name} has shape {tuple(tensors[name].shape)}, "
                    f"its config says r={layer.r}"
                    for side, name in zip("AB", names, strict=True)
                    if not _has_rank(side, tensors[name], layer.r)
                ]
            self.faults += faults
            if not faults:
                lora_A, lora_B = (tensors[name].flatten(1) for name in names)
                magnitude = self._magnitude(module, len(lora_B))
                pairs[module] = Factors(lora_A, lora_B, layer.scaling, magnitude)
        return pairs

    def _magnitude(self, module: str, out_features: int) -> Tensor | None:
        """DoRA's (out,), if the module has it."""
        vectors = [t for part, t in self.parts[module].items() if PARTS[part] == "magnitude"]
        use_dora = bool(self.values.get("use_dora"))
        if bool(vectors) != use_dora:
            has = "has" if vectors else "has no"
            self.faults.append(
                f"{PREFIX}{module} {has} lora_magnitude_vector, its config says {use_dora=}"
            )
        if not vectors:
            return None
        magnitude = vectors[0].flatten()
        if magnitude.shape != (out_features,):
            self.faults.append(
                f"{PREFIX}{module}.lora_magnitude_vector has shape {tuple(magnitude.shape)}, "
                f"wanted {(out_features,)}"
            )
        return magnitude

    def lora_biases(self, pairs: Mapping[str, Factors]) -> dict[str, Tensor]:
        lora_biases, is_set = {}, self.values.get("lora_bias")
        for module, tensors in self.parts.items():
            name, bias = f"{PREFIX}{module}.lora_B.bias", tensors.get("lora_B.bias")
            if bias is None and is_set and "lora_B.weight" in tensors:
                self.faults.append(f"missing {name}")
            elif bias is not None and not is_set:
                self.faults.append(f"unexpected {name}")
            elif bias is not None and module in pairs:
                wanted = (len(pairs[module].lora_B),)
                if bias.shape != wanted:
                    self.faults.append(f"{name} has shape {tuple(bias.shape)}, wanted {wanted}")
                lora_biases[module] = bias
        return lora_biases

    def rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The token ids and new rows of each embedding."""
        rows, indices = {}, self.values.get("trainable_token_indices")
        for module, tensors in self.parts.items():
            ids = indices
            if isinstance(indices, dict):
                ids = next((v for k, v in indices.items() if _ends_in(module, (k,))), None)
            for tensor in (t for part, t in tensors.items() if PARTS[part] == "rows"):
                if isinstance(ids, list) and len(ids) == len(tensor):
                    rows[module] = torch.tensor(ids, dtype=torch.long), tensor
                else:
                    named = len(ids) if isinstance(ids, list) else "none"
                    self.faults.append(
                        f"{PREFIX}{module} has {len(tensor)} trained token rows, its config names "
                        f"{named}"
                    )
        if indices and not rows:
            self.faults.append("missing the rows of trainable_token_indices")
        return rows


def _ends_in(module: str, entries: Iterable[str]) -> bool:
    """PEFT's rule for modules_to_save: a suffix, which may begin within a word; or a parent."""
    return any(module.endswith(entry) or f"{entry}." in module for entry in entries)


def _has_rank(side: str, tensor: Tensor, r: int) -> bool:
    """Whether A is (r, …) or B is (out, r), of a convolution (out, r, 1…)."""
    if tensor.ndim < 2:
        return False
    return len(tensor) == r if side == "A" else tensor.shape[1] == r == tensor.shape[1:].numel()


def _target_parameters(module: str, config: LoraConfig) -> list[str]:
    """The parameters of `module` that target_parameters names: `module.leaf` entries, and bare
    `leaf` entries unless target_modules matches the module."""
    entries = [entry.rpartition(".")[::2] for entry in config.target_parameters]
    leaves = [leaf for above, leaf in entries if above and matches(module, above, is_regex=False)]
    targets = config.target_modules
    is_regex = isinstance(targets, str)
    patterns = (targets,) if isinstance(targets, str) else targets
    if any(matches(module, pattern, is_regex=is_regex) for pattern in patterns):
        return leaves
    return leaves + [leaf for above, leaf in entries if not above]
