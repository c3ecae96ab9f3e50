"""Every setting of a run, as frozen dataclasses: inert data, no torch, no file access.

The field names are the flags of `train.py` and `merge_dequant.py` and the keys of a YAML recipe
(qlora.cli makes both from here), so there is one place to add a setting. They are the names of
transformers' TrainingArguments and PEFT's LoraConfig wherever those have one. `__post_init__`
validates and does nothing else.

Where the defaults come from:
  NF4, double quantization, blocksize 64, all linear layers, Adam beta2 0.999, no weight decay,
  max_grad_norm 0.3, paged optimizer, 16 rows a step: QLoRA (arXiv:2305.14314), appendix B and its
  scripts. lora_alpha 32, no warm-up, no dropout, and the learning-rate rule
  (qlora.training.default_learning_rate): LoRA Without Regret (Thinking Machines, 2025). Both keep
  the rate constant. It falls to zero here: measured on SmolLM2-135M and E2E, 100 steps, that ends
  at a held-out loss of 1.334 in place of 1.474 (benchmarks/results/nf4_against_16bit.jsonl).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from qlora.errors import UserError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ALL_LINEAR = "all-linear"
INITS = r"gaussian|pissa(_niter_\d+)?|olora|loftq|eva"
TASK_TYPES = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
# Of a field: its flag is shown by --help-all only; or it has none.
RARE: Mapping[str, Any] = {"rare": True}
NO_FLAG: Mapping[str, Any] = {"no_flag": True}


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _require_number(name: str, value: Any, *, whole: bool = False) -> None:
    kinds, wanted = ((int,), "a whole number") if whole else ((int, float), "a number")
    ok = type(value) in kinds and value > 0
    _require(ok, f"{name} must be {wanted} above 0, got {value!r}")


def _require_pattern(name: str, pattern: Any, *, whole: bool = False) -> None:
    _require(isinstance(pattern, Mapping), f"{name} must be NAME: NUMBER pairs, got {pattern!r}")
    for key, value in pattern.items():
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{key!r} in {name} is no regular expression ({error})") from error
        _require_number(f"{key} in {name}", value, whole=whole)


def _require_token_ids(given: Any) -> None:
    ids = [*given.values()] if isinstance(given, Mapping) else [given]
    for some in ids:
        ok = all(type(i) is int and i >= 0 for i in some) and len(set(some)) == len(some)
        _require(
            ok and (some or given == ()),
            f"trainable_token_indices must be different whole numbers from 0, got {some!r}",
        )


def pattern_key(pattern: Iterable[str], module: str) -> str | None:
    """The entry of rank_pattern or alpha_pattern that is for `module`, by PEFT's rule: the first
    that matches an ending of its name, after a dot."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


