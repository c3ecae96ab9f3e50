"""`train(config)`: a config becomes a trained adapter, with transformers' Trainer.

    checks -> checkpoint -> tokenizer -> rows -> 4-bit base -> adapter -> fast path -> Trainer

Nothing is written before Trainer is built. Trainer has the loop, optimizers, schedules, checkpoints
and loggers (qlora.training.trainer); qlora.training.outputs writes the other files.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from enum import Enum
from pathlib import Path
from types import MethodType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import integration_utils as loggers

from qlora.adapters.apply import active_adapters, apply_lora, print_trainable_parameters
from qlora.adapters.files import save_adapter
from qlora.adapters.format import read_adapter
from qlora.adapters.live import require_task
from qlora.adapters.wrappers import remove_wrappers
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_base, load_tokenizer, share_pad
from qlora.base.modules import state_of
from qlora.config import TrainConfig, changed_settings, differences, flat
from qlora.config.tasks import task_named
from qlora.data import mixing
from qlora.data import rows as data_rows
from qlora.data.batches import PackedRows, length_batches
from qlora.data.chats import Reading
from qlora.data.generation import describe_stops, taught_stop_ids
from qlora.data.inspection import show_example
from qlora.data.records import Chosen
from qlora.data.templates import apply_settings
from qlora.errors import UserError, did_you_mean, require
from qlora.fast import layers
from qlora.fast.head import LanguageHead, put_language_head
from qlora.fast.offload import offload_embedding, require_gpu
from qlora.files import RUN, ids_in, read_metrics, read_samples, require_new
from qlora.training.callbacks import FreeCores
from qlora.training.outputs import (
    checkpoint_to_resume,
    choose_samples,
    complete_checkpoints,
    is_left_over,
    read_run,
    remove_leftovers,
    write_answers,
    write_results,
    write_run_file,
    writing_to,
)
from qlora.training.trainer import AdapterTrainer, make_trainer, training_arguments

# TrainingArguments that `--trainer.NAME` refuses, and why: names, or beginnings that end in `_`.
REFUSED_ARGUMENTS = {
    "follows from the other settings: leave it out": (
        "activation_checkpointing", "activation_checkpointing_kwargs", "bf16", "bf16_full_eval",
        "do_eval", "do_predict", "do_train", "fp16", "fp16_full_eval",
        "gradient_checkpointing_kwargs", "include_num_input_tokens_seen", "label_names",
        "label_smoothing_factor", "length_column_name", "remove_unused_columns", "use_cache",
        "use_cpu",
    ),
    "is not supported, training runs on one GPU: leave it out": (
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
    "is not supported: --resume continues from the last checkpoint": ("resume_from_checkpoint",),
}  # fmt: skip
WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a word",
          dict: "{NAME: VALUE}", list: "a list"}  # fmt: skip
# Logger -> package to install; the others have one name for both.
LOGGER_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}
EVA_TOKENS = 1 << 13  # tokens that EVA reads: many more than the directions of a layer


class PreparedData(NamedTuple):
    """Tokenized rows to train on and to evaluate."""

    rows: Any
    eval_rows: Any  # None without evaluation data
    classes: tuple[str, ...]  # a classifier's class names, by number
    chats: bool  # whether records were rendered with a chat template
    max_length: int  # rows were cut at this many tokens
    counts: dict[str, Any]  # "training", "evaluation" -> source, rows, tokens, ...


def train(config: TrainConfig) -> Path:
    """Train the adapter that `config` describes; returns the folder with its files.

    Raises UserError if settings, data, model or machine do not work together. Unless training has
    begun, nothing was written then.
    """
    output = Path(config.output_dir).expanduser()
    config = replace(config, output_dir=str(output))
    resume_from = check_settings(config, output)
    config = check_arguments(config)
    recorded = read_run(output) if resume_from else {}
    changed = changed_settings(config, recorded.get("config", {}), output / RUN)
    if resume_from and config.learning_rate is None:
        config = replace(config, learning_rate=recorded.get("config", {}).get("learning_rate"))

    checkpoint = Checkpoint.open(config.model, revision=config.revision)
    task, trusted = config.task, config.trust_remote_code
    require_task(checkpoint, task)
    tokenizer = load_tokenizer(checkpoint, task=task, trust_remote_code=trusted)
    apply_settings(tokenizer, config.data)
    data = prepare_rows(config, checkpoint, tokenizer)
    require_same_rows(config, data.counts, recorded)
    thinks = data.counts["training"]["thinks"] > 0
    if "chat_template" in data_rows.prepare_tokenizer(tokenizer, chats=data.chats, thinks=thinks):
        print("The model has no chat template: chats are written as `### User:`, `### Assistant:`,")
        print("and the tokenizer saved with the adapter has this template.")
    colour = sys.stdout.isatty()
    shown: Any = {"classes": data.classes, "special": data.counts["training"]["special"]}
    print(show_example(data.rows, tokenizer, colour=colour, task=task, **shown))
    rows: Any = data.rows
    if config.data.packing:
        rows = PackedRows(rows, data.max_length)
        print(rows.describe())

    model = load_model(config, checkpoint, tokenizer, data, resume_from)
    rate = config.learning_rate or rate_from_rule(model)
    config = replace(config, learning_rate=rate, resume=False)
    prepare_for_training(model, config.gradient_checkpointing, fast_path=config.fast_path)
    trainer = make_trainer(config, model, tokenizer, rows, data.eval_rows)
    trainer.add_callback(FreeCores())
    if resume_from:
        trainer.check_checkpoint(resume_from)

    with writing_to(output):
        run_and_write(config, trainer, data, resume_from, recorded, changed)
    return output


def run_and_write(
    config: TrainConfig,
    trainer: AdapterTrainer,
    data: PreparedData,
    resume_from: str | None,
    recorded: dict[str, Any],
    changed: dict[str, list[Any]],
) -> None:
    """Train, and write every file of the run; `recorded` is run.yaml of its start, `changed` the
    settings that differ from it."""
    output, model, tokenizer = Path(config.output_dir), trainer.model, trainer.processing_class
    settings = flat(config)
    base = {"resolved": str(model.config._name_or_path), **state_of(model).record()}
    if resume_from and trainer.is_done(resume_from):
        settings = recorded.get("config", settings)  # with which it was trained
    elif resume_from:
        changed |= differences(recorded.get("base", {}), base, without=("resolved", "revision"))
        resumed = resumed_at(resume_from, changed, recorded)
        write_run_file(output, settings, base, data.counts, resumed)
    else:
        remove_leftovers(output)
        write_run_file(output, settings, base, data.counts)
    parts = (data.rows, data.eval_rows, data.max_length)
    samples = choose_samples(config.task, config.samples, *parts)
    if samples and not resume_from:
        write_answers(output, "before", samples, model, tokenizer)
    trainer.fit(resume_from)
    trainer.save_model(str(output))  # before the answers, which may fail or be interrupted
    if samples:
        write_answers(output, "after", samples, model, tokenizer)
    steps = (trainer.adapter_step, trainer.state.global_step)
    write_results(output, settings, base, rows=len(data.rows), steps=steps)


# ---- checks, before anything is loaded ----


def check_settings(config: TrainConfig, output: Path) -> str | None:
    """Refuse settings that cannot be trained with, and an `output` that cannot be written to.
    Returns the checkpoint to resume from; None for a new run."""
    require_one_process()
    checkpoint = checkpoint_to_resume(output) if config.resume else None
    if checkpoint:
        read_metrics(output)  # these two are read again in the run: a damaged file raises now
        read_samples(output)
    elif not is_left_over(output):
        dead = "remove it: it has no checkpoint to resume from"
        is_dead = not complete_checkpoints(output)
        fix = f"give a new --output-dir, or {dead if is_dead else '--resume to continue it'}"
        require(not (output / RUN).exists(), f"{output} already holds a run: {fix}")
        require_new(output)
    for name in ("offload_activations", "offload_embedding"):
        if getattr(config, name):
            require_gpu(f"--{name.replace('_', '-')}")
    return str(checkpoint) if checkpoint else None


def require_one_process() -> None:
    """Refuse a process of several, and the variables that libraries read as numbers if they are
    none."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "1")
        wanted = f"the environment variable {name} must be a whole number, got {value!r}: unset it"
        require(bool(re.fullmatch(r"\s*-?\d+\s*", value)), wanted)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several GPUs are not supported yet: start one process on one GPU")


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
    for name in ("adam_epsilon", "neftune_noise_alpha"):  # else the first step fails
        is_positive = typed.get(name) is None or typed[name] > 0
        require(is_positive, f"--trainer.{name} must be above 0, got {typed.get(name)}")
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


