"""Every setting of a run, as frozen dataclasses: inert data, no torch, no file access.

The field names are the flags of the commands and the keys of a YAML recipe, which qlora.cli reads
from here: a setting is added in one place. They are the names of transformers' TrainingArguments
and PEFT's LoraConfig wherever those have one. Annotation and metadata of a field say what it takes
(`Settings`); `__post_init__` checks that, then the rules across fields, and does nothing else.

Where the defaults come from:
  NF4, double quantization, blocksize 64, all linear layers, Adam beta2 0.999, no weight decay,
  max_grad_norm 0.3, paged optimizer, 16 rows a step: QLoRA (arXiv:2305.14314), appendix B and its
  scripts. lora_alpha 32, no warm-up, no dropout, and the learning-rate rule
  (qlora.training.run.default_learning_rate): LoRA Without Regret (Thinking Machines, 2025). Both
  keep the rate constant. It falls to zero here: measured on SmolLM2-135M and E2E, 100 steps, that
  ends at a held-out loss of 1.334 in place of 1.474 (benchmarks/results/nf4_against_16bit.jsonl).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from inspect import getsource
from typing import Any, Literal, TypeVar

from qlora.config.lora import POSITIONAL, RARE, SHARE, Settings, above, at_least, one_of, rule
from qlora.config.lora import LoraConfig as LoraConfig
from qlora.config.tasks import CAUSAL_LM, TASKS

Config = TypeVar("Config")
MAX_LENGTH = 2048  # tokens of a row
STEPS = rule("above 0, or -1 for num_train_epochs", lambda steps: steps == -1 or steps > 0)
KEPT = rule("above 0 and at most 1", lambda share: 0 < share <= 1)
BLOCKSIZE = one_of(32, 64, 128, 256, 512, 1024, 2048, 4096)
OLD_NAMES = {"loss_without_logits": "fast_path"}
"""former keys of recipes and run.yaml, which still open"""


@dataclass(frozen=True)
class QuantConfig(Settings):
    """How the frozen base is quantized."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code of the base weights"""
    blocksize: int = field(default=64, metadata=BLOCKSIZE)
    """weights that share one absmax, 32 to 4096"""
    double_quant: bool = True
    """quantize the absmax too: 4.127 bits, not 4.5"""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16; fp16 on a GPU without bf16, fp32 on a CPU without it"""
    skip_modules: tuple[str, ...] = field(default=(), metadata=RARE)
    """module names, or their last part, to leave unquantized (the output head always is)"""
    allow_unquantized: bool = field(default=False, metadata=RARE)
    """leave weights as they are that cannot be quantized"""


@dataclass(frozen=True)
class DataConfig(Settings):
    """What is trained on, and how a record becomes tokens."""

    data: str
    """training data: .jsonl .json .csv .parquet .txt, a folder of them, or a dataset hub name"""
    eval_data: str | None = None
    """the same for evaluation"""
    max_length: int = field(default=MAX_LENGTH, metadata=at_least(8))
    """rows longer than this many tokens are cut, and counted"""
    packing: bool = False
    """put rows together into packs of up to max_length tokens"""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Fine-tune a language model with QLoRA: 4-bit base, bf16 adapter."""

    model: str
    """local folder, hub name, bitsandbytes-4-bit checkpoint, or .gguf file"""
    output_dir: str
    """where the adapter, metrics and checkpoints go"""
    data: DataConfig
    """what is trained on"""
    task: str = field(default=CAUSAL_LM.name, metadata=one_of(*TASKS))
    """causal or encoder-decoder language model, or classifier of texts or of tokens"""
    revision: str | None = None
    """branch, tag or commit of a hub model"""
    trust_remote_code: bool = False
    """run code that comes with the model"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """the adapter"""
    quant: QuantConfig = QuantConfig()
    """the base"""
    per_device_train_batch_size: int = field(default=2, metadata=at_least(1))
    """rows, or packs of them, a forward pass"""
    gradient_accumulation_steps: int = field(default=8, metadata=at_least(1))
    """forward passes an optimizer step"""
    learning_rate: float | None = field(default=None, metadata=above(0))
    """by default from a rule, printed with its reason"""
    num_train_epochs: float = 1.0
    """passes over the data"""
    max_steps: int = field(default=-1, metadata=STEPS)
    """optimizer steps; overrides num_train_epochs when above 0"""
    loraplus_lr_ratio: float = field(default=1.0, metadata=RARE | above(0))
    """learning rate of B over that of A and all else: LoRA+ (arXiv:2402.12354), which takes 16"""
    lr_scheduler_type: str = "linear"
    """any of transformers': linear, cosine, constant, …"""
    warmup_ratio: float = field(default=0.0, metadata=SHARE)
    """share of the steps in which the learning rate rises"""
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    """AdamW weight decay"""
    max_grad_norm: float = field(default=0.3, metadata=at_least(0))
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
    """of initialisation, row order and dropout"""
    logging_steps: int = field(default=10, metadata=at_least(1))
    """steps between metrics.jsonl rows"""
    eval_steps: int | None = field(default=None, metadata=at_least(1))
    """steps between evaluations; by default an epoch"""
    save_steps: int = field(default=100, metadata=at_least(1))
    """steps between checkpoints; the last two are kept"""
    resume: bool = False
    """go on from the last checkpoint in output_dir"""
    samples: int = field(default=3, metadata=at_least(0))
    """rows whose answers before and after go to samples.jsonl; 0 for none"""
    report_to: tuple[str, ...] = ()
    """loggers: tensorboard, wandb, trackio, mlflow"""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """other transformers.TrainingArguments, as --trainer.NAME VALUE"""
    plan: bool = False
    """print what the run will need (not there yet)"""
    gpu_memory: str | None = None
    """budget to plan for, like 8GB (not there yet)"""

    def faults(self) -> Iterator[str]:
        """Rules across fields."""
        if self.data.packing and self.task != CAUSAL_LM.name:
            yield f"packing is for task {CAUSAL_LM.name}, and task is {self.task}: leave it out"
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            yield f"num_train_epochs must be above 0, got {self.num_train_epochs}"
        if self.offload_activations and not self.gradient_checkpointing:
            yield (
                "offload_activations moves what gradient_checkpointing keeps, and that is off: "
                "turn it on, or leave offload_activations out"
            )
        if self.eval_steps is not None and self.data.eval_data is None:
            yield "eval_steps is given but eval_data is not: give both"
        if self.plan or self.gpu_memory is not None:
            yield "--plan and --gpu-memory are not there yet: leave them out"


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Merge a trained adapter into its base and write a checkpoint, 16-bit or 4-bit."""

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
    blocksize: int | None = field(default=None, metadata=BLOCKSIZE)
    """weights that share a scale in nf4; by default as in training"""
    double_quant: bool = True
    """quantize the scales too in nf4, where training did"""
    verify: str | None = None
    """data on which the merged model is measured against base + live adapter"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the arithmetic is done"""
    min_kept: float | None = field(default=None, metadata=KEPT)
    """with verify: publish nothing if less of the gain is kept, like 0.95"""
    max_shard_size: str = "5GB"
    """largest file of the output"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    def faults(self) -> Iterator[str]:
        """Rules across fields."""
        count, weights = len(self._folders), len(self.weights)
        if not count:
            yield "adapter names no folder"
        if len(set(self._folders)) < count:
            yield "adapter names a folder twice"
        if weights not in (0, count):
            yield f"weights must be one for each adapter: {count} adapters, {weights} weights"
        if self.onto == "auto" and self.verify is None:
            yield "onto auto measures both on the data of verify: give it too"
        if self.format != "nf4" and (self.calibration or self.blocksize):
            yield (
                f"calibration and blocksize are for format nf4, and format is {self.format}: "
                "drop them, or choose nf4"
            )
        if self.min_kept is not None and self.verify is None:
            yield "min_kept is measured on the data of verify: give both"

    @property
    def _folders(self) -> tuple[str, ...]:
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter

    @property
    def adapters(self) -> dict[str, float]:
        """Each adapter's folder and its weight."""
        weights = self.weights or (1.0,) * len(self._folders)
        return dict(zip(self._folders, weights, strict=True))


