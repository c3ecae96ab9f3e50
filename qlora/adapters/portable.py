"""An adapter in a form that every program that loads PEFT's files computes correctly.

    python -m qlora.portable --adapter out [--output-dir out-portable]

prints which parts of an adapter each program refuses or ignores, and writes a portable one: the
subset of the format that all of them read alike, which is A and B of linear layers, one r, one
lora_alpha and a list of targets. The function stays the same:

    scaling   lora_alpha = scaling * r, a float; rsLoRA becomes lora_alpha / r, to a double's
              rounding
    patterns  one scaling for all layers; B is multiplied by its own layer's scaling over that one.
              A power of two is exact in any dtype; with another ratio that B becomes fp32
    ranks     zeros as further rows of A and columns of B, up to the highest r
    targets   a list; full names for a regular expression or a narrowed list

Whatever A and B cannot express (DoRA, biases, embeddings, modules and token rows trained in full)
is refused by name.

The verdicts are a table of rules, taken from the consumers' sources. Ignoring a setting is worse
than refusing it: the program runs another model than the trained one. Left out, as the files do not
say it: the layers of each family that a server supports, its flags (--max-lora-rank), LoRA on an
output head tied to its embedding (llama.cpp refuses it), an added_tokens.json beside the adapter
(SGLang refuses new ones); and zeros for the layers that SGLang stacks with adapted ones.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qlora.adapters.format import CONFIG, KEYS, WEIGHTS, contents_of, read_files, require_supported
from qlora.adapters.tensors import PARTS, PREFIX
from qlora.config import PortableConfig
from qlora.config.lora import pattern_key
from qlora.errors import UserError, first_line, require, some
from qlora.files import GENERATION, publishing, require_new

# ---- the portable adapter ----


def portable_subset(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of adapter_config.json and adapter_model.safetensors in portable form.

    Unchanged tensors are not copied. `folder` is the adapter's name in errors.

    Raises:
        UserError: A and B of linear layers cannot express it, or its tensors and its config
            contradict each other.
    """
    if lost := findings(values, tensors, LOST):
        by_remedy: dict[str, list[str]] = {}
        for rule, offenders in lost:
            by_remedy.setdefault(rule.remedy, []).append(offenders)
        parts = (f"{', '.join(texts)}: {remedy}" for remedy, texts in by_remedy.items())
        raise UserError(f"adapter {folder} is not portable: it has {'; '.join(parts)}")
    require_supported(values, folder)
    pairs = contents_of(values, tensors, folder)[1].pairs
    require(pairs != {}, f"adapter {folder} holds no lora_A and lora_B: there is nothing to write")
    r = max(len(factors.lora_A) for factors in pairs.values())
    scaling = _common_scaling([factors.scaling for factors in pairs.values()])
    portable = dict(tensors)
    for module, factors in pairs.items():
        lora_B = _times(factors.lora_B, factors.scaling / scaling)
        padded = factors._replace(lora_B=lora_B).padded(r)
        portable[f"{PREFIX}{module}.lora_A.weight"] = padded.lora_A
        portable[f"{PREFIX}{module}.lora_B.weight"] = padded.lora_B
    targets = values.get("target_modules")
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if not isinstance(targets, list) or any(values.get(key) for key in narrowing):
        targets = sorted(pairs)
    alpha = scaling * r
    alpha = int(alpha) if alpha == int(alpha) else alpha
    defaults = {name: key.default for name, key in KEYS.items() if key.portable}
    common = {"lora_alpha": alpha, "r": r, "target_modules": targets}
    return dict(sorted({**values, **defaults, **common}.items())), portable


def _common_scaling(scalings: list[float]) -> float:
    """The scaling that most layers have up to a power of two, and of these the most common."""

    def agreement(scaling: float) -> tuple[int, int]:
        exact = sum(math.frexp(other / scaling)[0] == 0.5 for other in scalings)
        return exact, scalings.count(scaling)

    return max(dict.fromkeys(scalings), key=agreement)


def _times(lora_B: Tensor, ratio: float) -> Tensor:
    """B times `ratio`, in its dtype if that is exact, else in fp32."""
    if ratio == 1:
        return lora_B
    exact = lora_B.double() * ratio
    rounded = exact.to(lora_B.dtype)
    return rounded if torch.equal(rounded.double(), exact) else exact.float()


# ---- the command ----


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None
) -> None:
    """Write a safetensors file. UserError if the disk does not take it."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)
    except (OSError, SafetensorError) as error:
        fault = f"{path.parent} cannot be written to ({first_line(error)})"
        raise UserError(f"{fault}: free disk space, or give another --output-dir") from error


def make_portable(config: PortableConfig) -> None:
    """Print each consumer's verdict on the adapter; write the portable one to `output_dir`."""
    folder = Path(config.adapter).expanduser()
    output = Path(config.output_dir).expanduser() if config.output_dir else None
    if output:
        require_new(output)
    values, tensors, metadata = read_files(folder)
    contents_of(values, tensors, folder)
    print(_table(values, tensors))
    if output:
        values, tensors = portable_subset(values, tensors, folder)
        with publishing(output) as partial:
            save_tensors(tensors, partial / WEIGHTS, metadata)
            text = json.dumps(values, indent=2) + "\n"
            (partial / CONFIG).write_text(text, encoding="utf-8")
            if (folder / GENERATION).is_file():  # the tokens that end an answer
                shutil.copyfile(folder / GENERATION, partial / GENERATION)
        print(f"\nThe same function, in {output}:\n{_table(values, tensors)}")
    elif (baked := findings(values, tensors, BAKED)) and not findings(values, tensors, LOST):
        print(f"\n--output-dir DIR writes it without {', '.join(what for _, what in baked)}.")


