"""LoraConfig, with PEFT's names and meaning, and Settings, the base class of all settings.

A field's annotation and metadata define its valid values: `r: int = field(default=16,
metadata=above(0))` is a whole number above 0. `Settings.__post_init__` checks these, then `faults`,
the rules across fields.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from qlora.config.tasks import TASKS
from qlora.config.types import described, fits, shown
from qlora.errors import UserError, require

ALL_LINEAR = "all-linear"
TASK_TYPES = (*(task.task_type for task in TASKS.values()), "QUESTION_ANS", "FEATURE_EXTRACTION")
NUMBERS = {int: ("a whole number", (int,)), float: ("a number", (int, float))}

# ---- metadata of a field ----

RARE: dict[str, Any] = {"rare": True}  # shown by --help-all only
NO_FLAG: dict[str, Any] = {"no_flag": True}
PATHS: dict[str, Any] = {"paths": True}  # names that are not split at commas
POSITIONAL: dict[str, Any] = {"positional": True}  # the flag's name may be omitted


def rule(wanted: str, holds: Callable[[Any], bool]) -> dict[str, Any]:
    """A value other than None, or each value of a mapping, must satisfy `holds`."""
    return {"rule": (wanted, holds)}


def at_least(least: float) -> dict[str, Any]:
    """A number that is not smaller."""
    return rule(f"of at least {least}", lambda value: value >= least)


def above(bound: float) -> dict[str, Any]:
    """A number that is larger."""
    return rule(f"above {bound}", lambda value: value > bound)


def one_of(*choices: Any) -> dict[str, Any]:
    """One of computed choices; constant choices are written as a Literal."""
    text = f"one of {', '.join(map(str, choices))}"
    return {"choices": choices} | rule(text, lambda value: value in choices)


SHARE = rule("of at least 0 and below 1", lambda value: 0 <= value < 1)


class Settings:
    """Base of the dataclasses. Raises UserError for the first value or combination refused."""

    def __post_init__(self) -> None:
        for member in fields(self):  # type: ignore[arg-type]
            name, hint = member.name, member.type
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if get_origin(hint) is Literal:
                wanted = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
                require(value in kinds, f"{name} must be {wanted}, got {value!r}")
            elif get_origin(hint) is Mapping and kinds[1] in NUMBERS:
                is_mapping = isinstance(value, Mapping)
                require(is_mapping, f"{name} must be NAME: NUMBER pairs, got {value!r}")
                for key, number in value.items():
                    _check(f"{key} in {name}", number, kinds, member.metadata)
            elif (value is not None or type(None) not in kinds) and get_origin(hint) is not tuple:
                _check(name, value, kinds, member.metadata)
            is_fit = fits(value, hint) or isinstance(value, Path)
            require(is_fit, f"{name} must be {described(hint)}, got {shown(value)}")
        for fault in self.faults():
            raise UserError(fault)

    def faults(self) -> Iterator[str]:
        """A message for each broken rule across fields."""
        yield from ()


def _check(name: str, value: Any, kinds: Iterable[Any], metadata: Mapping[str, Any]) -> None:
    """Check a value against the type of number among `kinds`, and its field's rule."""
    number, types = next((NUMBERS[kind] for kind in kinds if kind in NUMBERS), ("", (type(value),)))
    wanted, holds = metadata.get("rule", ("", lambda value: True))
    is_finite = type(value) not in (int, float) or fits(value, float)
    if type(value) not in types or not is_finite or not holds(value):
        number += " of 64 bits" * (type(value) is int and not is_finite)
        wanted = wanted if "choices" in metadata else f"{number} {wanted}".strip()
        raise UserError(f"{name} must be {wanted}, got {value!r}")


# ---- the adapter ----

