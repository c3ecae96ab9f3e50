"""A resumed run against its start: which settings may differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora.config import OLD_NAMES, TrainConfig, flat
from qlora.errors import require

# Settings that may differ when a run is resumed; the others shape what was already trained.
MAY_CHANGE = (
    "model", "revision", "trust_remote_code", "data",  # places: their contents are compared
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "max_steps", "num_train_epochs",
    "max_grad_norm", "gradient_checkpointing", "offload_activations", "offload_embedding",
    "sharding", "offload_base", "fast_path", "samples", "report_to", "eval_data", "eval_steps",
    "logging_steps", "save_steps", "save_total_limit", "max_bad_steps", "early_stopping_patience",
    "on_full_disk", "dataset_num_proc",
)  # fmt: skip
MAY_CHANGE_OF_TRAINER = (  # beginnings of --trainer.NAME
    "eval",
    "load_best",
    "log",
    "lr_scheduler_kwargs",
    "save",
    "dataloader_num",
    "dataloader_p",
    "run_name",
    "skip_memory",
    "warmup_steps",
)
# Settings that may differ with --resume-anyway, too: beginnings, from the next step on.
ANYWAY_WITH_OTHER_BATCHES = (  # the rows begin anew
    "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing",
    "streaming", "shuffle_buffer", "rows", "trainer.train_sampling", "trainer.data_seed",
    "trainer.dataloader_drop",
)  # fmt: skip
ANYWAY = ("weight_decay", "lora_dropout", "trainer.adam_", "trainer.neftune")
NOT_COMPARED = (
    "output_dir",
    "resume",
    "resume_anyway",
    "plan",
    "gpu_memory",
    "gpus",
    "json",
    "fit",
    "plan_picture",
    "inspect",
    "inspect_rows",
)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, without: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Name -> [value before, value now] of the entries of both that differ."""
    shared = before.keys() & now.keys() - set(without)
    return {name: [before[name], now[name]] for name in sorted(shared) if before[name] != now[name]}


def changed_settings(
    config: TrainConfig, start: Mapping[str, Any], where: object
) -> dict[str, list[Any]]:
    """The settings that differ from `start`, those that the file `where` has of a run's start.

    Raises:
        UserError: some of them must not differ when the run is resumed.
    """
    before = {OLD_NAMES.get(name, name): value for name, value in start.items()}
    now = flat(config)
    trainer, given = before.pop("trainer", None) or {}, now.pop("trainer")
    for name in {**trainer, **given} if start else ():
        before[f"trainer.{name}"], now[f"trainer.{name}"] = trainer.get(name), given.get(name)
    unset = ("learning_rate",) * (config.learning_rate is None)  # then that of the start
    changed = differences(before, now, without=(*NOT_COMPARED, *unset))
    free = tuple(f"trainer.{name}" for name in MAY_CHANGE_OF_TRAINER)
    if config.resume_anyway:
        free += (*ANYWAY, *ANYWAY_WITH_OTHER_BATCHES)
    refused = {
        name: f"{name} {old}, not {new}"
        for name, (old, new) in changed.items()
        if name not in MAY_CHANGE and not name.startswith(free)
    }
    anyway = () if config.resume_anyway else (*ANYWAY, *ANYWAY_WITH_OTHER_BATCHES)
    hint = all(name.startswith(anyway) for name in refused) * ", --resume-anyway"
    fix = f"give the settings of its start (--config {where} --resume does){hint}"
    fault = f"--resume continues the run of {where}, which has {'; '.join(refused.values())}: {fix}"
    require(not refused, f"{fault}, or a new --output-dir")
    return changed


def with_batches_of(
    config: TrainConfig, recorded: dict[str, Any], ranks: int
) -> tuple[TrainConfig, dict[str, Any]]:
    """`config` and `recorded`, the contents of the run.yaml that it resumes, with the accumulation
    that keeps the rows of a step where the run has another number of ranks now.

    Raises:
        UserError: so many ranks cannot share a step.
    """
    start, before = recorded.get("config", {}), recorded.get("ranks", 1)
    steps, name = start.get("gradient_accumulation_steps"), "gradient_accumulation_steps"
    if before == ranks or not steps:
        return config, recorded
    batches = steps * before
    fault = f"--resume: a step of this run has {batches} micro-batches, {before} processes with "
    fault += f"--gradient-accumulation-steps {steps}: {ranks} processes cannot share them"
    numbers = ", ".join(str(n) for n in range(1, batches + 1) if batches % n == 0)
    require(batches % ranks == 0, f"{fault}: start one of {numbers} processes")
    if config.gradient_accumulation_steps == steps:
        config = replace(config, gradient_accumulation_steps=batches // ranks)
    start = start | {name: batches // ranks}
    print(f"{ranks} processes, not {before}: --gradient-accumulation-steps is {batches // ranks}")
    return config, recorded | {"config": start}


def begins_anew(changed: Iterable[str]) -> bool:
    """Whether a resumed run with these changes has other batches: its rows then begin anew."""
    return any(name.startswith(ANYWAY_WITH_OTHER_BATCHES) for name in changed)
