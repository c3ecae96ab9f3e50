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
PARTS = {  # ending of a tensor's name: its kind (E: an embedding's)
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "EA",
    "lora_embedding_B": "EB",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "lora_bias",
    "token_adapter.trainable_tokens_delta": "rows",
}
PEFT_COPIES = ("modules_to_save", "original_module")
PEFT_HEADS = ("classifier", "score")  # PEFT lists both; a classifier has one of them
VOCABULARY = (  # PEFT saves these in full where they were resized
    "embed_tokens", "lm_head", "shared", "wte", "word_embeddings", "embed_in", "embed_out",
)  # fmt: skip
# within names of such weights: around one that is adapted, and beside one that is trained in full
INFIXES = r"\.(token_adapter\.base_layer|base_layer|modules_to_save|original_module)$"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The parameters of an adapter, by the names of the model's modules."""

    pairs: dict[str, Factors]  # of adapted layers; an embedding is a layer from vocab to dim
    embeddings: frozenset[str] = frozenset()  # those among `pairs`
    full_params: dict[str, Tensor] = field(default_factory=dict)  # by the parameters' names
    lora_biases: dict[str, Tensor] = field(default_factory=dict)  # of B (out,), not yet scaled
    # of target_parameters: A (E * r, in) and B (out, r * E) of each adapted parameter of a module,
    # in the module's order
    parameters: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    # of embeddings: token ids (n,) and their new rows (n, dim)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def sort_tensors(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], config: LoraConfig
) -> tuple[Contents, list[str]]:
    """The tensors of adapter_model.safetensors as Contents, and every fault in them.

    `config` is adapter_config.json, `values`, as read.
    """
    sorter = _Sorter(tensors, values, config)
    # in this order: full_params looks at all parts, parameters() takes its own out of them
    full_params, parameters = sorter.full_params(), sorter.parameters()
    pairs, lora_biases = sorter.layers()
    contents = Contents(
        pairs=pairs,
        embeddings=frozenset(name for name in pairs if "lora_embedding_A" in sorter.parts[name]),
        full_params=full_params,
        lora_biases=lora_biases,
        parameters=parameters,
        rows=sorter.rows(),
    )
    if not (sorter.parts or full_params or parameters):
        sorter.faults.append("no lora_A or lora_B tensor")
    return contents, sorter.faults