def _table(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    verdicts = problems(values, tensors).items()
    return "\n".join(f"{name:<14}{'; '.join(what) or 'accepts it'}" for name, what in verdicts)


# ---- the adapter that the rules examine ----


def kind_of(key: str) -> tuple[str, str]:
    """A tensor's module and kind: A, B, EA, EB (an embedding's), magnitude, lora_bias, rows, copy
    (of a base weight), bias, head (a classifier's), norm or full."""
    name = key.removeprefix(PREFIX)
    for part, kind in PARTS.items():
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), kind
    module, _, last = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if last == "weight" and leaf == "base_layer":
        return module, "copy"
    if leaf in ("score", "classifier"):
        return module, "head"
    if last == "bias":
        return module, "bias"
    return module, "norm" if "_layernorm" in name or ".norm" in name else "full"


def _leaves(modules: Iterable[str]) -> list[str]:
    names = (module.removesuffix(".base_layer").rpartition(".")[2] for module in modules)
    return list(dict.fromkeys(names))


class Adapter:
    """adapter_config.json and the tensors' shapes. Each method lists the offenders of a rule."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.values = values
        self.tensors = [(*kind_of(key), tuple(tensor.shape)) for key, tensor in tensors.items()]
        self.ranks = {m: shape[0] for m, kind, shape in self.tensors if kind in ("A", "EA")}

    def kinds(self, *kinds: str) -> list[str]:
        """Modules with tensors of these kinds (see `kind_of`)."""
        return _leaves(module for module, kind, _ in self.tensors if kind in kinds)

    def setting(self, name: str, plain: Any = None) -> list[str]:
        """A setting with another value than `plain`, None, False or empty."""
        value = self.values.get(name)
        return [f"{name}={value!r}"] if value and value != plain else []

    def absent(self, *names: str) -> list[str]:
        return [name for name in names if name not in self.values]

    def dora(self) -> list[str]:
        return self.kinds("magnitude") or self.setting("use_dora")

    def alphas(self) -> list[str]:
        """Entries of alpha_pattern that give a module another alpha."""
        pattern, alpha = self.values.get("alpha_pattern") or {}, self.values.get("lora_alpha", 8)
        used = {pattern_key(pattern, module) for module in self.ranks}
        return [key for key in pattern if key in used and pattern[key] != alpha]

    def other_ranks(self) -> list[str]:
        return _leaves(module for module, r in self.ranks.items() if r != self.values.get("r", 8))

    def high_rank(self) -> list[str]:
        highest = max(self.ranks.values(), default=0)
        return [f"r={highest}, at most {HIGHEST_RANK}"] if highest > HIGHEST_RANK else []

    def unlisted_targets(self) -> list[str]:
        targets = self.values.get("target_modules", [])
        is_list = isinstance(targets, list) or targets in ("all-linear", "all")
        return [] if is_list else [f"target_modules={targets!r}"]

    def rebasing_init(self) -> list[str]:
        init = self.values.get("init_lora_weights", True)
        return [init] if isinstance(init, str) and init.lower() not in PLAIN_INITS else []

    def convolutions(self) -> list[str]:
        return _leaves(module for module, _, shape in self.tensors if len(shape) > 2)

    def unstacked(self) -> list[str]:
        """Layers without the one that SGLang stacks them with."""
        needs = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        alone = set()
        for module in self.ranks:
            parent, _, leaf = module.rpartition(".")
            if leaf in needs and f"{parent}.{needs[leaf]}" not in self.ranks:
                alone.add(f"{leaf} without {needs[leaf]}")
        return sorted(alone)

    def gaps(self) -> list[str]:
        """Layers that are adapted in some blocks only."""
        blocks: dict[str, set[int]] = {}
        for module in self.ranks:
            if match := re.match(r".*?\.(\d+)\.(.+)", module):
                blocks.setdefault(match[2], set()).add(int(match[1]))
        count = max((max(numbers) for numbers in blocks.values()), default=-1) + 1
        is_narrowed = self.values.get("layers_to_transform") is not None
        return [leaf for leaf, numbers in blocks.items() if is_narrowed or len(numbers) < count]


# ---- the rules ----

# The versions and sources that were read, on 2026-11-22.
CONSUMERS = {
    "vLLM": "0.33.0, vllm/lora: peft_helper.py (validate_legal, get_rank_and_scaling), "
    "lora_model.py, utils.py (parse_fine_tuned_lora_name)",
    "SGLang": "0.5.23, python/sglang/srt/lora: lora_manager.py (validate_new_adapter, "
    "init_lora_shapes), lora.py (scaling, normalize_qkv_proj), mem_pool.py",
    "llama.cpp": "convert_lora_to_gguf.py; src/llama-adapter.cpp, .h",
    "TGI": "server/text_generation_server/adapters/lora.py (prepare_weights)",
    "transformers": "5.17 to 5.23, the worst of them: 5.17 alone loads nothing that was trained in "
    "full; integrations/peft.py (load_adapter)",
    "PEFT": "0.21, which reads what it wrote",
}
# Inits that leave the base unchanged: vLLM's _init_is_supported, which counts lora_ga among them.
# With any other A and B need the changed base, which PEFT computes again from the weights.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
HIGHEST_RANK = 512  # vllm/config/lora.py, MaxLoRARanks


class Rule(NamedTuple):
    """Something an adapter may hold, and each consumer's verdict on it."""

    verdicts: str  # by consumer: R refuses, I ignores, - accepts; the worst where layers differ
    what: str
    offenders: Callable[[Adapter], list[str]]
    remedy: str = ""  # in the error if no portable form exists


