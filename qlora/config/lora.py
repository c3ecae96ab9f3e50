"""The settings of an adapter, with PEFT's names and meaning: a frozen dataclass, inert as all of
qlora.config. What would contradict itself, or mean nothing, is refused.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from qlora.config.tasks import TASKS
from qlora.errors import UserError

ALL_LINEAR = "all-linear"
TASK_TYPES = (*(task.task_type for task in TASKS.values()), "QUESTION_ANS", "FEATURE_EXTRACTION")


class Init(NamedTuple):
    """How a value of init_lora_weights computes A and B."""

    reads_weights: bool = False
    """from the base's weights before quantization"""
    changes_base: bool = False
    """the base then has to lose scaling B A, so that the sum starts unchanged"""
    reads_data: bool = False
    """from activations on the training data"""
    implemented: bool = True
    """here; the others are PEFT's and only met in adapters that it saved"""


INITS = {
    "gaussian": Init(),
    "pissa": Init(reads_weights=True, changes_base=True),  # and pissa_niter_N
    "olora": Init(reads_weights=True, changes_base=True),
    "loftq": Init(reads_weights=True, changes_base=True),  # here from the second round on
    "eva": Init(reads_data=True),
    "corda": Init(reads_weights=True, changes_base=True, reads_data=True, implemented=False),
    "lora_ga": Init(reads_weights=True, changes_base=True, reads_data=True, implemented=False),
    "orthogonal": Init(implemented=False),
    "mica": Init(reads_weights=True, implemented=False),
}


# Of a field: its flag is shown by --help-all only; or it has none.
RARE: Mapping[str, Any] = {"rare": True}
NO_FLAG: Mapping[str, Any] = {"no_flag": True}


def require(ok: bool, message: str) -> None:
    """A UserError with that message, unless it is so."""
    if not ok:
        raise UserError(message)


def require_number(name: str, value: Any, *, whole: bool = False) -> None:
    """Refuse what is no number above 0."""
    kinds, wanted = ((int,), "a whole number") if whole else ((int, float), "a number")
    ok = type(value) in kinds and value > 0
    require(ok, f"{name} must be {wanted} above 0, got {value!r}")


def require_at_least(name: str, value: float | None, least: float) -> None:
    """Refuse a number below `least`; none at all is none to refuse."""
    require(value is None or value >= least, f"{name} must be at least {least}, got {value}")


def _require_pattern(name: str, pattern: Any, *, whole: bool = False) -> None:
    require(isinstance(pattern, Mapping), f"{name} must be NAME: NUMBER pairs, got {pattern!r}")
    for key, value in pattern.items():
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{key!r} in {name} is no regular expression ({error})") from error
        require_number(f"{key} in {name}", value, whole=whole)


def _require_token_ids(given: Any) -> None:
    ids = [*given.values()] if isinstance(given, Mapping) else [given]
    for some in ids:
        ok = all(type(i) is int and i >= 0 for i in some) and len(set(some)) == len(some)
        require(
            ok and (some or given == ()),
            f"trainable_token_indices must be different whole numbers from 0, got {some!r}",
        )