# Values of init_lora_weights besides true and pissa_niter_N.
INITS = ("gaussian", "pissa", "olora", "loftq", "eva")
# Inits, with corda and lora_ga of PEFT, that compute A and B from the unquantized weights and take
# scaling B A off the base, so that the sum starts unchanged (LoftQ from its second round on).
REBASING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class LoraConfig(Settings):
    """The adapter: W x + scaling * B A x, with A (r, in) and B (out, r)."""

    r: int = field(default=16, metadata=above(0))
    """rank of the adapter"""
    lora_alpha: float = field(default=32, metadata=above(0))
    """scaling is lora_alpha / r"""
    lora_dropout: float = field(default=0.0, metadata=SHARE)
    """dropout on the adapter's input in training"""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """all-linear, a list of name endings, or a regular expression for the full name"""
    exclude_modules: str | tuple[str, ...] = field(default=(), metadata=RARE)
    """layers to leave out, in the same form"""
    layers_to_transform: tuple[int, ...] = field(default=(), metadata=RARE)
    """adapt only the layers with these indices"""
    layers_pattern: tuple[str, ...] = field(default=(), metadata=RARE)
    """name part before the layer index; by default the first number in a name is the index"""
    target_parameters: tuple[str, ...] = field(default=(), metadata=RARE)
    """name endings of parameters outside linear layers, such as fused experts"""
    rank_pattern: Mapping[str, int] = field(default_factory=dict, metadata=RARE | above(0))
    """ranks other than r, by an ending of the layer's name"""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, metadata=RARE | above(0))
    """values other than lora_alpha, by an ending of the layer's name"""
    modules_to_save: tuple[str, ...] = ()
    """other modules to train in full and save"""
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = field(
        default=(), metadata=RARE
    )
    """ids of tokens whose embedding rows are trained; in Python also a dict by embedding name"""
    bias: Literal["none", "all", "lora_only"] = field(default="none", metadata=RARE)
    """biases to train: none, all in the model, or only those of adapted layers"""
    lora_bias: bool = field(default=False, metadata=RARE)
    """add a bias to B"""
    use_rslora: bool = False
    """scaling is lora_alpha / sqrt(r), arXiv:2312.03732"""
    use_dora: bool = False
    """train the norm of each weight row too, arXiv:2402.09353"""
    init_lora_weights: str | bool = True
    """true (A Kaiming-uniform, B zero), gaussian, pissa, pissa_niter_N, olora, loftq or eva"""
    loftq_config: Mapping[str, int] = field(default_factory=dict, metadata=RARE)
    """loftq_iter: rounds of LoftQ, 1 to 5, by default 1"""
    eva_config: Mapping[str, float] = field(default_factory=dict, metadata=RARE | at_least(1))
    """rho: maximum rank of a layer in EVA, as a multiple of r, by default 2"""
    adapter_dtype: Literal["auto", "bf16", "fp32"] = field(default="auto", metadata=RARE)
    """dtype of A and B (auto: bf16 on a GPU with bf16, otherwise fp32), and of modules trained in
    full (auto: fp32)"""
    task_type: str | None = field(default=None, metadata=NO_FLAG | one_of(*TASK_TYPES))
    """PEFT's task type; by default that of the model's class"""
    revision: str | None = field(default=None, metadata=NO_FLAG)
    """revision of the base; must be the one that was loaded"""
    fan_in_fan_out: bool | None = field(default=None, metadata=NO_FLAG)
    """whether weights are stored as (in, out), as in GPT-2; detected, and checked if given"""

    def faults(self) -> Iterator[str]:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and (fault := regex_fault(value)):
                yield f"{name} {value!r} {fault}; for name endings give a list"
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                if fault := regex_fault(key):
                    yield f"{key!r} in {name} {fault}"
        if not (self.target_modules or self.target_parameters):
            yield "target_modules is empty: name at least one module"
        named = () if isinstance(self.target_modules, str) else self.target_modules
        if ALL_LINEAR in named and (more := ", ".join(n for n in named if n != ALL_LINEAR)):
            fix = f"leave {more} out, or list all layers by name"
            yield f"target_modules has {ALL_LINEAR} beside {more}: {fix}"
        if self.layers_pattern and not self.layers_to_transform:
            yield "layers_pattern needs layers_to_transform: give both"
        is_regex = isinstance(self.target_modules, str) and not self.targets_all_linear
        if self.layers_to_transform and is_regex:
            yield "layers_to_transform needs target_modules as a list, not a regular expression"
        indices = self.trainable_token_indices
        for ids in indices.values() if isinstance(indices, Mapping) else [indices]:
            are_ids = all(type(i) is int and i >= 0 for i in ids) and len(set(ids)) == len(ids)
            if not are_ids or not (ids or indices == ()):
                yield f"trainable_token_indices must be distinct whole numbers from 0, got {ids!r}"
        if self.target_parameters and (self.use_dora or self.lora_bias or self.lora_dropout):
            # the module's own code multiplies with them
            yield "target_parameters take no use_dora, lora_bias or lora_dropout: leave these out"
        if self.lora_bias and self.use_dora:
            yield "lora_bias cannot be combined with use_dora: choose one"
        init = f"init_lora_weights={self.init_lora_weights!r}"
        if self.init_lora_weights is not True and self._init not in INITS:
            wanted = "true, gaussian, pissa, pissa_niter_N, olora, loftq or eva"
            yield f"init_lora_weights must be {wanted}, got {self.init_lora_weights!r}"
        if self.use_dora and self.starts_from_weights:
            yield f"use_dora cannot be combined with {init}: choose one"
        if self.target_parameters and self.init_lora_weights is not True:
            yield f"target_parameters need init_lora_weights=true, got {init}: leave one out"
        for of, known in (("loftq", ("loftq_bits", "loftq_iter")), ("eva", ("rho",))):
            given = getattr(self, f"{of}_config").keys()
            if more := ", ".join(sorted(given - set(known))):
                yield f"{of}_config takes {' and '.join(known)}, not {more}"
            if given and self.init_lora_weights != of:
                yield f"{of}_config is for init_lora_weights={of}: give both"
        if self.loftq_config.get("loftq_bits", 4) != 4:
            yield f"loftq_bits must be 4, as in the base, got {self.loftq_config['loftq_bits']}"
        if not 1 <= self.loftq_iter <= 5:
            yield f"loftq_iter must be a whole number from 1 to 5, got {self.loftq_iter}"

    @property
    def targets_all_linear(self) -> bool:
        """Whether every linear layer but the output head is adapted."""
        return self.target_modules in (ALL_LINEAR, (ALL_LINEAR,))

    def of(self, module: str) -> "LoraConfig":
        """This config with the rank and alpha that the patterns give `module`."""
        patterns = {"r": self.rank_pattern, "lora_alpha": self.alpha_pattern}
        keys = {name: pattern_key(pattern, module) for name, pattern in patterns.items()}
        own: Any = {name: patterns[name][key] for name, key in keys.items() if key is not None}
        return replace(self, **own) if own else self

    def with_ranks(self, times: float) -> "LoraConfig":
        """This config with every rank multiplied by `times`, at the same scaling."""
        alphas = times**0.5 if self.use_rslora else times
        return replace(
            self,
            r=round(self.r * times),
            lora_alpha=self.lora_alpha * alphas,
            rank_pattern={name: round(r * times) for name, r in self.rank_pattern.items()},
            alpha_pattern={name: alpha * alphas for name, alpha in self.alpha_pattern.items()},
        )

    def with_ranks_of(self, ranks: Mapping[str, int]) -> "LoraConfig":
        """This config with these ranks, by the names of all its layers, at the same scaling."""
        layers = {name: self.of(name) for name in ranks}
        layers = {name: own.with_ranks(ranks[name] / own.r) for name, own in layers.items()}
        others = {name: own.r for name, own in layers.items() if own.r != self.r}
        alphas = {name: own.lora_alpha for name, own in layers.items()}
        alphas = {name: alpha for name, alpha in alphas.items() if alpha != self.lora_alpha}
        return replace(self, rank_pattern=others, alpha_pattern=alphas)

    @property
    def _init(self) -> str:
        return re.sub(r"^pissa_niter_\d+$", "pissa", str(self.init_lora_weights))

    @property
    def starts_from_weights(self) -> bool:
        """Whether A and B are computed from the base's weights before quantization."""
        return self._init in REBASING_INITS

    @property
    def rebases(self) -> bool:
        """Whether scaling B A is subtracted from the base, which is then quantized again."""
        is_one_round = self.init_lora_weights == "loftq" and self.loftq_iter == 1
        return self.starts_from_weights and not is_one_round

    @property
    def loftq_iter(self) -> int:
        """LoftQ's rounds of quantization and decomposition."""
        return self.loftq_config.get("loftq_iter", 1)

    @property
    def pissa_niter(self) -> int | None:
        """Iterations of PiSSA's randomized SVD; None for the exact one."""
        count = re.fullmatch(r"pissa_niter_(\d+)", str(self.init_lora_weights))
        return int(count[1]) if count else None

    @property
    def rho(self) -> float:
        """Maximum rank of a layer in EVA, as a multiple of r."""
        return self.eva_config.get("rho", 2.0)

    @property
    def scaling(self) -> float:
        """The factor of B A x: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


def regex_fault(text: str) -> str:
    """Why a text is no regular expression to match names with; empty if it is one. Those whose time
    may grow without bounds are none: adapters of strangers have regular expressions."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    for part in _alternatives(text):
        repeats = re.findall(r"(?<!\\)([*+]|\{\d*,?\d*\})", part)
        optional = re.findall(r"(?<![\\(*+}])\?", part)
        repeats_a_group = re.search(r"(?<!\\)\)[*+{]", part)
        if repeats_a_group or len(repeats) > 4 or len(optional) > 8 or len(text) > 10_000:
            return "repeats too often for a regular expression"
    return ""


def _alternatives(text: str) -> list[str]:
    """The parts of a regular expression between the | outside of its groups."""
    parts, depth = [""], 0
    for token in re.findall(r"\\.|.", text, re.DOTALL):
        depth += (token == "(") - (token == ")")
        if token == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def pattern_key(pattern: Iterable[str], module: str) -> str | None:
    """The key of rank_pattern or alpha_pattern for `module`, by PEFT's rule: the first that matches
    the end of its name, after a dot."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
