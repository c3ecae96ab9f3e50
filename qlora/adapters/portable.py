"""An adapter written so that every program takes it, and computes what was trained.

    python -m qlora.portable --adapter out [--output-dir out-portable]

prints what each consumer (qlora.adapters.portable) makes of an adapter, and writes the portable
one. That is the part of PEFT's format which all of them read alike: A and B of linear layers, one
r, one lora_alpha, a list of targets, and nothing else. The function stays as it is:

    scaling      lora_alpha = scaling * r, a float; rsLoRA becomes lora_alpha / r, to a rounding of
                 a double
    patterns     one scaling for all; what another layer had more or less goes into its B. A power
                 of two is exact in any dtype; where it is not, that B becomes fp32
    ranks        rows of zeros below A and columns of zeros beside B, up to the highest r: a server
                 reserves that much for each layer anyway
    targets      a list; full names where it was an expression or only some of the layers

What A and B cannot say is refused by name: DoRA, biases, embeddings, modules and token rows trained
in full. merge_dequant.py folds all of those in. Left out are zeros for layers that an adapter lacks
beside others (SGLang wants v_proj where q_proj is): their shapes are the base's.

What the programs that load PEFT adapter files refuse, and what they ignore without a word.

Ignoring is the worse of the two: the program runs, and another model answers. Each rule is a line
of a table below, a letter for each consumer: `R` refuses, `I` ignores, `-` takes it; the worse one
where that depends on the layer. They come from the sources of

    vLLM 0.33.0         vllm/lora: peft_helper.py (validate_legal, get_rank_and_scaling),
                        lora_model.py, utils.py (parse_fine_tuned_lora_name)
    SGLang 0.5.23       python/sglang/srt/lora: lora_manager.py (validate_new_adapter,
                        init_lora_shapes), lora.py (scaling, normalize_qkv_proj), mem_pool.py
    llama.cpp           convert_lora_to_gguf.py; src/llama-adapter.cpp, .h
    TGI                 server/text_generation_server/adapters/lora.py (prepare_weights)
    transformers        integrations/peft.py (load_adapter), the worst of 5.17 to 5.23: 5.17 alone
                        loads nothing that was trained in full
    PEFT 0.21           reads what it wrote

Left out is what a file cannot tell: the layers that a server knows of each family, how it was
started (vLLM and SGLang have a --max-lora-rank), LoRA on an output head that is tied to its
embedding (llama.cpp refuses it), an added_tokens.json beside the adapter (SGLang refuses new ones).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora.adapters.format import CONFIG, WEIGHTS, contents_of, read_files, require_understood
from qlora.adapters.tensors import PARTS, PREFIX
from qlora.config import PortableConfig
from qlora.config.lora import INITS, pattern_key
from qlora.errors import UserError
from qlora.files import publishing, require_new


def portable_subset(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same adapter in what every consumer reads; tensors that need no change are themselves.

    Args:
        values: adapter_config.json.
        tensors: of adapter_model.safetensors, by their names there.
        folder: what an error calls the adapter.

    Raises:
        UserError: it holds what A and B of linear layers cannot say, or its tensors and its config
            do not go together.
    """
    _refuse_lost(values, tensors, folder)
    require_understood(values, folder)
    _, contents = contents_of(values, tensors, folder)
    if not contents.pairs:
        raise UserError(f"adapter {folder} holds no lora_A and lora_B: there is nothing to write")
    r = max(len(factors.lora_A) for factors in contents.pairs.values())
    scaling = _common_scaling([factors.scaling for factors in contents.pairs.values()])
    baked = dict(tensors)
    for module, factors in contents.pairs.items():
        lora_B = _times(factors.lora_B, factors.scaling / scaling)
        padded = factors._replace(lora_B=lora_B).padded(r)
        baked[f"{PREFIX}{module}.lora_A.weight"] = padded.lora_A
        baked[f"{PREFIX}{module}.lora_B.weight"] = padded.lora_B
    return _portable_values(values, list(contents.pairs), r, scaling * r), baked


