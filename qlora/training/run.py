"""`train(config)`: from a config to a trained adapter, with transformers' Trainer.

Trainer does the loop, the optimizers, the schedules, the checkpoints and the loggers
(qlora.training.trainer says what differs). Here is what comes before it, data, base, adapter and
learning rate, and what a run leaves behind.
"""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import PreTrainedModel, TrainerState

from qlora import __version__
from qlora.adapters.apply import apply_lora, print_trainable_parameters
from qlora.adapters.files import load_adapter_weights
from qlora.adapters.format import read_adapter
from qlora.adapters.wrappers import take_wrappers_off
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_base, load_tokenizer, share_pad
from qlora.base.modules import state_of
from qlora.config import LoraConfig, TrainConfig, flat
from qlora.config.tasks import task_named
from qlora.data.rows import (
    PackedRows,
    describe,
    length_batches,
    prepare_data,
    prepare_tokenizer,
    show_example,
)
from qlora.errors import UserError
from qlora.fast.head import LanguageHead, put_language_head
from qlora.fast.layers import RMSNorm, put_norms, take_fast_path_off, use_fast_path
from qlora.fast.offload import offload_embedding, require_gpu
from qlora.files import RUN, read_metrics, read_samples, require_new
from qlora.pictures import plot_loss
from qlora.training.outputs import ask, questions, write_adapter_card
from qlora.training.progress import EVALUATED, device, peak_bytes, show_bytes
from qlora.training.trainer import (
    AdapterTrainer,
    check_loggers,
    check_trainer_arguments,
    make_trainer,
)

EVA_TOKENS = 1 << 13  # many for each direction that a layer may get


def train(config: TrainConfig) -> Path:
    """Fine-tune an adapter as `config` says; returns the folder it was written to.

    Raises:
        UserError: anything the user can mend. Nothing was written then, unless training had begun.
    """
    try:
        return _train(config)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory ran out after {show_bytes(peak_bytes())}: lower --max-length or "
            "--per-device-train-batch-size, keep --gradient-checkpointing, or take a smaller model"
        ) from error


def _train(config: TrainConfig) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training on several GPUs is not there yet: start one process, on one GPU")
    output = Path(config.output_dir).expanduser()
    config = replace(config, output_dir=str(output))
    checkpoint = _starting_point(output, resume=config.resume)
    check_trainer_arguments(config.trainer)
    check_loggers(config.report_to)
    _require_gpu_for_offloading(config)
    base = Checkpoint.open(config.model, revision=config.revision)
    tokenizer = load_tokenizer(base, task=config.task, trust_remote_code=config.trust_remote_code)
    max_length = _max_length(config, base)
    data = _load_rows(config, base, tokenizer, max_length)
    rows = data.rows
    # what is trained in full starts from the original weights
    skipped = (*config.quant.skip_modules, *config.lora.modules_to_save)
    model = load_base(
        base,
        replace(config.quant, skip_modules=skipped),
        task=config.task,
        labels=data.labels,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )
    _add_adapter(model, config, tokenizer, rows, checkpoint)
    if config.offload_embedding:
        offload_embedding(model)
    print_trainable_parameters(model)
    config = with_learning_rate(config, model)
    prepare_for_training(
        model,
        gradient_checkpointing=config.gradient_checkpointing,
        fast_path=config.fast_path,
    )

    packs = PackedRows(rows, max_length) if config.data.packing else rows
    if config.data.packing:
        print(packs.describe())
    trainer = make_trainer(config, model, tokenizer, packs, data.eval_rows)
    share_pad(model, tokenizer.pad_token_id)
    if checkpoint:
        load_adapter_weights(model, checkpoint)  # Trainer does it again; here it is still a check
    output.mkdir(parents=True, exist_ok=True)
    write_run_file(output / RUN, config, model, data.counts)
    samples = questions(config, data.rows, data.eval_rows, max_length)
    if samples and not checkpoint:
        ask(output, "before", samples, model, tokenizer)
    if checkpoint and _is_complete(trainer, checkpoint):  # Trainer would do one step too many
        print(f"All {trainer.state.global_step} steps were done; --max-steps N goes on from there.")
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output))  # before anything else may fail
    if samples:
        ask(output, "after", samples, model, tokenizer)
    _finish(trainer, config, len(rows))
    return output


