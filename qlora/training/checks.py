"""The checks of a run's settings, before anything is loaded: the output folder, the machine and the
loggers; and Trainer's arguments."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields, replace
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations import integration_utils as loggers

from qlora.config import TrainConfig
from qlora.errors import UserError, did_you_mean, first_line, require
from qlora.fast.offload import require_gpu
from qlora.files import RUN, read_metrics, read_samples, require_new, require_short
from qlora.training import ranks
from qlora.training.checkpoints import complete_checkpoints
from qlora.training.outputs import checkpoint_to_resume, is_left_over

# TrainingArguments that `--trainer.NAME` refuses, and why: names, or beginnings that end in `_`.
REFUSED_ARGUMENTS = {
    "follows from the other settings: leave it out": (
        "activation_checkpointing", "activation_checkpointing_kwargs", "bf16", "bf16_full_eval",
        "do_eval", "do_predict", "do_train", "fp16", "fp16_full_eval",
        "gradient_checkpointing_kwargs", "include_num_input_tokens_seen", "label_names",
        "label_smoothing_factor", "length_column_name", "remove_unused_columns", "use_cache",
        "use_cpu",
    ),
    "is not supported, several GPUs need no setting: leave it out": (
        "accelerator_config", "average_tokens_across_devices", "ddp_", "deepspeed", "fsdp",
        "fsdp_", "local_rank", "log_level_replica", "log_on_each_node", "parallelism_config",
        "save_on_each_node",
    ),
    "is not supported, 4-bit layers have faster versions here (--fast-path): leave it out": (
        "liger_", "torch_compile", "torch_compile_", "use_liger_kernel",
    ),
    "has no effect here: leave it out": (
        "batch_eval_metrics", "disable_tqdm", "eval_accumulation_steps", "eval_do_concat_batches",
        "eval_use_gather_object", "include_for_metrics", "prediction_loss_only",
    ),
    "is not supported: upload the folder after training, `hf upload NAME FOLDER`": (
        "hub_", "push_to_hub",
    ),
    "is not needed, a batch that does not fit is split and the loss stays the same: leave it out": (
        "auto_find_batch_size",
    ),
    "is not supported: --resume continues from the last checkpoint": ("resume_from_checkpoint",),
}  # fmt: skip
WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a word",
          dict: "{NAME: VALUE}", list: "a list"}  # fmt: skip
# Logger -> package to install; the others have one name for both.
LOGGER_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}
# Settings with the same name and meaning in TrainConfig and TrainingArguments.
SHARED_ARGUMENTS = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim",
    "seed", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
)  # fmt: skip
# Argument -> the setting that it would replace, and the value with which it does not.
REPLACING = {"warmup_steps": ("warmup_ratio", None), "eval_strategy": ("eval_steps", "steps")}
# Arguments of rows that may be read in any order, and by several processes.
OF_MAPPED_ROWS = (
    "train_sampling_strategy", "dataloader_num_workers", "ignore_data_skip",
    "dataloader_persistent_workers", "dataloader_prefetch_factor",
)  # fmt: skip
# Arguments that need evaluation, besides the strategies.
NEED_EVALUATION = ("load_best_model_at_end", "metric_for_best_model", "eval_on_start")


def check_settings(config: TrainConfig, output: Path) -> str | None:
    """Refuse settings that cannot be trained with, and an `output` that cannot be written to.
    Returns the checkpoint to resume from; None for a new run."""
    if not os.path.lexists(output):
        require_short(output)
    checkpoint = checkpoint_to_resume(output) if config.resume else None
    if checkpoint:
        read_metrics(output)  # these two are read again in the run: a damaged file raises now
        read_samples(output)
    if not checkpoint and not is_left_over(output):
        dead = "remove it: it has no checkpoint to resume from"
        is_dead = not complete_checkpoints(output)
        fix = f"give a new --output-dir, or {dead if is_dead else '--resume to continue it'}"
        require(not (output / RUN).exists(), f"{output} already holds a run: {fix}")
        require_new(output)
    several = f"--sharding fsdp is for several processes: {ranks.START}, or leave it out"
    require(config.sharding != "fsdp" or ranks.count() > 1, several)
    for name in ("offload_activations", "offload_embedding", "offload_base"):
        if getattr(config, name):
            require_gpu(f"--{name.replace('_', '-')}")
    return str(checkpoint) if checkpoint else None


def typed_argument(argument: Field[Any], value: Any) -> Any:
    """A value of `--trainer.NAME` in the type that TrainingArguments has for it: `no`, a word, is
    false for a switch. Raises UserError for another type, and for a word that is no choice."""
    hint, given = get_type_hints(TrainingArguments)[argument.name], value
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in hints]
    kinds = [bool if kind is Literal else kind for kind in kinds]  # Literal[False]
    value = _switched(value) if bool in kinds else value
    if isinstance(value, dict):
        value = {key: _switched(item) for key, item in value.items()}
    if type(value) not in (*kinds, *[int] * (float in kinds)):
        wanted = " or ".join(dict.fromkeys(WANTED[kind] for kind in kinds if kind in WANTED))
        fix = f": write '{given}' in quotes" if str in kinds else ""
        raise UserError(f"--trainer.{argument.name} must be {wanted}, got {given!r}{fix}")
    words = [choice.value for kind in kinds if issubclass(kind, Enum) for choice in kind]
    words = words or list(argument.metadata.get("choices") or ())
    is_choice = not words or value is None or value in words
    message = f"--trainer.{argument.name} must be one of {', '.join(words)}, got {given!r}"
    require(is_choice, message)
    return value


def _switched(value: Any) -> Any:
    """YAML 1.1's booleans, `no` and others, as such; any other value as it is."""
    is_word = isinstance(value, str)
    return yaml.SafeLoader.bool_values.get(value.lower(), value) if is_word else value


