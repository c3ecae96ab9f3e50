"""Every setting of a run, as frozen dataclasses: inert data, no torch, no file access.

The field names are the flags of `train.py` and `merge_dequant.py` and the keys of a YAML recipe
(qlora.cli makes both from here), so there is one place to add a setting. They are the names of
transformers' TrainingArguments and PEFT's LoraConfig wherever those have one. `__post_init__`
validates and does nothing else.

Where the defaults come from:
  NF4, double quantization, blocksize 64, all linear layers, Adam beta2 0.999, no weight decay,
  max_grad_norm 0.3, paged optimizer, 16 rows a step: QLoRA (arXiv:2305.14314), appendix B and its
  scripts. lora_alpha 32, no warm-up, no dropout, and the learning-rate rule
  (qlora.training.run.default_learning_rate): LoRA Without Regret (Thinking Machines, 2025). Both
  keep the rate constant. It falls to zero here: measured on SmolLM2-135M and E2E, 100 steps, that
  ends at a held-out loss of 1.334 in place of 1.474 (benchmarks/results/nf4_against_16bit.jsonl).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from qlora.config.lora import RARE, require, require_at_least, require_number
from qlora.config.lora import LoraConfig as LoraConfig

POSITIONAL = {"positional": True}
"""for what may be given without the name of its flag"""
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_LENGTH = 2048


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
        require(
            self.quant_type in ("nf4", "fp4"),
            f"quant_type must be nf4 or fp4, got {self.quant_type!r}",
        )
        require(
            self.blocksize in BLOCKSIZES,
            f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}",
        )
        require(
            self.compute_dtype in ("auto", "bf16", "fp16", "fp32"),
            f"compute_dtype must be auto, bf16, fp16 or fp32, got {self.compute_dtype!r}",
        )


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how a record becomes tokens."""

    data: str
    """training data: .jsonl .json .csv .parquet .txt, a folder of them, or a dataset hub name"""
    eval_data: str | None = None
    """the same for evaluation"""
    max_length: int = MAX_LENGTH
    """rows longer than this many tokens are cut, and counted"""
    packing: bool = False
    """put rows together into packs of up to max_length tokens"""

    def __post_init__(self) -> None:
        require(self.max_length >= 8, f"max_length must be at least 8, got {self.max_length}")


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
    lora: LoraConfig = field(default_factory=LoraConfig)
    quant: QuantConfig = QuantConfig()
    per_device_train_batch_size: int = 2
    """rows, or packs of them, a forward pass"""
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
    offload_activations: bool = field(default=False, metadata=RARE)
    """what gradient checkpointing keeps waits in host memory: longer rows on a GPU"""
    offload_embedding: bool = field(default=False, metadata=RARE)
    """the embedding is read from host memory, if the output head is not tied to it"""
    fast_path: bool = field(default=True, metadata=RARE)
    """compute layers and loss by functions that keep less for the backward pass: the same numbers,
    faster and in less memory"""
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
    samples: int = 3
    """rows whose answers before and after go to samples.jsonl; 0 for none"""
    report_to: tuple[str, ...] = ()
    """loggers: tensorboard, wandb, trackio, mlflow, …"""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """anything else of transformers.TrainingArguments, as --trainer.NAME VALUE"""
    plan: bool = False
    """print what the run will need (not there yet)"""
    gpu_memory: str | None = None
    """budget to plan for, like 8GB (not there yet)"""

    def __post_init__(self) -> None:
        require(
            self.task in ("causal-lm", "seq2seq", "seq-cls", "token-cls"),
            f"task must be causal-lm, seq2seq, seq-cls or token-cls, got {self.task!r}",
        )
        require(
            not self.data.packing or self.task == "causal-lm",
            f"packing is for task causal-lm, and task is {self.task}: leave it out",
        )
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
        ):
            require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        require(
            self.eval_steps is None or self.eval_steps >= 1,
            f"eval_steps must be at least 1, got {self.eval_steps}",
        )
        require(
            self.learning_rate is None or self.learning_rate > 0,
            f"learning_rate must be above 0, got {self.learning_rate}",
        )
        require_number("loraplus_lr_ratio", self.loraplus_lr_ratio)
        require(
            0 <= self.warmup_ratio < 1,
            f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio}",
        )
        require(
            self.max_steps == -1 or self.max_steps > 0,
            f"max_steps must be above 0, or -1 for num_train_epochs, got {self.max_steps}",
        )
        for name in ("max_grad_norm", "weight_decay"):
            require(
                getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}"
            )
        require(
            self.gradient_checkpointing or not self.offload_activations,
            "offload_activations moves what gradient_checkpointing keeps, and that is off: turn it "
            "on, or leave offload_activations out",
        )
        require(
            self.eval_steps is None or self.data.eval_data is not None,
            "eval_steps is given but eval_data is not: give both",
        )
        require(self.samples >= 0, f"samples must be at least 0, got {self.samples}")
        require(
            self.max_steps > 0 or self.num_train_epochs > 0,
            f"num_train_epochs must be above 0, got {self.num_train_epochs}",
        )
        require(
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
        require(bool(folders), "adapter names no folder")
        require(len(set(folders)) == len(folders), "adapter names a folder twice")
        require(
            len(self.weights) in (0, len(folders)),
            f"weights must be one for each adapter: {len(folders)} adapters, "
            f"{len(self.weights)} weights",
        )
        require(
            self.onto in ("nf4", "original", "auto"),
            f"onto must be nf4, original or auto, got {self.onto!r}",
        )
        require(
            self.onto != "auto" or self.verify is not None,
            "onto auto measures both on the data of verify: give it too",
        )
        require(
            self.format in ("bf16", "fp16", "fp32", "nf4"),
            f"format must be bf16, fp16, fp32 or nf4, got {self.format!r}",
        )
        require(
            self.format == "nf4" or (not self.calibration and not self.blocksize),
            f"calibration and blocksize are for format nf4, and format is {self.format}: "
            "drop them, or choose nf4",
        )
        require(
            self.blocksize is None or self.blocksize in BLOCKSIZES,
            f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}",
        )
        require(
            self.min_kept is None or self.verify is not None,
            "min_kept is measured on the data of verify: give both",
        )
        require(
            self.min_kept is None or 0 < self.min_kept <= 1,
            f"min_kept must be above 0 and at most 1, got {self.min_kept}",
        )

    @property
    def adapters(self) -> dict[str, float]:
        """Each adapter's folder and its weight."""
        folders = (self.adapter,) if isinstance(self.adapter, str) else self.adapter
        return dict(zip(folders, self.weights or (1.0,) * len(folders), strict=True))