def _require_gpu_for_offloading(config: TrainConfig) -> None:
    for name in ("offload_activations", "offload_embedding"):
        if getattr(config, name):
            require_gpu(f"--{name.replace('_', '-')}")


def _max_length(config: TrainConfig, base: Checkpoint) -> int:
    """The length to cut rows at: the model may take less than asked."""
    asked = config.data.max_length
    max_length = min(asked, base.max_positions or asked)
    if max_length < asked:
        print(f"rows are cut at {max_length:,} tokens, the longest the model takes, not {asked:,}")
    return max_length


class _Data(NamedTuple):
    """What is trained on."""

    rows: Any
    eval_rows: Any
    """or None"""
    labels: tuple[str, ...]
    """of a classifier"""
    counts: dict[str, Any]
    """of both, for people"""


def _load_rows(config: TrainConfig, base: Checkpoint, tokenizer: Any, max_length: int) -> _Data:
    """Training and evaluation rows, described on the terminal with one example."""
    labels = _own_labels(config, base)
    prepared: list[Any] = []
    chats = False
    counts: dict[str, Any] = {}
    for source in filter(None, (config.data.data, config.data.eval_data)):
        rows, stats = prepare_data(
            source,
            tokenizer,
            max_length=max_length,
            task=config.task,
            labels=labels,
            new_labels=not prepared,
        )
        print(describe(stats, name=source))
        chats |= stats.chats
        numbers = {k: n for k, n in asdict(stats).items() if k not in ("labels", "chats")}
        counts["evaluation" if prepared else "training"] = {"source": source, **numbers}
        prepared.append(rows)
        labels = stats.labels
    if "chat_template" in prepare_tokenizer(tokenizer, chats=chats):
        print("The model has no chat template: chats are written as `### User:`, `### Assistant:`,")
        print("and the tokenizer saved with the adapter has this template.")
    shown = show_example(
        prepared[0], tokenizer, colour=sys.stdout.isatty(), task=config.task, labels=labels
    )
    print(shown)
    return _Data(prepared[0], prepared[1] if len(prepared) > 1 else None, labels, counts)


def _own_labels(config: TrainConfig, base: Checkpoint) -> tuple[str, ...]:
    """The labels that a checkpoint of a trained classifier has already."""
    task, classes = task_named(config.task), base.config.get("architectures") or ()
    is_trained = task.trains_head and any(name.endswith(task.class_ending) for name in classes)
    return base.labels if is_trained else ()


def _starting_point(output: Path, *, resume: bool) -> str | None:
    """The checkpoint to go on from, or None for a new run in a new folder."""
    # Trainer writes trainer_state.json last: without it a checkpoint was cut short.
    whole = {
        int(p.parent.name[11:]): p.parent for p in output.glob("checkpoint-*/trainer_state.json")
    }
    if resume and whole:
        # what goes on in these files later: a damaged one is said now
        read_metrics(output)
        read_samples(output)
        return str(whole[max(whole)])
    if resume:
        raise UserError(
            f"{output} holds no checkpoint-N to resume from: start again without --resume"
        )
    if (output / RUN).exists():
        go_on = (
            "--resume to go on with it"
            if whole
            else "remove it: it has no checkpoint to go on from"
        )
        raise UserError(f"{output} already holds a run: give a new --output-dir, or {go_on}")
    require_new(output)
    return None


# ---- the adapter ----


