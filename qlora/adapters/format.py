"""Read an adapter's files: strictly, and whatever PEFT's LoRA can put into them.

Every missing, unexpected, misshapen or non-finite tensor is named, all at once (PEFT warns or stays
silent), and a config that asks for what is not understood is refused by name. Pickled adapters
(adapter_model.bin) are not opened. `adapter_tensors` says what the tensors are.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.utils import unpack_tensor_to_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.adapters.targets import matches
from qlora.adapters.tensors import PREFIX, Contents, sort_out
from qlora.base.checkpoint import Checkpoint
from qlora.config import LoraConfig, QuantConfig
from qlora.config.lora import INITS
from qlora.config.tasks import task_typed
from qlora.errors import UserError
from qlora.files import read_json
from qlora.ops import nf4

DORA = "DoRA's magnitudes"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Inits that change the base weights, so that the adapter is right only over the changed base.
REBASING_INITS = tuple(name for name, init in INITS.items() if init.changes_base)
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
    "target_parameters",
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
    full_params: dict[str, Tensor] = field(default_factory=dict)
    """parameters trained in full"""
    lora_biases: dict[str, Tensor] = field(default_factory=dict)
    """B's own biases (out,)"""
    parameters: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """of modules that are no layer: A (E * r, in) and B (out, r * E) of some of their parameters"""
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """of an embedding: ids (n,) and the rows (n, dim) that take their place"""
    fan_in_fan_out: bool = False
    revision: str | None = None
    targets: tuple[str, ...] = ()
    """endings of the names of all layers that have A and B, where the config says it so"""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """all of the above as they stand in the file"""
    subtracted: dict[str, Factors] = field(default_factory=dict)
    """what each layer's base was quantized without (qlora.adapters.rebase); its pair undoes that
    in the ranks behind those that were trained. Empty for a base as it was"""
    base: dict[str, Any] = field(default_factory=dict)
    """How its base was quantized, and the base's fingerprint; empty for adapters of others."""

    @property
    def task(self) -> str:
        """What its base was loaded for; as PEFT's task_type says, where the file does not."""
        return self.base.get("task") or task_typed(self.config.task_type)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's labels; none where the file does not say."""
        return tuple(self.base.get("labels") or ())

    @property
    def has_tokenizer(self) -> bool:
        """Whether training left its tokenizer beside it."""
        return (self.folder / "tokenizer_config.json").is_file()

    @property
    def knows_quantization(self) -> bool:
        """Whether the file says how its base was quantized; PEFT's do not, nor ours of a model that
        was 16-bit."""
        return "quant_type" in self.base

    @property
    def quantization(self) -> QuantConfig:
        """How the base was quantized in training; QLoRA's defaults where the file does not say."""
        if not self.knows_quantization:
            return QuantConfig()
        return QuantConfig(
            quant_type=self.base["quant_type"],
            blocksize=self.base["blocksize"],
            double_quant=self.base["double_quant"],
            compute_dtype=self.base["compute_dtype"],
            skip_modules=tuple(self.base["skip_modules"]),
        )

    def missing(self, layers: Iterable[str]) -> list[str]:
        """What is wrong: those of a base's layers that the config means and the files lack."""
        there = {
            *self.pairs,
            *self.parameters,
            *(name.rpartition(".")[0] for name in self.full_params),
        }
        return [
            f"{name} is in target_modules, and the files have no A and B for it"
            for name in layers
            if name not in there and any(matches(name, t, is_regex=False) for t in self.targets)
        ]

    @property
    def bias_changes(self) -> dict[str, Tensor]:
        """What is added to a module's bias (out,), in fp32."""
        return {m: self.pairs[m].scaling * bias.float() for m, bias in self.lora_biases.items()}

    def parts(self, embedding: str | None, head: str | None) -> bool:
        """Whether an embedding and an output head that were one are two with this adapter."""
        if any(m in self.pairs for m in (embedding, head)):
            return True
        own = [self.full_params.get(f"{m}.weight") for m in (embedding, head)]
        if own[0] is None or own[1] is None:
            return own[0] is not own[1]
        return not torch.equal(own[0], own[1])

    @property
    def extras(self) -> list[str]:
        """What it holds beside A and B of linear layers, in words."""
        found = {
            DORA: any(f.magnitude is not None for f in self.pairs.values()),
            "embeddings": bool(self.embeddings),
            "parameters trained in full": bool(self.full_params),
            "biases": bool(self.lora_biases),
            "parameters of modules that are no layer": bool(self.parameters),
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
    require_understood(values, folder)
    tensors, metadata = _read_tensors(folder)
    config, contents = contents_of(values, tensors, folder)
    base = _read_base_record(metadata, folder)
    taken = _taken(base.pop("rebased", {}), contents.pairs, folder)
    return AdapterFile(
        folder=folder,
        config=config,
        base_model=values.get("base_model_name_or_path"),
        **contents._asdict(),
        revision=values.get("revision"),
        fan_in_fan_out=bool(values.get("fan_in_fan_out")),
        targets=_all_targets(values),
        tensors=tensors,
        subtracted=taken,
        base=base,
    )


def without_rebase(adapter: AdapterFile) -> AdapterFile:
    """The adapter that goes with a base changed for it, of half the ranks; any other as it is."""
    if not adapter.subtracted:
        return adapter
    pairs, tensors = dict(adapter.pairs), dict(adapter.tensors)
    for name, taken in adapter.subtracted.items():
        r, pair = len(taken.lora_A), adapter.pairs[name]
        pairs[name] = Factors(pair.lora_A[:r], pair.lora_B[:, :r], pair.scaling)
        for side, half in zip("AB", pairs[name][:2], strict=True):
            tensors[f"{PREFIX}{name}.lora_{side}.weight"] = half
    ranks = {name: len(taken.lora_A) for name, taken in adapter.subtracted.items()}
    config = adapter.config.with_ranks(0.5)
    if any(config.of(name).r != r for name, r in ranks.items()):  # a portable one was padded
        config = config.with_ranks_of(ranks)
    return replace(adapter, pairs=pairs, tensors=tensors, config=config)


def read_files(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """An adapter's config, its tensors and their metadata, as they are in its two files.

    Raises:
        UserError: a file is missing or damaged, or is of no LoRA adapter.
    """
    folder = Path(folder).expanduser()
    return _read_config(folder), *_read_tensors(folder)


def contents_of(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[LoraConfig, Contents]:
    """What the tensors are, after the config.

    Raises:
        UserError: they do not go together, or a value is out of its range; all offenders are named.
    """
    config = _lora_config(values, folder)
    contents, faults = sort_out(tensors, values, config)
    raise_faults(
        f"{folder / WEIGHTS}", faults, mend="Save the adapter again, or take an earlier checkpoint"
    )
    return config, contents


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
    values = read_json(folder / CONFIG, mend="Save the adapter again")
    if values.get("peft_type") != "LORA":
        kind = values.get("peft_type")
        raise UserError(f"{folder / CONFIG} is no LoRA adapter: peft_type is {kind!r}, wanted LORA")
    return values


def require_understood(values: Mapping[str, Any], folder: Path) -> None:
    """Refuse a config that asks for what is not there."""
    init = values.get("init_lora_weights", True)
    unsupported = [f"{k}={v!r}" for k, v in values.items() if v and k not in UNDERSTOOD]
    if isinstance(init, str) and init.startswith(REBASING_INITS):
        unsupported.append(
            f"init_lora_weights={init!r} (it changes the base weights; PEFT saves it as a plain "
            "adapter with path_initial_model_for_weight_conversion)"
        )
    if unsupported:
        raise UserError(
            f"{folder / CONFIG} asks for what is not there yet: {', '.join(unsupported)}. "
            "Wanted a LoRA adapter without it"
        )


def _lora_config(values: Mapping[str, Any], folder: Path) -> LoraConfig:
    targets = values.get("target_modules")
    if not targets:
        targets = () if values.get("target_parameters") else "all-linear"
    try:
        return LoraConfig(
            r=values.get("r", 8),  # PEFT's own defaults
            lora_alpha=values.get("lora_alpha", 8),
            lora_dropout=values.get("lora_dropout", 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
            target_parameters=tuple(values.get("target_parameters") or ()),
            modules_to_save=tuple(values.get("modules_to_save") or ()),
            trainable_token_indices=_token_ids(values.get("trainable_token_indices")),
            bias=values.get("bias", "none"),
            lora_bias=bool(values.get("lora_bias")),
            task_type=values.get("task_type"),
        )
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error


def _all_targets(values: Mapping[str, Any]) -> tuple[str, ...]:
    """target_modules, if it is a list that nothing narrows."""
    narrower = ("exclude_modules", "layers_to_transform", "eva_config")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or any(values.get(name) for name in narrower):
        return ()
    return tuple(targets)


def _token_ids(given: Any) -> Any:
    if isinstance(given, dict):
        return {name: tuple(ids) for name, ids in given.items()}
    return tuple(given or ())


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


def _taken(
    ranks: Mapping[str, int], pairs: Mapping[str, Factors], folder: Path
) -> dict[str, Factors]:
    """What as many ranks, behind those of the trained part, undo in each layer."""
    faults = [
        f"{name} has no {2 * r} ranks, and its metadata says that {r} of them undo {r}"
        for name, r in ranks.items()
        if name not in pairs or len(pairs[name].lora_A) < 2 * r
    ]
    faults += [f"{name} is not in its metadata" for name in pairs if ranks and name not in ranks]
    raise_faults(f"{folder / WEIGHTS}", faults, mend="Save the adapter again")
    found = {}
    for name, r in ranks.items():
        lora_A, lora_B, scaling = pairs[name][:3]
        found[name] = Factors(lora_A[r : 2 * r], -lora_B[:, r : 2 * r], scaling)
    return found


def _read_base_record(metadata: Mapping[str, str], folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(metadata.get("qlora", "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / WEIGHTS}: its qlora metadata is no JSON object") from error


def require_same_codes(checkpoint: Checkpoint, adapter: AdapterFile) -> None:
    """Refuse a base in other 4-bit codes than those the adapter was trained on."""
    if checkpoint.is_quantized and adapter.subtracted:
        raise UserError(
            f"adapter {adapter.folder} was trained over a base that was changed for it (PiSSA, "
            f"OLoRA or LoftQ), which is made of the weights from before quantization, but "
            f"{checkpoint.folder} is 4-bit: give the 16-bit model as --base-model"
        )
    if checkpoint.is_quantized and adapter.knows_quantization:
        mark = next(name for name in checkpoint.tensors if nf4.RECORD_MARK in name)
        state = unpack_tensor_to_dict(checkpoint.read(mark))
        own = _in_words(state["quant_type"], state["blocksize"], "nested_blocksize" in state)
        quant = adapter.quantization
        trained = _in_words(quant.quant_type, quant.blocksize, quant.double_quant)
        if own != trained:
            raise UserError(
                f"{checkpoint.folder} is {own}; adapter {adapter.folder} was trained on {trained}: "
                "give the 4-bit base it was trained on, or the 16-bit model as --base-model"
            )


def _in_words(quant_type: str, blocksize: int, double_quant: bool) -> str:
    return f"{quant_type.upper()} of blocksize {blocksize}{' with nested scales' * double_quant}"


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
        if adapter.subtracted and len(adapters) > 1:
            raise UserError(
                f"{adapter.folder} was trained over a base that was changed for it (PiSSA, OLoRA "
                "or LoftQ): merge it alone"
            )
        if (adapter.base, adapter.fan_in_fan_out) != (first.base, first.fan_in_fan_out):
            raise UserError(
                f"{adapter.folder} and {first.folder} were trained on different bases, or on one "
                "that was quantized differently: they cannot be merged together"
            )
    pairs = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        found = [
            (factors, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if (factors := adapter.pairs.get(name))
        ]
        shapes = {factors.shape for factors, _ in found}
        if len(shapes) > 1:
            raise UserError(f"{name} has the shapes {shapes} in these adapters: they do not fit")
        pairs[name] = Factors.cat(found)
    embeddings = frozenset().union(*(adapter.embeddings for adapter in adapters))
    return replace(first, pairs=pairs, embeddings=embeddings, tensors={})
