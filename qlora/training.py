"""`train(config)`: from a config to a trained adapter, with transformers' Trainer.

Trainer does the loop, the optimizers, the schedules, the checkpoints and the loggers. What is ours
is small: it is told, truthfully, that adapters are attached; checkpoints hold the adapter alone;
the loss is summed over supervised tokens and divided once per optimizer step, in training and in
evaluation; and a paged optimizer runs unpaged where there is no GPU to page from.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from qlora import __version__
from qlora.adapter_files import load_adapter_weights, save_adapter
from qlora.adapters import apply_lora, print_trainable_parameters
from qlora.base import load_base
from qlora.checkpoint import resolve
from qlora.config import TrainConfig, flat
from qlora.data import collator, describe, prepare_data, show_example
from qlora.errors import UserError, did_you_mean, first_line
from qlora.lora import lora_layers
from qlora.memory import peak_bytes, show_bytes
from qlora.progress import METRICS, MetricsWriter, PlainProgress
from qlora.report import plot_loss, read_metrics, write_adapter_card

# Arguments of Trainer that follow from ours, so `--trainer.NAME` may not contradict them.
OWN_ARGUMENTS = ("output_dir", "bf16", "fp16", "use_cpu", "remove_unused_columns", "do_train")


def train(config: TrainConfig) -> Path:
    """Fine-tune an adapter as `config` says; returns the folder it was written to.

    Raises:
        UserError: anything the user can mend; nothing was written then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training on several GPUs is not there yet: start one process, on one GPU")
    output = Path(config.output_dir)
    checkpoint = _starting_point(output, resume=config.resume)
    check_trainer_arguments(config.trainer)
    tokenizer = _load_tokenizer(config)
    rows, eval_rows = _load_rows(config, tokenizer)
    model = load_base(
        config.model,
        config.quant,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    apply_lora(model, config.lora, generator=torch.Generator().manual_seed(config.seed))
    print_trainable_parameters(model)
    config = with_learning_rate(config, model)
    prepare_for_training(model, gradient_checkpointing=config.gradient_checkpointing)

    trainer = make_trainer(config, model, tokenizer, rows, eval_rows)
    if checkpoint:
        load_adapter_weights(model, checkpoint)  # Trainer does it again; here it is still a check
    output.mkdir(parents=True, exist_ok=True)
    write_run_file(output / "run.yaml", config, model)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory ran out after {show_bytes(peak_bytes())}: lower --max-length or "
            "--per-device-train-batch-size, keep --gradient-checkpointing, or take a smaller model"
        ) from error
    _finish(trainer, config, len(rows))
    return output


def _load_tokenizer(config: TrainConfig) -> Any:
    folder = resolve(config.model, revision=config.revision)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no tokenizer to be read: {first_line(error)}") from error


def _load_rows(config: TrainConfig, tokenizer: Any) -> tuple[Any, Any]:
    """Training and evaluation rows (or None), described on the terminal with one example."""
    had_template = bool(tokenizer.chat_template)
    prepared = []
    for source in filter(None, (config.data.data, config.data.eval_data)):
        rows, stats = prepare_data(source, tokenizer, max_length=config.data.max_length)
        print(describe(stats, name=source))
        prepared.append(rows)
    if tokenizer.chat_template and not had_template:
        print("The model has no chat template: chats are written as `### User:`, `### Assistant:`,")
        print("and the tokenizer saved with the adapter has this template.")
    print(show_example(prepared[0], tokenizer, colour=sys.stdout.isatty()))
    return prepared[0], prepared[1] if len(prepared) > 1 else None


def _starting_point(output: Path, *, resume: bool) -> str | None:
    """The checkpoint to go on from, or None for a new run in a new folder."""
    if resume:
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        if last is None:
            raise UserError(f"{output} holds no checkpoint-N to resume from: leave out --resume")
        return str(last)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} already holds a run: give a new --output-dir, or --resume to go on with it"
        )
    return None


def check_trainer_arguments(given: Mapping[str, Any]) -> None:
    """Refuse what TrainingArguments does not have, and what this project decides itself."""
    known = {field.name for field in fields(TrainingArguments) if field.init}
    own = {field.name for field in fields(TrainConfig)}
    for name in given:
        if name not in known:
            raise UserError(
                f"--trainer.{name} is no argument of transformers.TrainingArguments."
                f"{did_you_mean(name, known)}"
            )
        if name in own:
            raise UserError(f"--trainer.{name} has a flag of its own: give --{name}")
        if name in OWN_ARGUMENTS:
            raise UserError(f"--trainer.{name} follows from the other settings: leave it out")


# ---- the learning rate ----


def default_learning_rate(model_type: str, hidden_size: int) -> float:
    """5e-5 * 10 * (2000 / hidden_size) ** p, p = 0.0775 for Qwen, 0.781 for Llama and the others.

    The rule that tinker-cookbook publishes with "LoRA Without Regret" (Thinking Machines, 2025):
    LoRA's best rate is 10 times full fine-tuning's and does not depend on the rank, with
    lora_alpha 32 and a constant schedule. Fitted on Llama and Qwen; for other families Llama's
    steeper exponent is the careful choice.
    """
    exponent = 0.0775 if model_type.startswith("qwen") else 0.781
    return float(5e-5 * 10 * (2000 / hidden_size) ** exponent)


def with_learning_rate(config: TrainConfig, model: PreTrainedModel) -> TrainConfig:
    """`config` with its learning rate filled in, and printed with its reason."""
    if config.learning_rate is not None:
        return config
    text = model.config.get_text_config()
    rate = default_learning_rate(text.model_type, text.hidden_size)
    print(
        f"learning rate {rate:.2e}, from the rule of LoRA Without Regret for a {text.model_type} "
        f"model of hidden size {text.hidden_size}; --learning-rate overrides it"
    )
    return replace(config, learning_rate=rate)