@dataclass(frozen=True)
class QuantConfig:
    """How the frozen base is quantized."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code of the base weights"""
    blocksize: int = 64
    """weights that share one absmax, 32 to 4096"""
    double_quant: bool = True
    """quantize the absmax too: 4.127 bits, not 4.5"""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16; fp16 on a GPU without bf16, fp32 on a CPU without it"""
    skip_modules: tuple[str, ...] = ()
    """module names, or their last part, to leave unquantized (the output head always is)"""
    allow_unquantized: bool = False
    """leave weights as they are that cannot be quantized"""

    def __post_init__(self) -> None:
        _require(
            self.quant_type in ("nf4", "fp4"),
            f"quant_type must be nf4 or fp4, got {self.quant_type!r}",
        )
        _require(
            self.blocksize in BLOCKSIZES,
            f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}",
        )
        _require(
            self.compute_dtype in ("auto", "bf16", "fp16", "fp32"),
            f"compute_dtype must be auto, bf16, fp16 or fp32, got {self.compute_dtype!r}",
        )


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
        _require_number("r", self.r, whole=True)
        _require_number("lora_alpha", self.lora_alpha)
        _require_pattern("rank_pattern", self.rank_pattern, whole=True)
        _require_pattern("alpha_pattern", self.alpha_pattern)
        _require(
            not self.layers_pattern or bool(self.layers_to_transform),
            "layers_pattern says where the numbers of layers_to_transform stand: give both",
        )
        _require(
            not self.layers_to_transform
            or self.targets_all_linear
            or not isinstance(self.target_modules, str),
            "layers_to_transform chooses among what a list of target_modules matches; in a regular "
            "expression write the numbers themselves",
        )
        _require(
            0 <= self.lora_dropout < 1,
            f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}",
        )
        _require(bool(self.target_modules), "target_modules is empty: name at least one module")
        _require(
            self.adapter_dtype in ("auto", "bf16", "fp32"),
            f"adapter_dtype must be auto, bf16 or fp32, got {self.adapter_dtype!r}",
        )
        _require(
            self.bias in ("none", "all", "lora_only"),
            f"bias must be none, all or lora_only, got {self.bias!r}",
        )
        _require(
            self.task_type in (None, *TASK_TYPES),
            f"task_type must be one of {', '.join(TASK_TYPES)}, got {self.task_type!r}",
        )
        _require_token_ids(self.trainable_token_indices)
        _require(
            not (self.target_parameters and (self.use_dora or self.lora_bias or self.lora_dropout)),
            "target_parameters cannot be adapted with use_dora, lora_bias or lora_dropout: their "
            "module multiplies with them as it likes. Leave these out",
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
    def starts_from_weights(self) -> bool:
        """Whether A and B are made of the base's weights from before quantization."""
        return str(self.init_lora_weights).startswith(("pissa", "olora", "loftq"))

    @property
    def rebases(self) -> bool:
        """Whether the base is quantized again, without what A and B start with."""
        is_loftq = self.init_lora_weights == "loftq"
        return self.starts_from_weights and (not is_loftq or self.loftq_iter > 1)

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
    init = config.init_lora_weights
    _require(
        init is True or re.fullmatch(INITS, str(init)) is not None,
        "init_lora_weights must be true, gaussian, pissa, pissa_niter_N, olora, loftq or eva, got "
        f"{init!r}",
    )
    _require(
        not (config.use_dora and config.starts_from_weights),
        f"use_dora is not there with init_lora_weights={init!r}: take one of them",
    )
    _require(
        not config.target_parameters or init is True,
        f"target_parameters have no other start than true, and init_lora_weights is {init!r}: "
        "leave one of them out",
    )
    for name, of, known in (
        ("loftq_config", "loftq", {"loftq_iter", "loftq_bits"}),
        ("eva_config", "eva", {"rho"}),
    ):
        given = getattr(config, name)
        _require(isinstance(given, Mapping), f"{name} must be NAME: NUMBER pairs, got {given!r}")
        more = sorted(given.keys() - known)
        _require(not more, f"{name} takes {' and '.join(sorted(known))}, not {', '.join(more)}")
        _require(not given or init == of, f"{name} is for init_lora_weights={of}: give both")
    bits, rounds = (
        config.loftq_config.get("loftq_bits", 4),
        config.loftq_config.get("loftq_iter", 1),
    )
    _require(bits == 4, f"loftq_bits must be 4, as the base is, got {bits!r}")
    _require(
        type(rounds) is int and 1 <= rounds <= 5,
        f"loftq_iter must be a whole number from 1 to 5, got {rounds!r}",
    )
    rho = config.eva_config.get("rho", 2.0)
    _require(type(rho) in (int, float) and rho >= 1, f"rho must be a number from 1 on, got {rho!r}")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how a record becomes tokens."""

    data: str
    """training data: .jsonl .json .csv .parquet .txt, a folder of them, or a dataset hub name"""
    eval_data: str | None = None
    """the same for evaluation"""
    max_length: int = 2048
    """rows longer than this many tokens are cut, and counted"""
    packing: bool = False
    """several rows in one sequence (not there yet)"""

    def __post_init__(self) -> None:
        _require(self.max_length >= 8, f"max_length must be at least 8, got {self.max_length}")
        _require(not self.packing, "packing is not there yet: leave it out, rows are padded")


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a language model with QLoRA: 4-bit base, bf16 adapter."""

    model: str
    """local folder, hub name, bitsandbytes-4-bit checkpoint, or .gguf file"""
    output_dir: str
    """where the adapter, metrics and checkpoints go"""
    data: DataConfig
    task: Literal["causal-lm", "seq2seq", "seq-cls", "token-cls"] = "causal-lm"
    """what the model is to do: write on, answer, or classify texts or tokens"""
    revision: str | None = None
    """branch, tag or commit of a hub model"""
    trust_remote_code: bool = False
    """run code that comes with the model"""
    lora: LoraConfig = LoraConfig()
    quant: QuantConfig = QuantConfig()
    per_device_train_batch_size: int = 2
    """rows a forward pass"""
    gradient_accumulation_steps: int = 8
    """forward passes an optimizer step"""
    learning_rate: float | None = None
    """by default from a rule, printed with its reason"""
    num_train_epochs: float = 1.0
    """passes over the data"""
    max_steps: int = -1
    """optimizer steps; overrides num_train_epochs when above 0"""
    loraplus_lr_ratio: float = field(default=1.0, metadata=RARE)
    """learning rate of B over that of A and all else: LoRA+ (arXiv:2402.12354), which takes 16"""
    lr_scheduler_type: str = "linear"
    """any of transformers': linear, cosine, constant, …"""
    warmup_ratio: float = 0.0
    """share of the steps in which the learning rate rises"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 0.3
    """gradient clipping"""
    optim: str = "paged_adamw_8bit"
    """any of transformers': paged_adamw_32bit, adamw_torch, …"""
    gradient_checkpointing: bool = True
    """recompute activations: slower, far less memory"""
    seed: int = 42
    """of the adapter's start, the order of rows and dropout"""
    logging_steps: int = 10
    """steps between rows of metrics.jsonl"""
    eval_steps: int | None = None
    """steps between evaluations; by default an epoch"""
    save_steps: int = 100
    """steps between checkpoints; the last two are kept"""
    resume: bool = False
    """go on from the last checkpoint in output_dir"""
    report_to: tuple[str, ...] = ()
    """loggers: tensorboard, wandb, trackio, mlflow, …"""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """anything else of transformers.TrainingArguments, as --trainer.NAME VALUE"""
    plan: bool = False
    """print what the run will need (not there yet)"""
    gpu_memory: str | None = None
    """budget to plan for, like 8GB (not there yet)"""

    def __post_init__(self) -> None:
        _require(
            self.task in ("causal-lm", "seq2seq", "seq-cls", "token-cls"),
            f"task must be causal-lm, seq2seq, seq-cls or token-cls, got {self.task!r}",
        )
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
        ):
            _require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        _require(
            self.eval_steps is None or self.eval_steps >= 1,
            f"eval_steps must be at least 1, got {self.eval_steps}",
        )
        _require(
            self.learning_rate is None or self.learning_rate > 0,
            f"learning_rate must be above 0, got {self.learning_rate}",
        )
        _require_number("loraplus_lr_ratio", self.loraplus_lr_ratio)
        _require(
            0 <= self.warmup_ratio < 1,
            f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio}",
        )
        _require(
            self.max_steps == -1 or self.max_steps > 0,
            f"max_steps must be above 0, or -1 for num_train_epochs, got {self.max_steps}",
        )
        for name in ("max_grad_norm", "weight_decay"):
            _require(
                getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}"
            )
        _require(
            self.eval_steps is None or self.data.eval_data is not None,
            "eval_steps is given but eval_data is not: give both",
        )
        _require(
            self.max_steps > 0 or self.num_train_epochs > 0,
            f"num_train_epochs must be above 0, got {self.num_train_epochs}",
        )
        _require(
            not self.plan and self.gpu_memory is None,
            "--plan and --gpu-memory are not there yet: leave them out",
        )


