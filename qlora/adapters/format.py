"""PEFT's adapter format: its config keys, and reading the two files strictly.

`KEYS` has each supported key of adapter_config.json and how it is read and written; a config that
sets any other key is refused by name. Every missing, unexpected, misshapen or non-finite tensor is
named in one error, where PEFT warns or ignores it (qlora.adapters.tensors). Pickled adapters
(adapter_model.bin) are not opened.

`combine` turns several adapters into one whose change is the weighted sum of theirs.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.adapters.tensors import PREFIX, Contents, ends_in, matches_any, sort_tensors
from qlora.base.checkpoint import Checkpoint
from qlora.config import LoraConfig, QuantConfig
from qlora.config.lora import REBASING_INITS
from qlora.config.tasks import task_typed
from qlora.config.types import require_types
from qlora.errors import UserError, require, some
from qlora.files import read_json, read_stop_ids, require_inside

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONVERT = (  # weights_only: it unpickles tensors and plain values only
    "convert it with: cd '{}' && python -c 'import torch; from safetensors.torch import save_file; "
    'save_file(torch.load("adapter_model.bin", weights_only=True), "adapter_model.safetensors")\''
)

# ---- the keys of adapter_config.json ----


class Key(NamedTuple):
    """A supported key: read, or without effect on a saved adapter."""

    default: Any = None  # PEFT's, where the key is absent, or a container is empty
    # the value in the file -> the field of that name in our LoraConfig, which is written
    read: Callable[[Any], Any] | None = None
    portable: bool = False  # expressed by A, B and target_modules: portable files have the default


def _same(value: Any) -> Any:
    return value


def _mapping(value: Any) -> Any:
    return {} if value is None else value


def _tuple(value: Any) -> Any:
    """A list, or each list in a mapping, as a tuple; a regular expression stays a string."""
    if isinstance(value, dict):
        return {name: _tuple(ids) for name, ids in value.items()}
    return tuple(value or ()) if isinstance(value, list | set | None) else value


KEYS: dict[str, Key] = {
    "alpha_pattern": Key({}, _mapping, portable=True),
    "auto_mapping": Key(),
    "base_model_name_or_path": Key(),
    "bias": Key("none", _same, portable=True),
    "ensure_weight_tying": Key(),
    "eva_config": Key(portable=True),
    "exclude_modules": Key(portable=True),
    "fan_in_fan_out": Key(False),
    "inference_mode": Key(),
    "init_lora_weights": Key(True, portable=True),
    "layers_pattern": Key(portable=True),
    "layers_to_transform": Key(portable=True),
    "lora_alpha": Key(8, _same),
    "lora_bias": Key(False, bool),
    "lora_dropout": Key(0.0, _same),
    "megatron_core": Key(),
    "modules_to_save": Key(None, _tuple, portable=True),
    "peft_type": Key(),
    "peft_version": Key(),
    "qalora_group_size": Key(),
    "r": Key(8, _same),
    "rank_pattern": Key({}, _mapping, portable=True),
    "revision": Key(),
    "target_modules": Key(None, _tuple),
    "target_parameters": Key(None, _tuple),
    "task_type": Key(None, _same),
    "trainable_token_indices": Key(None, _tuple, portable=True),
    "use_dora": Key(False, bool),
    "use_rslora": Key(False, bool, portable=True),
}
# Written alike for every adapter: A and B have values, and target_modules lists their layers.
SAVED = {"inference_mode": True, "init_lora_weights": True, "peft_type": "LORA"}
SAVED |= {"layers_pattern": None, "layers_to_transform": None}


def peft_values(config: LoraConfig, **of_model: Any) -> dict[str, Any]:
    """The contents of adapter_config.json; `of_model` are the keys that depend on the model."""
    written = {k: (getattr(config, k), key.default) for k, key in KEYS.items() if key.read}
    values = {k: default if value in ((), {}) else value for k, (value, default) in written.items()}
    ordered = dict(sorted((values | SAVED | of_model).items()))
    return json.loads(json.dumps(ordered, default=dict))  # type: ignore[no-any-return]  # as read


def require_supported(values: Mapping[str, Any], folder: Path) -> None:
    """Raise if a config sets a key or an init that is not supported."""
    unsupported = [f"{k}={value!r}" for k, value in values.items() if value and k not in KEYS]
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(REBASING_INITS):
        why = "it changes the base weights; PEFT saves it as a plain adapter with"
        why += " path_initial_model_for_weight_conversion"
        unsupported.append(f"init_lora_weights={init!r} ({why})")
    listed = ", ".join(unsupported)
    message = f"{folder / CONFIG}: not supported: {listed}. Use an adapter without it"
    require(not unsupported, message)


# ---- an adapter as read ----

# Types of what is read of the files without a field of LoraConfig.
OTHERS = {
    "base_model_name_or_path": str | None,
    "eva_config": Mapping[str, Any] | None,
    "exclude_modules": str | list[str] | None,
    "fan_in_fan_out": bool | None,
    "init_lora_weights": bool | str | None,
    "layer_replication": list[Any] | None,
    "layers_pattern": str | list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "lora_bias": bool | None,
    "peft_version": str | None,
    "revision": str | None,
    "use_dora": bool | None,
    "use_rslora": bool | None,
}
RECORD = {  # of the base, in the metadata
    "blocksize": int,
    "compute_dtype": Literal["auto", "bf16", "fp16", "fp32"],
    "double_quant": bool,
    "fingerprint": str | None,
    "heads": list[str],
    "labels": list[str],
    "pad_token_id": int | None,
    "quant_type": str,
    "rebased": Mapping[str, int],
    "revision": str | None,
    "skip_modules": list[str],
    "task": Literal["causal-lm", "seq2seq", "seq-cls", "token-cls"],
}


@dataclass(frozen=True, kw_only=True)
class AdapterFile(Contents):
    """An adapter as read: its contents, the tensors as stored, and the record of its base."""

    folder: Path
    config: LoraConfig
    base_model: str | None
    revision: str | None = None
    targets: tuple[str, ...] = ()
    """suffixes of the names of all layers with A and B, where the config lists them"""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """by their names in the file"""
    subtracted: dict[str, Factors] = field(default_factory=dict)
    """A' and B' that were subtracted from each layer's base (qlora.adapters.rebase); the last ranks
    of its pair subtract them again. Empty for an unchanged base"""
    stop_ids: frozenset[int] = frozenset()
    """the tokens that end an answer after training, where it recorded them"""
    base: dict[str, Any] = field(default_factory=dict)
    """the base's fingerprint and quantization; empty for adapters of other programs"""

    @property
    def task(self) -> str:
        """The task that its base was loaded for, else that of PEFT's task_type."""
        return self.base.get("task") or task_typed(self.config.task_type)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's labels; empty where they are not recorded."""
        return tuple(self.base.get("labels") or ())

    @property
    def has_tokenizer(self) -> bool:
        """Whether training saved its tokenizer with it."""
        return (self.folder / "tokenizer_config.json").is_file()

    @property
    def knows_quantization(self) -> bool:
        """Whether the base's quantization is recorded: not by PEFT, nor for a 16-bit base."""
        return "quant_type" in self.base

    @property
    def quantization(self) -> QuantConfig:
        """The base's quantization in training; QLoRA's defaults where it is not recorded."""
        recorded = {f.name: self.base[f.name] for f in fields(QuantConfig) if f.name in self.base}
        return QuantConfig(**recorded | {"skip_modules": tuple(self.base.get("skip_modules", ()))})

    def trains(self, param: str) -> bool:
        """Whether its config names the module of that parameter in modules_to_save."""
        return ends_in(param.rpartition(".")[0], self.config.modules_to_save)

    @property
    def bias_changes(self) -> dict[str, Tensor]:
        """Of each module with lora_bias: the change of its bias (out,), in fp32."""
        return {m: self.pairs[m].scaling * bias.float() for m, bias in self.lora_biases.items()}

    def missing(self, layers: Iterable[str]) -> list[str]:
        """A fault for each of a base's `layers` that the config targets and the files lack."""
        in_full = {name.rpartition(".")[0] for name in self.full_params}
        known = {*self.pairs, *self.parameters, *in_full}
        absent = [n for n in layers if n not in known and matches_any(n, self.targets)]
        return [f"{n} is in target_modules, but the files have no A and B for it" for n in absent]