MERGE = "a merge folds that in"
CONVERT = (
    "save it with PEFT's path_initial_model_for_weight_conversion, which converts A and B to the "
    "unchanged base"
)
KEEP = "train without it, or serve it with PEFT"

# What `portable_subset` expresses differently, without changing the function.
BAKED = (
    Rule("R R R - - -", "no lora_alpha in the config", lambda a: a.absent("lora_alpha")),
    Rule("R R - - - -", "missing in the config", lambda a: a.absent("r", "target_modules")),
    Rule("- R - - - -", "targets that are no list", Adapter.unlisted_targets),
    Rule("- I I - - -", "rsLoRA's scaling", lambda a: a.setting("use_rslora")),
    Rule("- I I I - -", "separate alphas", Adapter.alphas),
    Rule("- R - I - -", "separate ranks", Adapter.other_ranks),
    Rule("R - - - - -", "a setting for biases", lambda a: a.setting("bias", "none")),
)
# What A and B of linear layers cannot express.
LOST = (
    Rule("R R R I I -", "DoRA's magnitudes", Adapter.dora, MERGE),
    Rule("R I R I - -", "lora_bias", lambda a: a.kinds("lora_bias"), MERGE),
    Rule("R I R I - -", "biases", lambda a: a.kinds("bias"), MERGE),
    Rule("R I R I I -", "modules trained in full", lambda a: a.kinds("full"), MERGE),
    Rule("R I I I I -", "norms trained in full", lambda a: a.kinds("norm"), MERGE),
    Rule("- I R I I -", "a classification head", lambda a: a.kinds("head"), MERGE),
    Rule("- - - I - -", "embeddings", lambda a: a.kinds("EA", "EB"), MERGE),
    Rule("R I R I I -", "trained token rows", lambda a: a.kinds("rows"), MERGE),
    Rule("R R R I - -", "convolutions", Adapter.convolutions, MERGE),
    Rule("R I I I - -", "an init that changes the base", Adapter.rebasing_init, CONVERT),
    Rule("R I I I - -", "repeated layers", lambda a: a.setting("layer_replication"), KEEP),
    Rule("R I - I I -", "aLoRA", lambda a: a.setting("alora_invocation_tokens"), KEEP),
    Rule("R I I I - -", "QALoRA", lambda a: a.setting("use_qalora"), KEEP),
    Rule("R I I I - -", "BD-LoRA", lambda a: a.setting("use_bdlora"), KEEP),
    Rule("- R R I - -", "target_parameters", lambda a: a.setting("target_parameters"), KEEP),
)
# What a portable adapter cannot change.
STAYS = (
    Rule("R - - - - -", "a high rank", Adapter.high_rank),
    Rule("- R - - - -", "incomplete stacked layers", Adapter.unstacked),
    Rule("- - - I - -", "layers adapted in some blocks", Adapter.gaps),
)


def findings(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], rules: Iterable[Rule]
) -> list[tuple[Rule, str]]:
    """The `rules` that apply to an adapter, each with a text that names its offenders."""
    adapter = Adapter(values, tensors)
    offenders = ((rule, rule.offenders(adapter)) for rule in rules)
    return [(rule, f"{rule.what} ({some(names, 5)})") for rule, names in offenders if names]


def problems(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Of each consumer a text for everything that it refuses or ignores; see `findings`."""
    words = {"R": "refuses", "I": "ignores"}
    verdicts: dict[str, list[str]] = {consumer: [] for consumer in CONSUMERS}
    for rule, what in findings(values, tensors, (*BAKED, *LOST, *STAYS)):
        for consumer, verdict in zip(CONSUMERS, rule.verdicts.split(), strict=True):
            if verdict in words:
                verdicts[consumer].append(f"{words[verdict]} {what}")
    return verdicts