@dataclass(frozen=True)
class MergeConfig:
    """Fold a trained adapter into its base and write a checkpoint, in 16 bits or in 4."""

    adapter: str | tuple[str, ...]
    """folder with adapter_config.json and adapter_model.safetensors, or several whose sum it is"""
    output_dir: str
    """new folder for the merged checkpoint"""
    weights: tuple[float, ...] = ()
    """what each adapter is multiplied with, by default 1"""
    base_model: str | None = None
    """by default the base that the adapter's config names"""
    onto: Literal["nf4", "original", "auto"] = "nf4"
    """the dequantized 4-bit base, as trained; the original weights; or what verify finds better"""
    format: Literal["bf16", "fp16", "fp32", "nf4"] = "bf16"
    """dtype of the merged weights; nf4 is a bitsandbytes 4-bit checkpoint"""
    calibration: str | None = None
    """data for nf4, by default what the adapter was trained on, or else 'self': text that the model
    writes itself; 'none' does without"""
    blocksize: int | None = None
    """weights that share a scale in nf4; by default as in training"""
    double_quant: bool = True
    """quantize the scales too in nf4, where training did"""
    verify: str | None = None
    """data on which the merged model is measured against base + live adapter"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the arithmetic is done"""
    min_kept: float | None = None
    """with verify: publish nothing if less of the gain is kept, like 0.95"""
    max_shard_size: str = "5GB"
    """largest file of the output"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    def __post_init__(self) -> None:
        folders = (self.adapter,) if isinstance(self.adapter, str) else self.adapter
        _require(bool(folders), "adapter names no folder")
        _require(len(set(folders)) == len(folders), "adapter names a folder twice")
        _require(
            len(self.weights) in (0, len(folders)),
            f"weights must be one for each adapter: {len(folders)} adapters, "
            f"{len(self.weights)} weights",
        )
        _require(
            self.onto in ("nf4", "original", "auto"),
            f"onto must be nf4, original or auto, got {self.onto!r}",
        )
        _require(
            self.onto != "auto" or self.verify is not None,
            "onto auto measures both on the data of verify: give it too",
        )
        _require(
            self.format in ("bf16", "fp16", "fp32", "nf4"),
            f"format must be bf16, fp16, fp32 or nf4, got {self.format!r}",
        )
        _require(
            self.format == "nf4" or (not self.calibration and not self.blocksize),
            f"calibration and blocksize are for format nf4, and format is {self.format}: "
            "drop them, or choose nf4",
        )
        _require(
            self.blocksize is None or self.blocksize in BLOCKSIZES,
            f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}",
        )
        _require(
            self.min_kept is None or self.verify is not None,
            "min_kept is measured on the data of verify: give both",
        )
        _require(
            self.min_kept is None or 0 < self.min_kept <= 1,
            f"min_kept must be above 0 and at most 1, got {self.min_kept}",
        )

    @property
    def adapters(self) -> dict[str, float]:
        """Each adapter's folder and its weight."""
        folders = (self.adapter,) if isinstance(self.adapter, str) else self.adapter
        return dict(zip(folders, self.weights or (1.0,) * len(folders), strict=True))


def flat(config: TrainConfig | MergeConfig) -> dict[str, Any]:
    """Every setting under the name of its flag, in plain types that YAML and JSON can hold."""
    settings: dict[str, Any] = {}
    for member in fields(config):
        value = getattr(config, member.name)
        if is_dataclass(value):
            own = {m.name for m in fields(value) if "no_flag" not in m.metadata}
            settings |= {k: v for k, v in asdict(value).items() if k in own}  # type: ignore[arg-type]
        else:
            settings[member.name] = value
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