# ---- a resumed run against its start


def require_same_rows(config: TrainConfig, counts: Any, recorded: Mapping[str, Any]) -> None:
    """Refuse to resume on training rows other than those of run.yaml."""
    before = recorded.get("data", {}).get("training", {})
    names = ("fingerprint", "rows", "tokens", "supervised_tokens")
    now = {name: counts["training"][name] for name in names}
    if differ := differences(before, now):
        shown = ", ".join(f"{name} {old}, not {new}" for name, (old, new) in differ.items())
        raise UserError(
            f"--resume: {config.data.name} has other rows than the run's start had ({shown}): give "
            "the same data, or a new --output-dir"
        )


def resumed_at(
    checkpoint: str, changed: dict[str, list[Any]], recorded: Mapping[str, Any]
) -> list[Any]:
    """run.yaml's list of changes at each resuming, with those of this one, which are printed."""
    step = int(Path(checkpoint).name.removeprefix("checkpoint-"))
    if changed:
        shown = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        print(f"--resume, from step {step} on: {shown}")
    return [*recorded.get("resumed", []), *[{"step": step, "changed": changed}] * bool(changed)]


def prepare_rows(config: TrainConfig, checkpoint: Checkpoint, tokenizer: Any) -> PreparedData:
    """Tokenize training and evaluation data; prints the counts of each."""
    asked, longest = config.data.max_length, checkpoint.max_positions
    max_length = min(asked, longest or asked)
    if max_length < asked:
        print(f"rows are cut at {max_length:,} tokens, the longest the model takes, not {asked:,}")
    task, models = task_named(config.task), checkpoint.config.get("architectures") or ()
    is_classifier = task.trains_head and any(name.endswith(task.class_ending) for name in models)
    classes = checkpoint.labels if is_classifier else ()  # kept where the data has no others
    same: Any = {"max_length": max_length, "vocabulary": checkpoint.vocab_size, "task": task.name}
    same |= {"reading": Reading.of(config.data), "long_rows": config.data.long_rows}
    same["num_proc"] = config.data.dataset_num_proc
    training, held_out = mixing.prepare_training(
        config.data, tokenizer, seed=config.seed, classes=classes, **same
    )
    parts = {"training": (config.data.name, *training)}
    if held_out:
        parts["evaluation"] = (config.data.name, *held_out)
    elif source := config.data.eval_data:
        known: Any = {"classes": training[1].classes, "new_classes": False, "split": "evaluation"}
        if source in config.data.sources and config.data.data_config:
            known["chosen"] = Chosen(config.data.data_config)
        parts["evaluation"] = source, *data_rows.prepare_data(source, tokenizer, **same, **known)
    counts = {}
    for part, (name, rows, stats) in parts.items():
        print(data_rows.describe(stats, name=name))
        hashed = data_rows.fingerprint(rows)
        counts[part] = {"source": name, **stats.counts(), "fingerprint": hashed}
    eval_rows = parts["evaluation"][1] if "evaluation" in parts else None
    *_, stats = parts["evaluation" if "evaluation" in parts else "training"]
    classes, chats = stats.classes, any(stats.chats for *_, stats in parts.values())
    return PreparedData(training[0], eval_rows, classes, chats, max_length, counts)


