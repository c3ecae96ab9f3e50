"""All settings of the commands, as frozen dataclasses: no torch, no file access.

Fields are named as in transformers' TrainingArguments and PEFT's LoraConfig where those have them;
qlora.cli derives flags, recipe keys and help from the fields.

Sources of the defaults:
  NF4, double quantization, blocksize 64, all linear layers, Adam beta2 0.999, no weight decay,
  max_grad_norm 0.3, paged optimizer, 16 rows per step: QLoRA (arXiv:2305.14314), appendix B and its
  scripts. lora_alpha 32, no warm-up, no dropout, and the learning-rate rule
  (qlora.training.run.default_learning_rate): LoRA Without Regret (Thinking Machines, 2025). Both
  keep the rate constant. Here it falls to zero: on SmolLM2-135M and E2E, 100 steps, the held-out
  loss is 1.334 instead of 1.474 (benchmarks/results/nf4_against_16bit.jsonl).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from inspect import getsource
from typing import Any, Literal, TypeVar

from qlora.config.data import MAX_LENGTH as MAX_LENGTH
from qlora.config.data import DataConfig as DataConfig
from qlora.config.lora import (
    POSITIONAL,
    RARE,
    SHARE,
    Settings,
    above,
    at_least,
    one_of,
    rule,
)
from qlora.config.lora import LoraConfig as LoraConfig
from qlora.config.tasks import CAUSAL_LM, SEQ2SEQ, TASKS

Config = TypeVar("Config")
MergeFormat = Literal[
    "bf16", "fp16", "fp32", "nf4", "int4",
    "gguf-bf16", "gguf-q8_0", "gguf-q4_0", "gguf-q4_1", "gguf-q4_k_m",
]  # fmt: skip
STEPS = rule("above 0, or -1 for num_train_epochs", lambda steps: steps == -1 or steps > 0)
KEPT = rule("above 0 and at most 1", lambda share: 0 < share <= 1)
BLOCKSIZE = one_of(32, 64, 128, 256, 512, 1024, 2048, 4096)
GO_ON: Literal["go-on"] = "go-on"
OLD_NAMES = {"loss_without_logits": "fast_path"}
"""old names of settings, accepted in recipes and run.yaml"""


@dataclass(frozen=True)
class QuantConfig(Settings):
    """How the frozen base is quantized."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type"""
    blocksize: int = field(default=64, metadata=BLOCKSIZE)
    """weights per absmax value, 32 to 4096"""
    double_quant: bool = True
    """quantize the absmax values too: 4.127 bits per weight, not 4.5"""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 if supported, otherwise fp16 on a GPU, fp32 on a CPU"""
    skip_modules: tuple[str, ...] = field(default=(), metadata=RARE)
    """modules to leave unquantized besides the output head, by full name or last part of it"""
    allow_unquantized: bool = field(default=False, metadata=RARE)
    """accept weights that cannot be quantized, and leave them unquantized"""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Fine-tune a language model with QLoRA: a frozen 4-bit base and a LoRA adapter."""

    model: str
    """local folder, hub name or .gguf file; may be in bitsandbytes 4-bit"""
    output_dir: str
    """folder for the adapter, metrics and checkpoints"""
    data: DataConfig
    """training and evaluation data"""
    task: str = field(default=CAUSAL_LM.name, metadata=one_of(*TASKS))
    """causal or encoder-decoder language model, text or token classifier"""
    revision: str | None = None
    """branch, tag or commit of a hub model"""
    trust_remote_code: bool = False
    """run the code in the model's repository"""
    adapter: str | None = None
    """folder of a saved adapter to start from"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """the adapter"""
    quant: QuantConfig = QuantConfig()
    """quantization of the base"""
    per_device_train_batch_size: int = field(default=2, metadata=at_least(1))
    """rows (or packs) per forward pass"""
    gradient_accumulation_steps: int = field(default=8, metadata=at_least(1))
    """forward passes per optimizer step"""
    learning_rate: float | None = field(default=None, metadata=above(0))
    """by default from a rule, which is printed"""
    num_train_epochs: float = 1.0
    """passes over the training data"""
    max_steps: int = field(default=-1, metadata=STEPS)
    """optimizer steps; overrides num_train_epochs when above 0"""
    loraplus_lr_ratio: float = field(default=1.0, metadata=RARE | above(0))
    """LoRA+ (arXiv:2402.12354): learning rate of B relative to all others; the paper uses 16"""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant or any other of transformers"""
    warmup_ratio: float = field(default=0.0, metadata=SHARE)
    """share of steps with learning-rate warm-up"""
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    """AdamW weight decay"""
    max_grad_norm: float = field(default=0.3, metadata=at_least(0))
    """gradient clipping norm"""
    optim: str = "paged_adamw_8bit"
    """paged_adamw_32bit, adamw_torch or any other of transformers"""
    gradient_checkpointing: bool = True
    """recompute activations: slower, far less memory"""
    offload_activations: bool = field(default=False, metadata=RARE)
    """keep the activations of gradient checkpointing in host memory, so that longer rows fit"""
    offload_embedding: bool = field(default=False, metadata=RARE)
    """keep the embedding in host memory, unless it is tied to the output head"""
    sharding: Literal["ddp", "fsdp"] = field(default="ddp", metadata=RARE)
    """with several GPUs, the base on each of them: whole (ddp), or a shard (fsdp)"""
    offload_base: bool = field(default=False, metadata=RARE)
    """with fsdp, keep the shards of the base in host memory"""
    fast_path: bool = field(default=True, metadata=RARE)
    """use faster, equivalent layers and loss that save less memory for the backward pass"""
    seed: int = 42
    """seed of initialisation, row order and dropout"""
    logging_steps: int = field(default=10, metadata=at_least(1))
    """steps between logged metrics"""
    eval_steps: int | None = field(default=None, metadata=at_least(1))
    """steps between evaluations; by default one epoch"""
    save_steps: int = field(default=100, metadata=at_least(1))
    """steps between checkpoints"""
    save_total_limit: int = field(default=2, metadata=RARE | at_least(1))
    """checkpoints to keep"""
    on_full_disk: Literal["go-on", "stop"] = field(default=GO_ON, metadata=RARE)
    """when a checkpoint cannot be written: train on until the next one, or stop"""
    max_bad_steps: int = field(default=5, metadata=RARE | at_least(1))
    """steps in a row without a finite loss and gradient after which the run stops"""
    early_stopping_patience: int | None = field(default=None, metadata=RARE | at_least(1))
    """evaluations without a new best after which the run stops, with the best adapter"""
    resume: bool = False
    """continue from the last checkpoint in output_dir"""
    resume_anyway: bool = field(default=False, metadata=RARE)
    """resume with other rows, seed, batch size or regularization too, from the next step on"""
    samples: int = field(default=3, metadata=at_least(0))
    """rows in samples.jsonl, answered before and after training; 0 for none"""
    report_to: tuple[str, ...] = ()
    """loggers: tensorboard, wandb, trackio, mlflow"""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """other transformers.TrainingArguments, as --trainer.NAME VALUE"""
    inspect: int | None = field(default=None, metadata=at_least(1))
    """show rows token by token; do not train"""
    inspect_rows: tuple[int, ...] = field(default=(), metadata=RARE)
    """for inspect: the numbers of the rows to show, like 3,17"""
    plan: bool = False
    """print the memory it needs; do not train"""
    gpu_memory: str | None = None
    """for plan: the memory of a card, like 8GiB; by default that of the GPU that is there"""
    gpus: int | None = field(default=None, metadata=RARE | at_least(1))
    """for plan: the number of GPUs, with a process each"""
    json: bool = field(default=False, metadata=RARE)
    """for plan and inspect: print JSON"""
    fit: bool = field(default=False, metadata=RARE)
    """for plan: print the fastest flags with which the run fits, or those that use what is free"""
    plan_picture: str | None = field(default=None, metadata=RARE)
    """for plan: a file for the picture of the memory over a step, such as plan.png"""

    def faults(self) -> Iterator[str]:
        if self.data.packing and self.task != CAUSAL_LM.name:
            yield f"packing needs task {CAUSAL_LM.name}, got {self.task}: turn it off"
        if self.data.long_rows == "split" and self.task != CAUSAL_LM.name:
            yield f"long_rows split needs task {CAUSAL_LM.name}, got {self.task}: drop or truncate"
        if self.data.streaming and self.max_steps <= 0 and not self.inspects:
            yield "streaming needs max_steps, as the number of rows is not known: give both"
        if self.data.streaming and self.task not in (CAUSAL_LM.name, SEQ2SEQ.name):
            fault = f"streaming needs task causal-lm or seq2seq, got {self.task}: turn it off"
            yield f"{fault}, class names are found by reading all rows"
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            yield f"num_train_epochs must be above 0, got {self.num_train_epochs}"
        if self.offload_activations and not self.gradient_checkpointing:
            yield "offload_activations needs gradient_checkpointing: turn both on, or both off"
        if self.offload_base and self.sharding != "fsdp":
            yield "offload_base needs sharding fsdp: give both, or leave it out"
        if self.sharding == "fsdp":
            yield from self._unfit_for_shards()
        if self.resume_anyway and not self.resume:
            yield "--resume-anyway needs --resume: give both, or leave it out"
        if self.early_stopping_patience is not None and not self.data.evaluates:
            yield "early_stopping_patience needs eval_data or eval_share: give both"
        if self.eval_steps is not None and not self.data.evaluates:
            yield "eval_steps needs eval_data or eval_share: give both"
        if bad := [number for number in self.inspect_rows if number < 1]:
            yield f"inspect_rows must be whole numbers above 0, got {bad[0]}"
        if self.plan and self.inspects:
            yield "plan and inspect are two commands: give one of them"
        for name in ("gpu_memory", "gpus", "json", "fit", "plan_picture"):
            if getattr(self, name) and not (self.plan or (name == "json" and self.inspects)):
                flag = f"--{name.replace('_', '-')}"
                needs = "--plan or --inspect" if name == "json" else "--plan"
                yield f"{flag} needs {needs}: give both, or leave it out"

    def _unfit_for_shards(self) -> Iterator[str]:
        """What needs the values of the whole base on each GPU."""
        lora, needs = self.lora, "needs the whole base on each GPU: use sharding ddp, or"
        if self.task not in (CAUSAL_LM.name, SEQ2SEQ.name):
            yield f"sharding fsdp needs task causal-lm or seq2seq, got {self.task}: use ddp"
        if lora.init_lora_weights not in (True, "gaussian"):
            yield f"init_lora_weights {lora.init_lora_weights} {needs} leave it out"
        for name in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"):
            if getattr(lora, name):
                yield f"{name} {needs} leave it out"
        if lora.bias != "none":
            yield f"bias {lora.bias} {needs} leave it out"
        if self.offload_embedding:
            yield f"offload_embedding {needs} leave it out"

    @property
    def inspects(self) -> bool:
        """Whether rows are shown, and nothing is trained."""
        return self.inspect is not None or bool(self.inspect_rows)


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Merge a trained adapter into its base and write a checkpoint, 16-bit or 4-bit."""

    adapter: str | tuple[str, ...]
    """folder with adapter_config.json and adapter_model.safetensors, or several folders to sum"""
    output_dir: str
    """new folder for the merged checkpoint"""
    weights: tuple[float, ...] = ()
    """factor of each adapter, by default 1"""
    base_model: str | None = None
    """base model; by default the one that adapter_config.json names"""
    trained_on: Literal["nf4", "16bit"] | None = None
    """the base in training; by default what the adapter's files tell, nf4 where they do not"""
    onto: Literal["nf4", "original", "auto"] | None = None
    """base weights: dequantized 4-bit; original; or the better of both on verify; by default those
    of training"""
    format: MergeFormat = "bf16"
    """of the merged weights: a dtype; nf4, a bitsandbytes checkpoint; int4, one for vLLM and SGLang
    (compressed-tensors); gguf-..., a file for llama.cpp and Ollama"""
    calibration: str | Literal["self", "none"] | None = None
    """data to choose 4-bit codes on, 'self' (text that the model generates) or 'none'; by default
    the training data, or 'self' if it could not be found"""
    calibration_tokens: int | None = field(default=None, metadata=at_least(1))
    """about how many tokens of it; by default 4,096 for nf4, 16,384 for int4 and gguf-..., more
    where layers are wide"""
    blocksize: int | None = field(default=None, metadata=BLOCKSIZE)
    """weights per absmax value in nf4; by default as in training"""
    double_quant: bool = True
    """quantize the absmax values too in nf4, if training did"""
    symmetric: bool = True
    """no zero points in int4, which all servers know"""
    verify: str | None = None
    """data to compare the merged model with base + adapter on"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device that computes the merge"""
    min_kept: float | None = field(default=None, metadata=KEPT)
    """with verify: write nothing if less than this share of the gain is kept, like 0.95"""
    max_shard_size: str = "5GB"
    """maximum size of an output file"""
    trust_remote_code: bool = False
    """run the code in the model's repository"""

    def faults(self) -> Iterator[str]:
        count, weights = len(self._folders), len(self.weights)
        if not count:
            yield "adapter names no folder"
        if len(set(self._folders)) < count:
            yield "adapter names a folder twice"
        if weights not in (0, count):
            yield f"weights must have one number per adapter: {count} adapters, {weights} weights"
        if self.onto == "auto" and self.verify is None:
            yield "onto auto needs verify, data to measure both on: give both"
        if self.calibration and not self.chooses_codes:
            yield f"calibration needs a 4-bit format, got {self.format}: leave it out"
        if self.calibration_tokens and (not self.chooses_codes or self.calibration == "none"):
            yield "calibration_tokens needs a 4-bit format and calibration: leave it out"
        if self.blocksize and self.format != "nf4":
            yield f"blocksize needs format nf4, got {self.format}: leave it out"
        if not self.symmetric and self.format != "int4":
            yield f"no_symmetric needs format int4, got {self.format}: leave it out"
        if self.min_kept is not None and self.verify is None:
            yield "min_kept needs verify, data to measure it on: give both"

    @property
    def is_gguf(self) -> bool:
        """Whether the merged model is one file for llama.cpp."""
        return self.format.startswith("gguf")

    @property
    def chooses_codes(self) -> bool:
        """Whether codes are chosen that keep the adapter; 8 bits keep it rounded to nearest."""
        return self.format in ("nf4", "int4") or self.format.startswith("gguf-q4")

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
    """List the programs that load an adapter, and convert it so that all of them do."""

    adapter: str
    """folder with adapter_config.json and adapter_model.safetensors"""
    output_dir: str | None = None
    """new folder for the converted adapter; by default nothing is written"""
    gguf: bool = False
    """write it as a LoRA-GGUF for llama.cpp and Ollama; with base_only, the base as a GGUF"""
    base_only: bool = False
    """write instead the dequantized 4-bit base that it was trained on, to serve adapters on"""
    base_model: str | None = None
    """for gguf and base_only: the base; by default the one that adapter_config.json names"""
    trust_remote_code: bool = False
    """for base_only: run the code in the model's repository"""

    def faults(self) -> Iterator[str]:
        for name in ("gguf", "base_only"):
            if getattr(self, name) and self.output_dir is None:
                yield f"{name} needs output_dir, a new folder to write to: give both"


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Write a self-contained HTML report of a run: python -m qlora.report OUT"""

    adapter: str = field(metadata=POSITIONAL)
    """output folder of train.py; the flag's name may be omitted"""
    merged: str | None = None
    """its merged checkpoint; by default the newest beside the adapter"""