# ---- Trainer ----


def prepare_for_training(
    model: PreTrainedModel, gradient_checkpointing: bool = True
) -> PreTrainedModel:
    """Training mode, no key-value cache, and non-re-entrant checkpointing if asked; in place."""
    model.config.use_cache = False
    if gradient_checkpointing:
        settings = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.train()
    return model


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Cross-entropy summed over supervised tokens, over those of the whole optimizer step."""
    logits = outputs["logits"]
    loss: Tensor = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
    )
    return loss


def training_arguments(config: TrainConfig, model: PreTrainedModel) -> TrainingArguments:
    """transformers' arguments for `config`; what `--trainer.NAME` gave comes last and wins."""
    on_cpu = model.device.type == "cpu"
    settings: dict[str, Any] = {
        "output_dir": config.output_dir,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim,
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "eval_strategy": _eval_strategy(config),
        "eval_steps": config.eval_steps,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "report_to": list(config.report_to) or "none",
        "fp16": model.dtype == torch.float16,  # T4 and older: loss scaling, fp32 adapters
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "train_sampling_strategy": "group_by_length",  # as QLoRA: less padding
        "length_column_name": "length",
        "include_num_input_tokens_seen": "non_padding",
        "label_names": ["labels"],
    }
    if on_cpu and "paged" in config.optim:
        print(f"{config.optim} runs unpaged: this machine has no GPU memory to page from")
    try:
        arguments = TrainingArguments(**{**settings, **config.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"Trainer refuses these settings: {error}") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one GPU, also where more are visible
    return arguments


def make_trainer(
    config: TrainConfig, model: PreTrainedModel, tokenizer: Any, rows: Any, eval_rows: Any
) -> "AdapterTrainer":
    """The Trainer for one run, with our own loss, metrics and progress lines."""
    arguments = training_arguments(config, model)
    try:
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
            compute_loss_func=token_loss,
            callbacks=[MetricsWriter(Path(config.output_dir))],
        )
    except (ValueError, RuntimeError, ImportError) as error:  # a logger unknown or not installed
        raise UserError(f"Trainer refuses these settings: {error}") from error
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(PlainProgress())
    return trainer


def _eval_strategy(config: TrainConfig) -> str:
    if not config.data.eval_data:
        return "no"
    return "steps" if config.eval_steps else "epoch"


class AdapterTrainer(Trainer):
    """Trainer for a frozen quantized model with LoRA adapters; saves and resumes the adapter."""

    model: Any
    processing_class: Any
    state: Any

    def __init__(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not lora_layers(model):
            raise UserError("the model has no adapter to train: call apply_lora first")
        # Trainer refuses a quantized model unless it hears that adapters are attached. They are;
        # it is told while it asks and no longer, since elsewhere the mark means PEFT's own.
        model._hf_peft_config_loaded = True
        try:
            super().__init__(model=model, **kwargs)
        finally:
            del model._hf_peft_config_loaded

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = str(output_dir or self.args.output_dir)
        save_adapter(self.model, folder)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter_weights(self.model, self.state.best_model_checkpoint)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.use_cpu and "is_paged" in kwargs:
            kwargs["is_paged"] = False
        return optimizer, kwargs

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss over all supervised tokens of the set; Trainer's own averages means of batches."""
        model = self.model.eval()
        total, tokens, rows = 0.0, 0, 0
        one = torch.tensor(1, device=self.args.device)  # divide by nothing: sums are added up
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            labels = batch["labels"]
            with torch.no_grad(), self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, dict(batch), num_items_in_batch=one)
            total += float(loss)
            tokens += int((labels[:, 1:] != -100).sum())
            rows += len(labels)
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        metrics = {f"{metric_key_prefix}_loss": total / max(tokens, 1)}
        nothing: Any = None
        return EvalLoopOutput(nothing, nothing, metrics, num_samples=rows)


# ---- what a run leaves behind ----


def write_run_file(path: Path, config: TrainConfig, model: PreTrainedModel) -> None:
    """The full config, the versions and the base's fingerprint; `--config run.yaml` reads it."""
    packages = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages}
    qlora_base: Any = model.qlora_base
    record = {
        "config": flat(config),
        "versions": {"qlora": __version__, "python": platform.python_version(), **versions},
        "base": {"resolved": str(model.config._name_or_path), **qlora_base},
    }
    path.write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")


def _finish(trainer: AdapterTrainer, config: TrainConfig, rows: int) -> None:
    """Write the adapter and what goes with it, and say what to do next."""
    output = Path(config.output_dir)
    trainer.save_model(str(output))
    metrics = read_metrics(output / METRICS)
    plot_loss(metrics, output / "loss.png")
    losses = [row["loss"] for row in metrics if "loss" in row]
    evals = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    targets = config.lora.target_modules
    write_adapter_card(
        output,
        {
            "base_model": trainer.model.config._name_or_path,
            "data": config.data.data,
            "rows": rows,
            "steps": trainer.state.global_step,
            "learning_rate": config.learning_rate,
            "loss": losses[-1],
            "eval_loss": evals[-1] if evals else None,
            "r": config.lora.r,
            "lora_alpha": config.lora.lora_alpha,
            "target_modules": targets if isinstance(targets, str) else ", ".join(targets),
            **trainer.model.qlora_base,
        },
    )
    print(f"\nThe adapter is in {output}; its loss curve is {output / 'loss.png'}.")
    print(f"Merge it:  python merge_dequant.py --adapter {output} --output-dir {output}-merged")


__all__ = ["AdapterTrainer", "default_learning_rate", "prepare_for_training", "token_loss", "train"]