@dataclass(frozen=True)
class PortableConfig(Settings):
    """Say which programs take an adapter, and write it so that all of them do."""

    adapter: str
    """folder with adapter_config.json and adapter_model.safetensors"""
    output_dir: str | None = None
    """new folder for the portable adapter; without it nothing is written"""


@dataclass(frozen=True)
class ReportConfig(Settings):
    """One page about a run, as HTML that needs no network: python -m qlora.report OUT"""

    adapter: str = field(metadata=POSITIONAL)
    """output folder of train.py; the name of the flag can be left out"""
    merged: str | None = None
    """merged checkpoint of it; by default the newest beside it"""


@dataclass(frozen=True)
class ModelChoice(Settings):
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

    def faults(self) -> Iterator[str]:
        """Rules across fields."""
        if (self.adapter is None) == (self.model is None):
            got = "neither" if self.adapter is None else "both"
            wanted = "--adapter, a folder that train.py wrote, or --model, a whole model"
            yield f"give either {wanted}; got {got}"
        if self.base_model and self.adapter is None:
            yield "base_model goes with --adapter alone: leave it out"
        if self.load_in_4bit and self.model is None:
            yield "load_in_4bit goes with --model alone: leave it out"


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ModelChoice):
    """Talk to a tuned model, in several turns."""

    prompt: str | None = None
    """one question: its answer is printed, and that is all"""
    compare: bool = False
    """answers of the base beside those of the adapter, each with its own history"""
    system: str | None = None
    """system message"""
    max_new_tokens: int = field(default=512, metadata=at_least(1))
    """longest answer, in tokens"""
    temperature: float = field(default=0.0, metadata=at_least(0))
    """0: always the most likely token; about 0.7: livelier, each time another"""
    seed: int | None = None
    """of what is drawn with a temperature, by default a new one each time"""

    def faults(self) -> Iterator[str]:
        """Rules across fields."""
        yield from super().faults()
        if self.compare and self.adapter is None:
            yield "compare shows the base beside its adapter: give --adapter, not --model"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelChoice):
    """Measure a tuned model on data: loss and answers, beside those of its base."""

    data: str
    """rows like those of training: .jsonl .json .csv .parquet .txt, a folder, or a hub name"""
    limit: int | None = field(default=None, metadata=at_least(1))
    """only the first so many rows"""
    max_length: int | None = field(default=None, metadata=at_least(8))
    """rows longer than this many tokens are cut; by default as in training, or else 2048"""
    generate: bool = True
    """let it answer, and compare the answers with those wanted"""
    max_new_tokens: int = field(default=256, metadata=at_least(1))
    """longest answer, in tokens"""
    output: str | None = None
    """all of it as JSON, by default evaluation.json in the adapter's folder"""