def with_tied(adapter: AdapterFile, rows: Mapping[str, int], tied: list[list[str]]) -> AdapterFile:
    """The adapter with the resized base weight that it has of one module also for those `tied` to
    it (groups); `rows`: of the base's own, by module. Such a weight is no trained one."""
    full = dict(adapter.full_params)
    for group in tied:
        params = [f"{module}.weight" for module in group if module in rows]
        base = [p for p in params if p in full and not adapter.trains(p)]
        if base and len(full[base[0]]) != rows[base[0].removesuffix(".weight")]:
            full |= {param: full[base[0]] for param in params if param not in full}
    return replace(adapter, full_params=full)


def require_one_size(adapter: AdapterFile, sizes: Mapping[str, int], where: str) -> None:
    """Raise unless embedding and head, `sizes` by name, have as many rows with the adapter."""
    listed = " and ".join(f"{name} {size}" for name, size in sizes.items())
    fix = "its vocabulary was resized before training: save that model, and give it as the base"
    message = f"adapter {adapter.folder} does not fit {where}: rows of {listed}; {fix}"
    require(len({*sizes.values()}) < 2, message)


def _record(metadata: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """What the safetensors metadata tell of the base, as `ModelState.record` writes it."""
    where = f"{folder / WEIGHTS}: its qlora metadata"
    try:
        base = json.loads(metadata.get("qlora", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not a JSON object") from error
    require(isinstance(base, dict), f"{where} is not a JSON object")
    require_types(base, RECORD, where)
    try:
        QuantConfig(**{name: base[name] for name in ("quant_type", "blocksize") if name in base})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return dict(base)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read and check an adapter's two files.

    Raises:
        UserError: a file is missing or damaged, a setting is not supported, or tensors are missing,
            unexpected, misshapen or not finite; all offenders are named.
    """
    folder = Path(folder).expanduser()
    values, tensors, metadata = read_files(folder)
    require_supported(values, folder)
    config, contents = contents_of(values, tensors, folder)
    base = _record(metadata, folder)
    targets = values.get("target_modules")
    narrowing = ("exclude_modules", "layers_to_transform", "eva_config")
    if not isinstance(targets, list) or any(values.get(key) for key in narrowing):
        targets = ()
    return AdapterFile(
        **vars(contents),
        folder=folder,
        config=config,
        base_model=_base_model(values, folder),
        revision=values.get("revision"),
        targets=tuple(targets),
        tensors=tensors,
        subtracted=_subtracted(base.pop("rebased", {}), contents.pairs, folder),
        stop_ids=read_stop_ids(folder),
        base=base,
    )


def _base_model(values: Mapping[str, Any], folder: Path) -> str | None:
    """The base's name in adapter_config.json. A relative path that leads nowhere from the working
    directory is looked up from the parents of the adapter's `folder`."""
    name: str | None = values.get("base_model_name_or_path")
    if name and not values.get("revision") and not Path(name).expanduser().exists():
        near = (parent / name for parent in folder.absolute().parents)
        return next((str(path) for path in near if (path / "config.json").is_file()), name)
    return name


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """An adapter's config, tensors and metadata as stored; UserError for files of none."""
    if not (folder / CONFIG).is_file():
        what = "does not exist" if not folder.is_dir() else f"holds no {CONFIG}"
        raise UserError(f"adapter {folder} {what}: give the folder with {CONFIG} and {WEIGHTS}")
    require_inside(folder)
    values, path = read_json(folder / CONFIG, fix="Save the adapter again"), folder / WEIGHTS
    kind = values.get("peft_type")
    wanted = f"is no LoRA adapter: peft_type must be 'LORA', got {kind!r}"
    require(kind == "LORA", f"{folder / CONFIG} {wanted}")
    require_types(values, OTHERS, folder / CONFIG)
    has_pickle = (folder / "adapter_model.bin").exists()
    pickled = f" (adapter_model.bin is a pickle and is not opened: {CONVERT.format(folder)})"
    require(path.is_file(), f"{folder} holds no {WEIGHTS}{pickled * has_pickle}")
    size, free = path.stat().st_size, psutil.virtual_memory().available
    needs = f"{path} needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    require(size <= free, f"{needs}: is it an adapter?")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again") from error
    narrow = [n for n, t in tensors.items() if t.is_floating_point() and t.element_size() == 1]
    tensors |= {name: tensors[name].float() for name in narrow}  # torch has no fp8 arithmetic
    return values, tensors, metadata


def contents_of(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[LoraConfig, Contents]:
    """The config as a LoraConfig, and the tensors as Contents; UserError if they do not agree."""
    settings = {k: key.read(values.get(k, key.default)) for k, key in KEYS.items() if key.read}
    if not (settings["target_modules"] or settings["target_parameters"]):
        settings["target_modules"] = "all-linear"
    try:
        config = LoraConfig(**settings)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    contents, faults = sort_tensors(tensors, values, config)
    fix = "Save the adapter again, or use an earlier checkpoint"
    raise_faults(f"{folder / WEIGHTS}", faults, fix=fix)
    return config, contents


def raise_faults(what: str, faults: Iterable[str], *, fix: str) -> None:
    """One UserError that names all `faults`, if there are any."""
    faults = list(faults)
    more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
    require(not faults, f"{what}: {'; '.join(faults[:8])}{more}. {fix}")


# ---- an adapter over a base that was changed for it ----


def _subtracted(
    ranks: Mapping[str, int], pairs: dict[str, Factors], folder: Path
) -> dict[str, Factors]:
    """A' and B' of each layer, from its pair: A (r, in) stacked on A', B (out, r) beside -B'; the
    pair is cut to these."""
    faults = [
        f"{name} must have {2 * r} ranks, of which {r} subtract its A' and B' (metadata)"
        for name, r in ranks.items()
        if name not in pairs or len(pairs[name].lora_A) < 2 * r
    ]
    faults += [f"{name} is not in its metadata" for name in pairs if ranks and name not in ranks]
    raise_faults(f"{folder / WEIGHTS}", faults, fix="Save the adapter again")
    subtracted = {}
    for name, r in ranks.items():
        lora_A, lora_B, scaling, _ = pairs[name]
        subtracted[name] = Factors(lora_A[r : 2 * r], -lora_B[:, r : 2 * r], scaling)
        # a portable adapter has zeros behind them
        pairs[name] = Factors(lora_A[: 2 * r], lora_B[:, : 2 * r], scaling)
    return subtracted


def without_rebase(adapter: AdapterFile) -> AdapterFile:
    """The adapter with its trained ranks only, for the changed base; any other unchanged."""
    if not adapter.subtracted:
        return adapter
    pairs, tensors = dict(adapter.pairs), dict(adapter.tensors)
    ranks = {}
    for name, part in adapter.subtracted.items():
        lora_A, lora_B, scaling, _ = pairs[name]
        ranks[name] = r = len(lora_A) - len(part.lora_A)
        pairs[name] = Factors(lora_A[:r], lora_B[:, :r], scaling)  # (r, in), (out, r)
        for side, trained in zip("AB", pairs[name][:2], strict=True):
            tensors[f"{PREFIX}{name}.lora_{side}.weight"] = trained
    config = adapter.config.with_ranks(0.5)
    if any(config.of(name).r != r for name, r in ranks.items()):  # of a portable one, or a sum
        config = config.with_ranks_of(ranks)
    return replace(adapter, pairs=pairs, tensors=tensors, config=config)


# ---- whether an adapter fits a base, or other adapters ----


def require_same_base(adapter: AdapterFile, fingerprint: str | None, what: str) -> None:
    """Raise if the fingerprints of a base and of the adapter's own base are known and differ."""
    wanted = adapter.base.get("fingerprint")
    if wanted and fingerprint and wanted != fingerprint:
        raise UserError(
            f"adapter {adapter.folder} belongs to another base: it was trained on "
            f"{adapter.base_model} (fingerprint {wanted[:12]}), {what} is {fingerprint[:12]}. "
            "Give the base it was trained on"
        )


def _base_of(adapter: AdapterFile) -> str:
    """The base that adapter_config.json names, with its revision; an existing path in full."""
    path = Path(name := adapter.base_model or "an unnamed base").expanduser()
    name = str(path.resolve()) if path.exists() else name
    return f"{name} ({adapter.revision})" if adapter.revision else name


def require_fused_experts(adapter: AdapterFile, modules: Iterable[str]) -> None:
    """Raise for A and B of single experts, as of transformers 4, if the model has them fused."""
    single, modules = re.compile(r"\.experts\.\d+(\.|$)"), [*modules]
    parts = [name for name in adapter.pairs if single.search(name)]
    fused = any(m.endswith(".experts") for m in modules) and not any(map(single.search, modules))
    whose = f"adapter {adapter.folder} is for single experts ({some(parts)})"
    why = "transformers 5 has those of a layer fused, as one module"
    fix = "PEFT's PeftModel.from_pretrained converts it: then merge_and_unload and save_pretrained"
    require(not (parts and fused), f"{whose}; {why}. {fix}")


def require_same_codes(checkpoint: Checkpoint, adapter: AdapterFile) -> None:
    """Raise if a 4-bit base was quantized differently from the one in training."""
    if not checkpoint.is_quantized:
        return
    if adapter.subtracted:
        raise UserError(
            f"adapter {adapter.folder} was trained over a base that was changed for it (PiSSA, "
            "OLoRA or LoftQ), which needs the weights from before quantization, but "
            f"{checkpoint.folder} is 4-bit: give the 16-bit model as --base-model"
        )
    if adapter.knows_quantization:
        state = next(iter(checkpoint.records.values()))
        quant, words = adapter.quantization, "{} of blocksize {}, double_quant={}"
        is_nested = "nested_blocksize" in state
        stored = words.format(state["quant_type"].upper(), state["blocksize"], is_nested)
        trained = words.format(quant.quant_type.upper(), quant.blocksize, quant.double_quant)
        was = f"{stored}; adapter {adapter.folder} was trained on {trained}"
        fix = "give that 4-bit base, or the 16-bit model as --base-model"
        require(stored == trained, f"{checkpoint.folder} is {was}: {fix}")


def combine(
    adapters: Sequence[AdapterFile], weights: Sequence[float], *, base_model: str | None = None
) -> AdapterFile:
    """One adapter whose change is exactly the weighted sum of theirs, of w * scaling * B A.

    Args:
        base_model: the base that the user has given for all of them.
    Raises:
        UserError: they were trained on different bases, or hold more than A and B.
    """
    first = adapters[0]
    if len(adapters) == 1 and tuple(weights) == (1.0,):
        return first
    for adapter in adapters:
        kinds = {
            "DoRA's magnitudes": any(f.magnitude is not None for f in adapter.pairs.values()),
            "parameters trained in full": adapter.full_params,
            "biases": adapter.lora_biases,
            "target_parameters": adapter.parameters,
            "trained token rows": adapter.rows,
        }
        more = " and ".join(kind for kind, held in kinds.items() if held)
        alone = "which cannot be summed: merge it alone, without a weight"
        require(not more, f"{adapter.folder} holds {more}, {alone}")
        changed = "a base that was changed for it (PiSSA, OLoRA or LoftQ): merge it alone"
        is_alone = len(adapters) == 1 or not adapter.subtracted
        require(is_alone, f"{adapter.folder} was trained over {changed}")
        bases = "trained on different or differently quantized bases: merge them apart"
        require(adapter.base == first.base, f"{adapter.folder} and {first.folder} were {bases}")
        names = [_base_of(one) for one in (adapter, first)]
        is_known = base_model is not None or first.base.get("fingerprint")
        trained = f"{adapter.folder} was trained on {names[0]} and {first.folder} on {names[1]}"
        fix = "merge them apart, or give the base of both as --base-model"
        require(bool(is_known) or names[0] == names[1], f"{trained}: {fix}")
    pairs = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        weighted = zip(adapters, weights, strict=True)
        parts = [(a.pairs[name], weight) for a, weight in weighted if name in a.pairs]
        shapes = {factors.shape for factors, _ in parts}
        require(len(shapes) == 1, f"{name} must have one shape in these adapters, got {shapes}")
        pairs[name] = Factors.cat(parts)
    own, weight = without_rebase(first).pairs, weights[0]
    for name, part in first.subtracted.items():  # w B A + (1 - w) B' A' over the changed base
        pairs[name] = Factors.cat([(own[name], weight), (part, 1 - weight), (part, -1)])
    embeddings = frozenset().union(*(adapter.embeddings for adapter in adapters))
    stop_ids = frozenset().union(*(adapter.stop_ids for adapter in adapters))
    return replace(first, pairs=pairs, embeddings=embeddings, tensors={}, stop_ids=stop_ids)