def _refuse_lost(values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    found = findings(values, tensors, LOST)
    if found:
        mends = dict.fromkeys(rule.mend for rule, _ in found)
        parts = [", ".join(w for rule, w in found if rule.mend == m) + f": {m}" for m in mends]
        raise UserError(f"adapter {folder} holds what is not portable: {'; '.join(parts)}")


def _common_scaling(scalings: list[float]) -> float:
    """The one that most layers have up to a power of two, and of these the most common."""

    def fit(scaling: float) -> tuple[int, int]:
        exact = sum(math.frexp(other / scaling)[0] == 0.5 for other in scalings)
        return exact, scalings.count(scaling)

    return max(dict.fromkeys(scalings), key=fit)


def _times(lora_B: Tensor, ratio: float) -> Tensor:
    """B times `ratio`: in its dtype where that is exact, else in fp32."""
    if ratio == 1:
        return lora_B
    wanted = lora_B.double() * ratio
    kept = wanted.to(lora_B.dtype)
    return kept if torch.equal(kept.double(), wanted) else wanted.float()


def _portable_values(
    values: Mapping[str, Any], modules: Iterable[str], r: int, lora_alpha: float
) -> dict[str, Any]:
    choices = ("exclude_modules", "layers_to_transform", "layers_pattern")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or any(values.get(name) for name in choices):
        targets = sorted(modules)
    plain: dict[str, Any] = {
        "alpha_pattern": {},
        "bias": "none",
        "eva_config": None,
        "init_lora_weights": True,
        "lora_alpha": int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha,
        "modules_to_save": None,
        "r": r,
        "rank_pattern": {},
        "target_modules": targets,
        "trainable_token_indices": None,
        "use_rslora": False,
        **dict.fromkeys(choices),
    }
    return dict(sorted({**values, **plain}.items()))


# ---- the command ----


def make_portable(config: PortableConfig) -> None:
    """Print what each consumer makes of the adapter; write the portable one where asked to."""
    folder = Path(config.adapter).expanduser()
    output = Path(config.output_dir).expanduser() if config.output_dir else None
    if output:
        require_new(output)
    values, tensors, metadata = read_files(folder)
    contents_of(values, tensors, folder)
    print(table(problems(values, tensors)))
    if output:
        values, tensors = portable_subset(values, tensors, folder)
        with publishing(output) as partial:
            save_file(tensors, partial / WEIGHTS, metadata=metadata)
            text = json.dumps(values, indent=2) + "\n"
            (partial / CONFIG).write_text(text, encoding="utf-8")
        print(f"\nThe same function, in {output}:\n{table(problems(values, tensors))}")
    elif (baked := findings(values, tensors, BAKED)) and not findings(values, tensors, LOST):
        print(f"\n--output-dir DIR writes it without {', '.join(what for _, what in baked)}.")


def table(found: Mapping[str, list[str]]) -> str:
    """A line for each consumer."""
    return "\n".join(f"{who:<14}{'; '.join(what) or 'takes it'}" for who, what in found.items())


CONSUMERS = ("vLLM", "SGLang", "llama.cpp", "TGI", "transformers", "PEFT")
# Inits that leave the base as it was, vLLM's _init_is_supported, which counts lora_ga among them.
# After the others (PiSSA, OLoRA, CorDA, LoftQ) A and B are right over a changed base only; PEFT
# makes that base anew.
PLAIN_INITS = ("lora_ga", *(name for name, init in INITS.items() if not init.changes_base))
HIGHEST_RANK = 512  # vllm/config/lora.py, MaxLoRARanks


@dataclass(frozen=True)
class Adapter:
    """An adapter as its consumers see it."""

    values: Mapping[str, Any]
    """adapter_config.json"""
    shapes: Mapping[str, tuple[int, ...]]
    """of each tensor"""

    def of_kind(self, *kinds: str) -> list[str]:
        """Modules with tensors of these kinds (see `kind_of`)."""
        return [module for module, kind in map(kind_of, self.shapes) if kind in kinds]

    @property
    def ranks(self) -> dict[str, int]:
        """Of each module with an A (r, in)."""
        kinds = {name: kind_of(name) for name in self.shapes}
        lora_A = {name: module for name, (module, kind) in kinds.items() if kind in ("A", "EA")}
        return {module: self.shapes[name][0] for name, module in lora_A.items()}


def kind_of(key: str) -> tuple[str, str]:
    """A tensor's module, and what it is: A, B, EA, EB (an embedding's), magnitude, lora_bias, rows,
    copy (of a base weight), bias, head (a classifier's), norm or whole."""
    name = key.removeprefix(PREFIX)
    for part, kind in PARTS.items():
        if name.endswith(f".{part}"):
            kind = "lora_bias" if kind == "bias" else kind
            return name.removesuffix(f".{part}"), f"E{kind}" if "embedding" in part else kind
    module, _, last = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if last == "weight" and leaf == "base_layer":
        return module, "copy"
    if leaf in ("score", "classifier"):
        return module, "head"
    if last == "bias":
        return module, "bias"
    return module, "norm" if "_layernorm" in name or ".norm" in name else "whole"


# ---- what to look for ----

Offenders = Callable[[Adapter], Iterable[str]]


def _set(*names: str) -> Offenders:
    """Settings that ask for something."""
    return lambda a: [f"{name}={a.values[name]!r}" for name in names if a.values.get(name)]


def _missing(*names: str) -> Offenders:
    return lambda a: [name for name in names if name not in a.values]


def _kinds(*kinds: str) -> Offenders:
    return lambda a: _leaves(a.of_kind(*kinds))


def _dora(a: Adapter) -> list[str]:
    return _leaves(a.of_kind("magnitude")) or list(_set("use_dora")(a))


def _alphas(a: Adapter) -> list[str]:
    """Entries of alpha_pattern that give a module another alpha."""
    pattern = a.values.get("alpha_pattern") or {}
    used = {pattern_key(pattern, module) for module in a.ranks}
    return [key for key in pattern if key in used and pattern[key] != a.values.get("lora_alpha", 8)]


def _other_ranks(a: Adapter) -> list[str]:
    own = a.values.get("r", 8)
    return _leaves(module for module, r in a.ranks.items() if r != own)


def _high_rank(a: Adapter) -> list[str]:
    highest = max(a.ranks.values(), default=0)
    return [f"r={highest}, at most {HIGHEST_RANK}"] if highest > HIGHEST_RANK else []


def _regex(a: Adapter) -> list[str]:
    targets = a.values.get("target_modules", [])
    is_list = isinstance(targets, list) or targets in ("all-linear", "all")
    return [] if is_list else [f"target_modules={targets!r}"]


def _bias_setting(a: Adapter) -> list[str]:
    bias = a.values.get("bias", "none")
    return [] if bias == "none" else [f"bias={bias!r}"]


def _rebasing_init(a: Adapter) -> list[str]:
    init = a.values.get("init_lora_weights", True)
    return [init] if isinstance(init, str) and init.lower() not in PLAIN_INITS else []


def _convolutions(a: Adapter) -> list[str]:
    return _leaves(kind_of(name)[0] for name, shape in a.shapes.items() if len(shape) > 2)


def _odd_ones(a: Adapter) -> list[str]:
    """Layers without the one that they are stacked with."""
    needs = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    found = set()
    for module in a.ranks:
        parent, _, leaf = module.rpartition(".")
        if leaf in needs and f"{parent}.{needs[leaf]}" not in a.ranks:
            found.add(f"{leaf} without {needs[leaf]}")
    return sorted(found)


def _gaps(a: Adapter) -> list[str]:
    """Kinds of layers that are adapted in some blocks only."""
    blocks: dict[str, set[int]] = {}
    for module in a.ranks:
        if match := re.match(r".*?\.(\d+)\.(.+)", module):
            blocks.setdefault(match[2], set()).add(int(match[1]))
    count = max((max(found) for found in blocks.values()), default=-1) + 1
    some = a.values.get("layers_to_transform") is not None
    return [leaf for leaf, found in blocks.items() if some or len(found) < count]


def _leaves(modules: Iterable[str]) -> list[str]:
    names = (module.removesuffix(".base_layer").rpartition(".")[2] for module in modules)
    return list(dict.fromkeys(names))


# ---- the rules ----


class Rule(NamedTuple):
    """Something an adapter may hold, and what each consumer makes of it."""

    verdicts: str
    """a letter for each of CONSUMERS"""
    what: str
    offenders: Offenders
    mend: str = ""
    """what to do where it cannot be written another way"""


MERGE = "merge_dequant.py folds that in"
CONVERT = (
    "save it with PEFT's path_initial_model_for_weight_conversion, which makes A and B for the "
    "base as it was"
)
KEEP = "train without it, or serve it with PEFT"

# What `qlora.adapters.portable` writes another way, without changing what is computed.
BAKED = (
    Rule("R R R - - -", "no lora_alpha in the config", _missing("lora_alpha")),
    Rule("R R - - - -", "missing in the config", _missing("r", "target_modules")),
    Rule("- R - - - -", "targets that are no list", _regex),
    Rule("- I I - - -", "rsLoRA's scaling", _set("use_rslora")),
    Rule("- I I I - -", "alphas of their own", _alphas),
    Rule("- R - I - -", "ranks of their own", _other_ranks),
    Rule("R - - - - -", "a setting for biases", _bias_setting),
)
# What A and B of linear layers cannot say.
LOST = (
    Rule("R R R I I -", "DoRA's magnitudes", _dora, MERGE),
    Rule("R I R I - -", "lora_bias", _kinds("lora_bias"), MERGE),
    Rule("R I R I - -", "biases", _kinds("bias"), MERGE),
    Rule("R I R I I -", "modules trained in full", _kinds("whole"), MERGE),
    Rule("R I I I I -", "norms trained in full", _kinds("norm"), MERGE),
    Rule("- I R I I -", "a classification head", _kinds("head"), MERGE),
    Rule("- - - I - -", "embeddings", _kinds("EA", "EB"), MERGE),
    Rule("R I R I I -", "trained token rows", _kinds("rows"), MERGE),
    Rule("R R R I - -", "convolutions", _convolutions, MERGE),
    Rule("R I I I - -", "an init that changes the base", _rebasing_init, CONVERT),
    Rule("R I I I - -", "repeated layers", _set("layer_replication"), KEEP),
    Rule("R I - I I -", "aLoRA", _set("alora_invocation_tokens"), KEEP),
    Rule("R I I I - -", "QALoRA", _set("use_qalora"), KEEP),
    Rule("R I I I - -", "BD-LoRA", _set("use_bdlora"), KEEP),
    Rule("- R R I - -", "parameters as targets", _set("target_parameters"), KEEP),
)
# What is so in any file of this adapter.
STAYS = (
    Rule("R - - - - -", "a high rank", _high_rank),
    Rule("- R - - - -", "odd ones of stacked layers", _odd_ones),
    Rule("- - - I - -", "layers adapted in some blocks", _gaps),
)


def findings(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], rules: Iterable[Rule]
) -> list[tuple[Rule, str]]:
    """Which of `rules` an adapter falls under, each with the offenders in words.

    Args:
        values: adapter_config.json.
        tensors: of adapter_model.safetensors, by their names there; only shapes are looked at.
    """
    adapter = Adapter(values, {name: tuple(t.shape) for name, t in tensors.items()})
    found = ((rule, list(rule.offenders(adapter))) for rule in rules)
    return [(rule, f"{rule.what} ({_few(names)})") for rule, names in found if names]


def problems(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What each consumer refuses of an adapter, and what it ignores, in words; see `findings`."""
    words = {"R": "refuses", "I": "ignores"}
    found: dict[str, list[str]] = {consumer: [] for consumer in CONSUMERS}
    for rule, what in findings(values, tensors, (*BAKED, *LOST, *STAYS)):
        for consumer, verdict in zip(CONSUMERS, rule.verdicts.split(), strict=True):
            if verdict in words:
                found[consumer].append(f"{words[verdict]} {what}")
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