class _Sorter:
    def __init__(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], config: LoraConfig
    ) -> None:
        self.values, self.config = values, config
        self.parts: dict[str, dict[str, Tensor]] = {}  # {module: {name in PARTS: tensor}}
        self.others: dict[str, Tensor] = {}  # all other tensors, by their names without PREFIX
        self.faults: list[str] = []
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
            infix = re.search(INFIXES, module)
            module = re.sub(INFIXES, "", module)
            # a copy of what was trained, and the base's, beside the one without an infix
            if infix and infix[1] in PEFT_COPIES and f"{module}.{leaf}" in self.others:
                continue
            is_expected = (
                ends_in(module, (*saved, *VOCABULARY))
                or (leaf == "bias" and self.values.get("bias", "none") != "none")
                or (".base_layer." in name and module in self.parts)
            )
            if not is_expected:
                self.faults.append(f"unexpected {PREFIX}{name}")
            full_params[f"{module}.{leaf}"] = tensor
        modules = {name.rpartition(".")[0] for name in full_params}
        missing = [entry for entry in saved if not any(ends_in(m, (entry,)) for m in modules)]
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
            leaves = self._target_parameters(module)
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

    def _target_parameters(self, module: str) -> list[str]:
        """The parameters of `module` that target_parameters names: `module.leaf` entries, and bare
        `leaf` entries unless target_modules matches the module."""
        entries = [entry.rpartition(".")[::2] for entry in self.config.target_parameters]
        leaves = [leaf for above, leaf in entries if above and matches(module, above)]
        if matches_any(module, self.config.target_modules):
            return leaves
        return leaves + [leaf for above, leaf in entries if not above]

    def layers(self) -> tuple[dict[str, Factors], dict[str, Tensor]]:
        """Of each layer the matrices A (r, in) and B (out, r), and with lora_bias B's bias."""
        pairs, lora_biases = {}, {}
        for module, tensors in self.parts.items():
            if all(PARTS[part] == "rows" for part in tensors):
                continue
            is_embedding = any("embedding" in part for part in tensors)
            names = [f"lora_embedding_{s}" if is_embedding else f"lora_{s}.weight" for s in "AB"]
            layer, faults = self.config.of(module), []
            for side, name in zip("AB", names, strict=True):
                shape = tensors[name].shape if name in tensors else None
                if shape is None:
                    faults.append(f"missing {PREFIX}{module}.{name}")
                elif not _has_rank(side, shape, layer.r):
                    has = f"has shape {tuple(shape)}, its config says r={layer.r}"
                    faults.append(f"{PREFIX}{module}.{name} {has}")
            self.faults += faults
            if faults:
                continue
            lora_A, lora_B = (tensors[name].flatten(1) for name in names)
            vectors = (t.flatten() for part, t in tensors.items() if PARTS[part] == "magnitude")
            magnitude, bias = next(vectors, None), tensors.get("lora_B.bias")
            self._check(f"{module}.lora_magnitude_vector", magnitude, "use_dora", len(lora_B))
            if bias is not None or not is_embedding:
                self._check(f"{module}.lora_B.bias", bias, "lora_bias", len(lora_B))
            pairs[module] = Factors(lora_A, lora_B, layer.scaling, magnitude)
            if bias is not None:
                lora_biases[module] = bias
        return pairs, lora_biases

    def _check(self, name: str, vector: Tensor | None, setting: str, size: int) -> None:
        """A vector of `size` must be there if the config has its setting, and only then."""
        is_set, shape = bool(self.values.get(setting)), None if vector is None else vector.shape
        if (shape is not None) != is_set:
            what = f"{'missing' if is_set else 'unexpected'} {PREFIX}{name}"
            self.faults.append(f"{what}, its config says {setting}={is_set}")
        elif shape not in (None, (size,)):
            self.faults.append(f"{PREFIX}{name} has shape {tuple(shape)}, wanted {(size,)}")

    def rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The token ids and new rows of each embedding."""
        rows, indices = {}, self.values.get("trainable_token_indices")
        for module, tensors in self.parts.items():
            ids = indices
            if isinstance(indices, dict):
                ids = next((v for k, v in indices.items() if ends_in(module, (k,))), None)
            for tensor in (t for part, t in tensors.items() if PARTS[part] == "rows"):
                if isinstance(ids, list) and len(ids) == len(tensor):
                    rows[module] = torch.tensor(ids, dtype=torch.long), tensor
                else:
                    named = len(ids) if isinstance(ids, list) else "none"
                    has = f"has {len(tensor)} trained token rows, its config names {named}"
                    self.faults.append(f"{PREFIX}{module} {has}")
        if indices and not rows:
            self.faults.append("missing the rows of trainable_token_indices")
        return rows


def matches_any(name: str, targets: str | Iterable[str]) -> bool:
    """Whether a regular expression, or one of several name endings, matches `name`."""
    if isinstance(targets, str):
        return matches(name, targets, is_regex=True)
    return any(matches(name, target) for target in targets)


def ends_in(module: str, entries: Iterable[str]) -> bool:
    """PEFT's rule for modules_to_save: a suffix, which may begin within a word; or a parent."""
    return any(module.endswith(entry) or f"{entry}." in module for entry in entries)


def _has_rank(side: str, shape: torch.Size, r: int) -> bool:
    """Whether A is (r, …) or B is (out, r), of a convolution (out, r, 1…)."""
    if len(shape) < 2:
        return False
    return shape[0] == r if side == "A" else shape[1] == r == shape[1:].numel()