@dataclass(frozen=True)
class PortableConfig:
    """Say which programs take an adapter, and write it so that all of them do."""

    adapter: str
    """folder with adapter_config.json and adapter_model.safetensors"""
    output_dir: str | None = None
    """new folder for the portable adapter; without it nothing is written"""


@dataclass(frozen=True)
class ReportConfig:
    """One page about a run, as HTML that needs no network: python -m qlora.report OUT"""

    adapter: str = field(metadata=POSITIONAL)
    """output folder of train.py; the name of the flag can be left out"""
    merged: str | None = None
    """merged checkpoint of it; by default the newest beside it"""


@dataclass(frozen=True)
class ModelChoice:
    """Which model is tried: a base with an adapter on it, or a whole model."""

    adapter: str | None = None
    """folder of a trained adapter, as train.py wrote it"""
    model: str | None = None
    """in its place a whole model: a merged folder, a hub name, or a .gguf file"""
    base_model: str | None = None
    """by default the base that the adapter's config names"""
    load_in_4bit: bool = False
    """quantize a whole model that is not, as training would"""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """by default as in training, where this machine computes in it"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    def __post_init__(self) -> None:
        require(
            (self.adapter is None) != (self.model is None),
            "give either --adapter, a folder that train.py wrote, or --model, a whole model; got "
            + ("neither" if self.adapter is None else "both"),
        )
        for name, whole in (("base_model", False), ("load_in_4bit", True)):
            require(
                not getattr(self, name) or whole == (self.model is not None),
                f"{name} goes with --{'model' if whole else 'adapter'} alone: leave it out",
            )


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ModelChoice):
    """Talk to a tuned model, in several turns."""

    prompt: str | None = None
    """one question: its answer is printed, and that is all"""
    compare: bool = False
    """answers of the base beside those of the adapter, each with its own history"""
    system: str | None = None
    """system message"""
    max_new_tokens: int = 512
    """longest answer, in tokens"""
    temperature: float = 0.0
    """0: always the most likely token; about 0.7: livelier, each time another"""
    seed: int | None = None
    """of what is drawn with a temperature, by default a new one each time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.compare or self.adapter is not None,
            "compare shows the base beside its adapter: give --adapter, not --model",
        )
        require_at_least("max_new_tokens", self.max_new_tokens, 1)
        require_at_least("temperature", self.temperature, 0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelChoice):
    """Measure a tuned model on data: loss and answers, beside those of its base."""

    data: str
    """rows like those of training: .jsonl .json .csv .parquet .txt, a folder, or a hub name"""
    limit: int | None = None
    """only the first so many rows"""
    max_length: int | None = None
    """rows longer than this many tokens are cut; by default as in training, or else 2048"""
    generate: bool = True
    """let it answer, and compare the answers with those wanted"""
    max_new_tokens: int = 256
    """longest answer, in tokens"""
    output: str | None = None
    """all of it as JSON, by default evaluation.json in the adapter's folder"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("limit", self.limit, 1)
        require_at_least("max_length", self.max_length, 8)
        require_at_least("max_new_tokens", self.max_new_tokens, 1)


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