def pattern_key(pattern: Iterable[str], module: str) -> str | None:
    """The entry of rank_pattern or alpha_pattern that is for `module`, by PEFT's rule: the first
    that matches an ending of its name, after a dot."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: W x + scaling * B A x, with A (r, in), B (out, r), scaling lora_alpha / r."""

    r: int = 16
    """rank of the adapter"""
    lora_alpha: float = 32
    """scaling is lora_alpha / r"""
    lora_dropout: float = 0.0
    """dropout on the adapter's input, in training"""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """all-linear, a list of name endings, or one regular expression over the full name"""
    exclude_modules: str | tuple[str, ...] = field(default=(), metadata=RARE)
    """layers to leave out, named in the same way"""
    layers_to_transform: tuple[int, ...] = field(default=(), metadata=RARE)
    """only the layers with these numbers"""
    layers_pattern: tuple[str, ...] = field(default=(), metadata=RARE)
    """what the number stands after, if not the first in a name"""
    target_parameters: tuple[str, ...] = field(default=(), metadata=RARE)
    """endings of names of parameters that are no layer's, such as fused experts'"""
    rank_pattern: Mapping[str, int] = field(default_factory=dict, metadata=RARE)
    """other ranks, by an ending of the layer's name"""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, metadata=RARE)
    """other values of lora_alpha, likewise"""
    modules_to_save: tuple[str, ...] = ()
    """modules trained in full beside the adapter"""
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = field(
        default=(), metadata=RARE
    )
    """ids of tokens whose rows of the embedding are trained; or by an embedding's name"""
    bias: Literal["none", "all", "lora_only"] = field(default="none", metadata=RARE)
    """biases to train: none, all of the model's, or those of the adapted layers"""
    lora_bias: bool = field(default=False, metadata=RARE)
    """a bias for B, too"""
    use_rslora: bool = False
    """scaling lora_alpha / sqrt(r), arXiv:2312.03732"""
    use_dora: bool = False
    """a trained length of each output, arXiv:2402.09353"""
    init_lora_weights: str | bool = True
    """true: A Kaiming-uniform, B zero; gaussian, pissa, pissa_niter_N, olora, loftq or eva"""
    loftq_config: Mapping[str, int] = field(default_factory=dict, metadata=RARE)
    """loftq_iter: 1 to 5 rounds of loftq, by default 1"""
    eva_config: Mapping[str, float] = field(default_factory=dict, metadata=RARE)
    """rho: of eva, the largest rank of a layer over r, by default 2"""
    adapter_dtype: Literal["auto", "bf16", "fp32"] = field(default="auto", metadata=RARE)
    """dtype of A and B, bf16 on a GPU that has it, else fp32; and of what is trained in full, where
    auto is always fp32"""
    task_type: str | None = field(default=None, metadata=NO_FLAG)
    """what PEFT calls the task; by default that of the model's class"""
    revision: str | None = field(default=None, metadata=NO_FLAG)
    """that of the base; another than the one it was loaded with is an error"""
    fan_in_fan_out: bool | None = field(default=None, metadata=NO_FLAG)
    """whether weights are stored as (in, out), as GPT-2's; seen from the layers, or checked"""

    def __post_init__(self) -> None:
        require_number("r", self.r, whole=True)
        require_number("lora_alpha", self.lora_alpha)
        _require_pattern("rank_pattern", self.rank_pattern, whole=True)
        _require_pattern("alpha_pattern", self.alpha_pattern)
        require(
            not self.layers_pattern or bool(self.layers_to_transform),
            "layers_pattern says where the numbers of layers_to_transform stand: give both",
        )
        require(
            not self.layers_to_transform
            or self.targets_all_linear
            or not isinstance(self.target_modules, str),
            "layers_to_transform chooses among what a list of target_modules matches; in a regular "
            "expression write the numbers themselves",
        )
        require(
            0 <= self.lora_dropout < 1,
            f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}",
        )
        require(
            bool(self.target_modules or self.target_parameters),
            "target_modules is empty: name at least one module",
        )
        require(
            self.adapter_dtype in ("auto", "bf16", "fp32"),
            f"adapter_dtype must be auto, bf16 or fp32, got {self.adapter_dtype!r}",
        )
        require(
            self.bias in ("none", "all", "lora_only"),
            f"bias must be none, all or lora_only, got {self.bias!r}",
        )
        require(
            self.task_type in (None, *TASK_TYPES),
            f"task_type must be one of {', '.join(TASK_TYPES)}, got {self.task_type!r}",
        )
        _require_token_ids(self.trainable_token_indices)
        require(
            not (self.target_parameters and (self.use_dora or self.lora_bias or self.lora_dropout)),
            "target_parameters cannot be adapted with use_dora, lora_bias or lora_dropout: their "
            "module multiplies with them as it likes. Leave these out",
        )
        require(
            not (self.lora_bias and self.use_dora),
            "lora_bias is not there with use_dora, in PEFT neither: take one of them",
        )
        _require_init(self)

    @property
    def targets_all_linear(self) -> bool:
        """Whether every linear layer but the output head is meant."""
        return self.target_modules in (ALL_LINEAR, (ALL_LINEAR,))

    def of(self, module: str) -> "LoraConfig":
        """The same with the rank and alpha that the patterns give `module`."""
        found: dict[str, Any] = {}
        for name, pattern in (("r", self.rank_pattern), ("lora_alpha", self.alpha_pattern)):
            key = pattern_key(pattern, module)
            if key is not None:
                found[name] = pattern[key]
        return replace(self, **found) if found else self

    def with_ranks(self, times: float) -> "LoraConfig":
        """The same scaling with so many times the ranks."""
        alphas = times**0.5 if self.use_rslora else times
        return replace(
            self,
            r=round(self.r * times),
            lora_alpha=self.lora_alpha * alphas,
            rank_pattern={name: round(r * times) for name, r in self.rank_pattern.items()},
            alpha_pattern={name: alpha * alphas for name, alpha in self.alpha_pattern.items()},
        )

    def with_ranks_of(self, ranks: Mapping[str, int]) -> "LoraConfig":
        """The same scaling in each of these layers, which are all there are, with other ranks."""
        own = {name: self.of(name) for name in ranks}
        own = {name: config.with_ranks(ranks[name] / config.r) for name, config in own.items()}
        alphas = {name: config.lora_alpha for name, config in own.items()}
        return replace(
            self,
            rank_pattern={name: config.r for name, config in own.items() if config.r != self.r},
            alpha_pattern={n: alpha for n, alpha in alphas.items() if alpha != self.lora_alpha},
        )

    @property
    def init(self) -> Init:
        """What init_lora_weights does."""
        name = re.sub(r"^pissa_niter_\d+$", "pissa", str(self.init_lora_weights))
        return INITS.get(name, Init())

    @property
    def starts_from_weights(self) -> bool:
        """Whether A and B are made of the base's weights from before quantization."""
        return self.init.reads_weights

    @property
    def rebases(self) -> bool:
        """Whether the base is quantized again, without what A and B start with."""
        is_loftq = self.init_lora_weights == "loftq"
        return self.init.changes_base and (not is_loftq or self.loftq_iter > 1)

    @property
    def loftq_iter(self) -> int:
        """How often LoftQ quantizes and decomposes."""
        return int(self.loftq_config.get("loftq_iter", 1))

    @property
    def pissa_niter(self) -> int | None:
        """PiSSA's iterations from a random subspace; None for the exact decomposition."""
        count = re.fullmatch(r"pissa_niter_(\d+)", str(self.init_lora_weights))
        return int(count[1]) if count else None

    @property
    def rho(self) -> float:
        """The largest rank that EVA gives a layer, over r."""
        return float(self.eva_config.get("rho", 2.0))

    @property
    def scaling(self) -> float:
        """What B A x is multiplied with: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


def _require_init(config: LoraConfig) -> None:
    init, implemented = config.init_lora_weights, [n for n, of in INITS.items() if of.implemented]
    require(
        init is True or re.sub(r"^pissa_niter_\d+$", "pissa", str(init)) in implemented,
        "init_lora_weights must be true, gaussian, pissa, pissa_niter_N, olora, loftq or eva, got "
        f"{init!r}",
    )
    require(
        not (config.use_dora and config.starts_from_weights),
        f"use_dora is not there with init_lora_weights={init!r}: take one of them",
    )
    require(
        not config.target_parameters or init is True,
        f"target_parameters have no other start than true, and init_lora_weights is {init!r}: "
        "leave one of them out",
    )
    for name, of, known in (
        ("loftq_config", "loftq", {"loftq_iter", "loftq_bits"}),
        ("eva_config", "eva", {"rho"}),
    ):
        given = getattr(config, name)
        require(isinstance(given, Mapping), f"{name} must be NAME: NUMBER pairs, got {given!r}")
        more = sorted(given.keys() - known)
        require(not more, f"{name} takes {' and '.join(sorted(known))}, not {', '.join(more)}")
        require(not given or init == of, f"{name} is for init_lora_weights={of}: give both")
    bits, rounds = (
        config.loftq_config.get("loftq_bits", 4),
        config.loftq_config.get("loftq_iter", 1),
    )
    require(bits == 4, f"loftq_bits must be 4, as the base is, got {bits!r}")
    require(
        type(rounds) is int and 1 <= rounds <= 5,
        f"loftq_iter must be a whole number from 1 to 5, got {rounds!r}",
    )
    rho = config.eva_config.get("rho", 2.0)
    require(type(rho) in (int, float) and rho >= 1, f"rho must be a number from 1 on, got {rho!r}")