def check_arguments(config: TrainConfig) -> TrainConfig:
    """`config` with the values of `trainer` in their types. Refuses a `--trainer.NAME` that is
    unknown, has its own flag, is derived, or has a value that Trainer refuses; and a logger that
    transformers does not know, or whose package is not installed."""
    known = {field.name: field for field in fields(TrainingArguments) if field.init}
    flags = {field.name for field in fields(config)}
    for name in config.trainer:
        unknown = f"is no argument of transformers.TrainingArguments.{did_you_mean(name, known)}"
        require(name in known, f"--trainer.{name} {unknown}")
        require(name not in flags, f"--trainer.{name} has a flag of its own: give --{name}")
        for reason, names in REFUSED_ARGUMENTS.items():
            is_refused = any(name == n or (n[-1] == "_" and name.startswith(n)) for n in names)
            require(not is_refused, f"--trainer.{name} {reason}")
    typed = {name: typed_argument(known[name], value) for name, value in config.trainer.items()}
    for name in OF_MAPPED_ROWS if config.data.streaming else ():
        fault = f"--trainer.{name} is for rows that are all there, --streaming has them later"
        require(name not in typed, f"{fault}: leave one of them out")
    for name in ("adam_epsilon", "neftune_noise_alpha"):  # else the first step fails
        is_positive = typed.get(name) is None or typed[name] > 0
        require(is_positive, f"--trainer.{name} must be above 0, got {typed.get(name)}")
    for name, (setting, same) in REPLACING.items():
        given, flag, value = getattr(config, setting), setting.replace("_", "-"), typed.get(name)
        fault = f"--trainer.{name} {value} would replace --{flag} {given}: give one of them"
        require(not given or value in (None, same), fault)
    config = replace(config, trainer=typed)
    check_loggers(config)
    training_arguments(config, fp16=False, on_cpu=not torch.cuda.is_available())
    return config