def _add_adapter(
    model: PreTrainedModel, config: TrainConfig, tokenizer: Any, rows: Any, checkpoint: str | None
) -> None:
    """The adapter that `config` asks for; on a run that goes on, one for its checkpoint to fill."""
    lora, data = config.lora, None
    if checkpoint:
        lora = _as_saved(lora, checkpoint)
    elif lora.init_lora_weights == "eva":
        every = max(1, sum(map(len, rows["input_ids"])) // EVA_TOKENS)
        some = (rows[i] for i in range(0, len(rows), every))
        data = length_batches(some, tokenizer, task=config.task, model=model)
    generator = torch.Generator().manual_seed(config.seed)
    apply_lora(model, lora, generator=generator, data=data)


def _as_saved(lora: LoraConfig, checkpoint: str) -> LoraConfig:
    """`lora` without a start of its own, and with the ranks that EVA gave the layers."""
    plain = replace(lora, init_lora_weights=True, loftq_config={}, eva_config={})
    if lora.init_lora_weights != "eva":
        return plain
    saved = read_adapter(checkpoint)
    return replace(
        plain,
        target_modules=tuple(saved.pairs),
        rank_pattern=saved.config.rank_pattern,
        alpha_pattern=saved.config.alpha_pattern,
    )


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


def _is_complete(trainer: AdapterTrainer, checkpoint: str) -> bool:
    """Whether `checkpoint` has all of the steps asked for; the trainer then knows how it went."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if not 0 < trainer.args.max_steps <= state.global_step:
        return False
    trainer.state = state
    return True


# ---- the model ----


def prepare_for_training(
    model: PreTrainedModel, gradient_checkpointing: bool = True, *, fast_path: bool = True
) -> PreTrainedModel:
    """Make `model`, with its adapters on, ready for a training loop, in place.

    Training mode, no key-value cache, non-re-entrant checkpointing if asked; and, unless
    `fast_path` is off, layers and norms that keep less for the backward pass (qlora.fast.layers,
    qlora.fast.layers) and a loss without logits (qlora.fast.head): the same numbers. Generation and
    everything else go on as before. Called again, it goes by what it is told last.
    """
    model.config.use_cache = False
    if fast_path:
        put_language_head(model)
        put_norms(model)
    else:
        take_fast_path_off(model)
        take_wrappers_off(model, lambda wrapper: isinstance(wrapper, LanguageHead | RMSNorm))
    _set_checkpointing(model, gradient_checkpointing)
    model.train()
    if fast_path:
        use_fast_path(model, recompute=gradient_checkpointing)
    return model


def _set_checkpointing(model: PreTrainedModel, on: bool) -> None:
    # its name since transformers 5.2x
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        settings = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{kind}_checkpointing_enable")(**settings)
    elif getattr(model, f"is_{kind}_checkpointing"):
        getattr(model, f"{kind}_checkpointing_disable")()


# ---- what a run leaves behind ----


def write_run_file(
    path: Path, config: TrainConfig, model: PreTrainedModel, data: Mapping[str, Any]
) -> None:
    """The full config, the versions, the base's fingerprint, the counts of the data and the device;
    `--config run.yaml` reads it."""
    packages = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {
        "config": flat(replace(config, resume=False)),
        "versions": {"qlora": __version__, "python": platform.python_version(), **versions},
        "base": {"resolved": str(model.config._name_or_path), **state_of(model).record()},
        "data": data,
        "device": dict(zip(("name", "memory_bytes"), device(), strict=True)),
    }
    path.write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")


def _finish(trainer: AdapterTrainer, config: TrainConfig, rows: int) -> None:
    """Write what goes with the adapter, and say what to do next."""
    output = Path(config.output_dir)
    metrics = read_metrics(output)
    base = state_of(trainer.model).record()
    per = "label" if "labels" in base else "supervised token"
    plot_loss(metrics, output / "loss.png", per=per, total_bytes=device()[1])
    losses = [row["loss"] for row in metrics if "loss" in row]
    evals = [row for row in metrics if "eval_loss" in row]
    targets = config.lora.target_modules
    write_adapter_card(
        output,
        {
            "base_model": trainer.model.config._name_or_path,
            "data": config.data.data,
            "rows": rows,
            "steps": trainer.state.global_step,
            "learning_rate": config.learning_rate,
            "loss": losses[-1] if losses else None,
            **{name: evals[-1].get(name) if evals else None for name in EVALUATED},
            "r": config.lora.r,
            "lora_alpha": config.lora.lora_alpha,
            "target_modules": targets if isinstance(targets, str) else ", ".join(targets),
            **base,
        },
    )
    print(f"\nThe adapter is in {output}; its loss curve is {output / 'loss.png'}.")
    name, merged = shlex.quote(str(output)), shlex.quote(f"{output}-merged")
    print(f"See how it went:  python -m qlora.report {name}")
    if config.task == "causal-lm":
        print(f"Talk to it:       python -m qlora.chat --adapter {name} --compare")
    print(f"Merge it:         python merge_dequant.py --adapter {name} --output-dir {merged}")