# ---- settings by name, as flags and recipes have them ----


def settings_of(config_class: Any) -> dict[str, Field[Any]]:
    """Name -> field of the settings with a flag; those of nested dataclasses last."""
    members = [member for member in fields(config_class) if "no_flag" not in member.metadata]
    settings = {member.name: member for member in members if not is_dataclass(member.type)}
    for nested in (member.type for member in members if is_dataclass(member.type)):
        settings |= settings_of(nested)
    return settings


def is_required(member: Field[Any]) -> bool:
    """Whether a field has no default."""
    return member.default is member.default_factory is MISSING


def docs_of(config_class: Any) -> dict[str, str]:
    """The docstring below each field, from the source: Python keeps none; and the class's title."""
    classes = (base for base in reversed(config_class.__mro__) if is_dataclass(base))
    source = "\n".join(getsource(base) for base in classes)  # type: ignore[arg-type]
    docs = re.findall(r'^    (\w+): .*?"""(.*?)"""', source, re.DOTALL | re.MULTILINE)
    title = str(config_class.__doc__).partition("\n")[0]
    return {"": title} | {name: " ".join(text.split()) for name, text in docs}


def build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The config with these settings, and defaults for the others; the inverse of `flat`."""
    given: dict[str, Any] = {}
    for member in fields(config_class):  # type: ignore[arg-type]
        if is_dataclass(member.type):
            given[member.name] = build(member.type, values)  # type: ignore[arg-type]
        elif member.name in values and "no_flag" not in member.metadata:
            given[member.name] = values[member.name]
    return config_class(**given)


def flat(config: TrainConfig | MergeConfig) -> dict[str, Any]:
    """Every setting under the name of its flag, in plain types that YAML and JSON can hold."""
    settings: dict[str, Any] = {}
    for member in fields(config):
        value = getattr(config, member.name)
        inner = settings_of(type(value)) if is_dataclass(value) else ()
        settings |= {name: getattr(value, name) for name in inner} or {member.name: value}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