def load_model(
    config: TrainConfig,
    checkpoint: Checkpoint,
    tokenizer: Any,
    data: PreparedData,
    resume_from: str | None,
) -> PreTrainedModel:
    """The frozen 4-bit base with the untrained adapter of `config`."""
    lora, eva_batches = config.lora, None
    # Modules that are trained in full are not quantized: they start from the original weights.
    skip_modules = (*config.quant.skip_modules, *lora.modules_to_save)
    model = load_base(
        checkpoint,
        replace(config.quant, skip_modules=skip_modules),
        task=config.task,
        labels=data.classes,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )
    share_pad(model, tokenizer.pad_token_id)
    if resume_from:  # the checkpoint's values follow: no initialisation, but EVA's ranks
        lora = replace(lora, init_lora_weights=True, loftq_config={}, eva_config={})
        if config.lora.init_lora_weights == "eva":
            saved = read_adapter(resume_from)
            ranks: Any = {n: getattr(saved.config, n) for n in ("rank_pattern", "alpha_pattern")}
            lora = replace(lora, target_modules=tuple(saved.pairs), **ranks)
    elif lora.init_lora_weights == "eva":
        every = max(1, data.counts["training"]["tokens"] // EVA_TOKENS)
        spaced = (data.rows[i] for i in range(0, len(data.rows), every))
        eva_batches = length_batches(spaced, tokenizer, task=config.task, model=model)
    generator = torch.Generator().manual_seed(config.seed)
    apply_lora(model, lora, generator=generator, data=eva_batches)
    if config.offload_embedding:
        offload_embedding(model)
    print_trainable_parameters(model)
    if model.can_generate():
        known = ids_in(model.generation_config.eos_token_id)
        if stops := describe_stops(tokenizer, known, taught_stop_ids(tokenizer)):
            print(stops)
    return model


def default_learning_rate(model_type: str, hidden_size: int) -> float:
    """5e-5 * 10 * (2000 / hidden_size) ** p, p = 0.0775 for Qwen, 0.781 for Llama and the others.

    tinker-cookbook's rule for "LoRA Without Regret" (Thinking Machines, 2025), fitted on Llama and
    Qwen: with lora_alpha 32 and a constant schedule, LoRA's best rate is 10 times that of full
    fine-tuning at every rank.
    """
    exponent = 0.0775 if model_type.startswith("qwen") else 0.781
    return float(5e-5 * 10 * (2000 / hidden_size) ** exponent)


def rate_from_rule(model: PreTrainedModel) -> float:
    """`default_learning_rate` of `model`, printed with its reason."""
    text = model.config.get_text_config()
    rate = default_learning_rate(text.model_type, text.hidden_size)
    print(
        f"learning rate {rate:.2e}, from the rule of LoRA Without Regret for a {text.model_type} "
        f"model of hidden size {text.hidden_size}; --learning-rate overrides it"
    )
    return rate


def prepare_for_training(
    model: PreTrainedModel, gradient_checkpointing: bool = True, *, fast_path: bool = True
) -> PreTrainedModel:
    """Prepare a model with adapters for a training loop, in place.

    Sets training mode, no key-value cache and, if asked, non-reentrant gradient checkpointing.
    `fast_path`: layers, norms (qlora.fast.layers) and a loss (qlora.fast.head) that compute the
    same numbers in less memory. Generation works as before. A later call overrides an earlier one.

    transformers' Trainer and TRL's SFTTrainer then accept the model: `model.save_pretrained`, which
    they call, writes the active adapter as long as the model has one.

    Raises UserError if the family has no gradient checkpointing.
    """
    supported = not gradient_checkpointing or model.supports_gradient_checkpointing
    family = type(model).__name__
    require(supported, f"{family} has no gradient checkpointing: use --no-gradient-checkpointing")
    model._hf_peft_config_loaded = False  # with it, checkpointing computes gradients of embeddings
    model.config.use_cache = False
    if fast_path:
        put_language_head(model)
        layers.put_norms(model)
    else:
        layers.remove_fast_path(model)
        remove_wrappers(model, lambda wrapper: isinstance(wrapper, LanguageHead | layers.RMSNorm))
    # "activation" since transformers 5.2x
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if gradient_checkpointing:
        settings = {"use_reentrant": False, "preserve_rng_state": layers.draws_numbers(model)}
        getattr(model, f"{kind}_checkpointing_enable")(settings)
    elif getattr(model, f"is_{kind}_checkpointing"):
        getattr(model, f"{kind}_checkpointing_disable")()
    model.train()
    if fast_path:
        layers.use_fast_path(model, recompute=gradient_checkpointing)
    model._hf_peft_config_loaded = True  # PEFT's mark: Trainer refuses a 4-bit model without it
    model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[method-assign]
    return model


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """The adapter of `model` in PEFT's format; transformers' method once it has none."""
    if active := active_adapters(model):
        for name in active:
            save_adapter(model, save_directory, adapter_name=name)
        return
    model._hf_peft_config_loaded = False
    type(model).save_pretrained(model, save_directory, **options)