@dataclass(frozen=True)
class ModelChoice(Settings):
    """The model to run: a base with an adapter, or a complete model."""

    adapter: str | None = None
    """adapter folder, as written by train.py"""
    model: str | None = None
    """instead of an adapter, a complete model: merged folder, hub name or .gguf file"""
    base_model: str | None = None
    """base model; by default the one that adapter_config.json names"""
    load_in_4bit: bool = False
    """quantize the model of --model as training would"""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: as in training, if this machine supports it"""
    trust_remote_code: bool = False
    """run the code in the model's repository"""
    chat_template: str | None = field(default=None, metadata=RARE)
    """file with a chat template; by default the one of training"""
    enable_thinking: bool | None = field(default=None, metadata=RARE)
    """the chat template's variable; by default as in training"""
    template: Mapping[str, Any] = field(default_factory=dict, metadata=RARE)
    """other variables of the chat template, as --template.NAME VALUE"""

    def faults(self) -> Iterator[str]:
        if (self.adapter is None) == (self.model is None):
            got = "neither" if self.adapter is None else "both"
            wanted = "--adapter, a folder written by train.py, or --model, a complete model"
            yield f"give either {wanted}; got {got}"
        if self.base_model and self.adapter is None:
            yield "base_model needs --adapter: leave it out"
        if self.load_in_4bit and self.model is None:
            yield "load_in_4bit needs --model: leave it out"


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ModelChoice):
    """Chat with a fine-tuned model."""

    prompt: str | None = None
    """print the answer to this prompt and exit"""
    compare: bool = False
    """also show the base's answers; each model keeps its own history"""
    system: str | None = None
    """system message"""
    max_new_tokens: int = field(default=512, metadata=at_least(1))
    """maximum tokens per answer"""
    temperature: float = field(default=0.0, metadata=at_least(0))
    """sampling temperature; 0 always takes the most likely token"""
    seed: int | None = None
    """sampling seed; by default a new one each time"""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.compare and self.adapter is None:
            yield "compare needs a base and its adapter: give --adapter, not --model"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelChoice):
    """Evaluate a fine-tuned model: loss and answers, compared with its base."""

    data: str
    """evaluation data: .jsonl .json .csv .parquet .txt, a folder of them, or a hub dataset"""
    limit: int | None = field(default=None, metadata=at_least(1))
    """evaluate only the first LIMIT rows"""
    max_length: int | None = field(default=None, metadata=at_least(8))
    """maximum tokens per row; by default as in training, otherwise 2048"""
    generate: bool = True
    """generate answers and compare them with the expected ones"""
    max_new_tokens: int = field(default=256, metadata=at_least(1))
    """maximum tokens per answer"""
    output: str | None = None
    """JSON file for the results; by default evaluation.json in the adapter's folder"""


# ---- settings by name, for flags and recipes ----


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
    """Field -> docstring, read from the source since Python drops it; '' -> the class's title."""
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