def check_loggers(config: TrainConfig) -> None:
    """Refuse a logger that is unknown, or whose package is not installed."""
    installed = {*loggers.get_available_reporting_integrations(), "flyte"}  # never listed
    named = [name for name in config.report_to if name not in ("all", "none")]
    if strange := [name for name in named if name not in loggers.INTEGRATION_TO_CALLBACK]:
        names = sorted(loggers.INTEGRATION_TO_CALLBACK)
        wanted = f"--report-to must be among {', '.join(names)}; got {', '.join(strange)}"
        raise UserError(f"{wanted}.{did_you_mean(strange[0], names)}")
    if missing := [name for name in named if name not in installed]:
        needs = f"--report-to {' '.join(missing)} needs a package that is not installed"
        packages = [LOGGER_PACKAGES.get(name, name) for name in missing]
        raise UserError(f"{needs}: pip install {' '.join(packages)}")


# ---- Trainer's arguments


def training_arguments(config: TrainConfig, *, fp16: bool, on_cpu: bool) -> TrainingArguments:
    """transformers' arguments for `config`; `--trainer.NAME` overrides them."""
    eval_strategy = ("steps" if config.eval_steps else "epoch") if config.data.evaluates else "no"
    settings: dict[str, Any] = {name: getattr(config, name) for name in SHARED_ARGUMENTS}
    settings |= {
        "learning_rate": config.learning_rate or 1e-4,  # none yet before the model is known
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "warmup_steps": config.warmup_ratio,  # below 1: a fraction of the steps
        "logging_first_step": True,
        "eval_strategy": eval_strategy,
        "save_strategy": "steps",
        "load_best_model_at_end": config.early_stopping_patience is not None,
        "report_to": list(config.report_to) or "none",
        "fp16": fp16,  # T4 and older: loss scaling, fp32 adapters
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        # group_by_length as in QLoRA: less padding; packs have nearly one length
        "train_sampling_strategy": "random" if config.data.packing else "group_by_length",
        **({"train_sampling_strategy": "sequential"} if config.data.streaming else {}),
        "length_column_name": "length",
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,  # it waits for a GPU; AdapterTrainer's costs nothing
        "label_names": ["labels"],
    }
    if ranks.count() > 1:  # else an older Trainer says that it has no effect
        settings["average_tokens_across_devices"] = True
        name = "train_sampling_strategy"
        fault = f"--trainer.{name} batch_rebalance depends on the number of processes: leave it out"
        require(config.trainer.get(name) != "batch_rebalance", fault)
    settings |= config.trainer
    _require_evaluations(settings, config.data.evaluates, config.early_stopping_patience)
    # `accelerate launch` sets it; here compute_dtype says it
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    with refusals():
        arguments = TrainingArguments(**settings)
        arguments.get_process_log_level()  # Trainer's first use of log_level
    # One GPU even where more are visible: no setting turns off Trainer's DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _require_evaluations(settings: dict[str, Any], evaluates: bool, early: int | None) -> None:
    """Refuse settings that need an evaluation where there is none, or at other steps."""
    evaluated, saved = settings["eval_strategy"], settings["save_strategy"]
    needing = [f"--trainer.{name}" for name in NEED_EVALUATION if settings.get(name)]
    needing += ["--trainer.save_strategy best"] * (saved == "best")
    if not evaluates:
        needing += [f"--trainer.eval_strategy {evaluated}"] * (evaluated != "no")
        require(not needing, f"{', '.join(needing)} needs evaluation data: give --eval-data")
    elif evaluated == "no":
        needing = [name for name in needing if not name.endswith("eval_on_start")]
        require(not needing, f"{', '.join(needing)} needs evaluations: drop eval_strategy no")
    if settings.get("load_best_model_at_end") and saved != "best":
        every = settings["eval_steps"] or settings["logging_steps"]
        agree = evaluated == saved and (saved != "steps" or settings["save_steps"] % every == 0)
        fault = f"needs every checkpoint evaluated; evaluation is by {evaluated}, saving by {saved}"
        fix = "give --eval-steps N, and N or a multiple of it as --save-steps"
        needing = ["--early-stopping-patience"] * bool(early) or needing
        require(agree, f"{needing[0]} {fault}: {fix}")


@contextmanager
def refusals() -> Iterator[None]:
    """Turns transformers' exceptions about settings into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError, ImportError, TypeError, KeyError, OSError) as error:
        raise UserError(f"Trainer refuses these settings: {first_line(error)}") from error
