"""`train(config)`: a config becomes a trained adapter, with transformers' Trainer.

    checks -> checkpoint -> tokenizer -> rows -> 4-bit base -> adapter -> fast path -> Trainer
    -> dry step -> training

Nothing is written before Trainer is built. Trainer has the loop, optimizers, schedules, checkpoints
and loggers (qlora.training.trainer); qlora.training.checks refuses settings, and
qlora.training.outputs writes the other files.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from qlora.adapters.apply import apply_lora, print_trainable_parameters
from qlora.adapters.format import read_adapter
from qlora.adapters.live import require_task
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_base, load_tokenizer, share_pad
from qlora.base.modules import state_of
from qlora.base.sharding import is_sharded, keeping_shards, shard_base
from qlora.config import TrainConfig, flat
from qlora.config.resume import begins_anew, changed_settings, differences, with_batches_of
from qlora.config.tasks import task_named
from qlora.data import mixing
from qlora.data import rows as data_rows
from qlora.data.batches import PackedRows, length_batches
from qlora.data.chats import Reading
from qlora.data.generation import describe_stops, taught_stop_ids
from qlora.data.inspection import show_example
from qlora.data.records import Chosen
from qlora.data.streaming import StreamedRows
from qlora.data.templates import apply_settings
from qlora.errors import UserError, require
from qlora.fast.offload import offload_embedding
from qlora.files import RUN, SAMPLES, ids_in
from qlora.training import ranks
from qlora.training.callbacks import FreeCores, ReturnMemory, return_freed_memory
from qlora.training.checkpoints import read_stream, set_aside, state_at
from qlora.training.checks import check_arguments, check_settings
from qlora.training.dry_step import before_training
from qlora.training.memory import free_unused, is_out_of_memory, out_of_memory_in
from qlora.training.outputs import (
    MetricsWriter,
    no_empty_folder,
    read_run,
    remove_leftovers,
    require_no_other_run,
    write_results,
    write_run_file,
    writing_to,
)
from qlora.training.prepare import prepare_for_training
from qlora.training.samples import choose_samples, write_answers
from qlora.training.start import put_saved_adapter, with_settings_of_adapter
from qlora.training.trainer import AdapterTrainer, make_trainer

EVA_TOKENS = 1 << 13  # tokens that EVA reads: many more than the directions of a layer


class PreparedData(NamedTuple):
    """Tokenized rows to train on and to evaluate."""

    rows: Any  # of a stream, those of its first window
    eval_rows: Any  # None without evaluation data
    classes: tuple[str, ...]  # a classifier's class names, by number
    chats: bool  # whether records were rendered with a chat template
    max_length: int  # rows were cut at this many tokens
    counts: dict[str, Any]  # "training", "evaluation" -> source, rows, tokens, ...
    stream: StreamedRows | None = None


def train(config: TrainConfig, *, planned_bytes: int | None = None) -> Path:
    """Train the adapter that `config` describes; returns the folder with its files.

    `planned_bytes`: the peak memory of a plan, which is logged beside the measured one.

    Raises UserError if settings, data, model or machine do not work together, or memory runs out.
    Unless training has begun, nothing was written then.
    """
    if not torch.cuda.is_available():
        return_freed_memory()
    output = Path(config.output_dir).expanduser()
    config = replace(config, output_dir=str(output))
    with ranks.joined(flat(config)):
        _train(config, output, planned_bytes)
    return output


def _train(config: TrainConfig, output: Path, planned_bytes: int | None) -> None:
    if ranks.is_restarted() and (output / RUN).exists():
        config = replace(config, resume=True)
    resume_from = check_settings(config, output)
    ranks.require_same("checkpoints", {"last": resume_from})
    config = check_arguments(config)
    recorded = read_run(output) if resume_from else {}
    config, recorded = with_batches_of(config, recorded, ranks.count())
    config = with_settings_of_adapter(config, recorded.get("config", {}))
    changed = changed_settings(config, recorded.get("config", {}), output / RUN)
    if resume_from and config.learning_rate is None:
        config = replace(config, learning_rate=recorded.get("config", {}).get("learning_rate"))

    with ranks.one_before_others():
        checkpoint = Checkpoint.open(config.model, revision=config.revision)
        task, trusted = config.task, config.trust_remote_code
        require_task(checkpoint, task)
        tokenizer = load_tokenizer(checkpoint, task=task, trust_remote_code=trusted)
        apply_settings(tokenizer, config.data)
        data = prepare_rows(config, checkpoint, tokenizer)
    ranks.require_same("rows", data.counts["training"])
    with closing(data.stream) if data.stream else nullcontext():
        changed |= changed_rows(config, data.counts, recorded)
        if data.stream and resume_from:
            changed |= go_on(config, data.stream, resume_from, changed, recorded)
        load_and_train(
            config, checkpoint, tokenizer, data, resume_from, recorded, changed, planned_bytes
        )


def load_and_train(
    config: TrainConfig,
    checkpoint: Checkpoint,
    tokenizer: Any,
    data: PreparedData,
    resume_from: str | None,
    recorded: dict[str, Any],
    changed: dict[str, list[Any]],
    planned_bytes: int | None,
) -> None:
    """Load the model, train it on these rows and write the run's files."""
    output = Path(config.output_dir)
    thinks = data.counts["training"]["thinks"] > 0
    if "chat_template" in data_rows.prepare_tokenizer(tokenizer, chats=data.chats, thinks=thinks):
        print("The model has no chat template: chats are written as `### User:`, `### Assistant:`,")
        print("and the tokenizer saved with the adapter has this template.")
    colour = sys.stdout.isatty()
    shown: Any = {"classes": data.classes, "special": data.counts["training"]["special"]}
    print(show_example(data.rows, tokenizer, colour=colour, task=config.task, **shown))
    rows: Any = data.stream or data.rows
    if config.data.packing:
        packs = data.stream.head.items if data.stream else PackedRows(rows, data.max_length)
        rows = data.stream or packs
        print(packs.describe())

    model = load_model(config, checkpoint, tokenizer, data, resume_from)
    rate = config.learning_rate or rate_from_rule(model)
    config = replace(config, learning_rate=rate, resume=False, resume_anyway=False)
    prepare_for_training(model, config.gradient_checkpointing, fast_path=config.fast_path)
    with no_empty_folder(output):
        trainer = make_trainer(config, model, tokenizer, rows, data.eval_rows, planned_bytes)
        trainer.add_callback(FreeCores())
        if trainer.args.device.type == "cpu":
            trainer.add_callback(ReturnMemory())
        if resume_from:
            trainer.check_checkpoint(resume_from)
        before_training(trainer, state_at(resume_from).global_step if resume_from else 0)

    with writing_to(output):
        run_and_write(config, trainer, data, resume_from, recorded, changed)


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
    if ranks.is_first():  # which holds the folder's lock
        require_no_other_run(output, resume_from)
    base = {"resolved": str(model.config._name_or_path), **state_of(model).record()}
    if resume_from and ranks.is_first():
        set_aside(output, state_at(resume_from).global_step)
    if resume_from and trainer.is_done(resume_from):
        settings = recorded.get("config", settings)  # with which it was trained
    elif resume_from:
        changed |= differences(recorded.get("base", {}), base, without=("resolved", "revision"))
        resumed = resumed_at(resume_from, changed, recorded)
        trainer.rows_from = rows_from(resumed)
        write_run_file(output, settings, base, data.counts, resumed)
    else:
        if ranks.is_first():
            remove_leftovers(output)
        write_run_file(output, settings, base, data.counts)
    parts = (data.rows, data.eval_rows, data.max_length)
    answers = ranks.is_first() or is_sharded(model)
    samples = choose_samples(config.task, config.samples * answers, *parts)
    if samples and not resume_from:
        answer_if_memory_suffices(output, "before", samples, model, tokenizer)
    trainer.fit(resume_from)
    if ranks.is_first():
        with out_of_memory_in(trainer, "saving the adapter"):
            trainer.save_result(output)  # before the answers, which may fail or be interrupted
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, MetricsWriter):
                callback.flush()
    if samples:
        answer_if_memory_suffices(output, "after", samples, model, tokenizer)
    if not ranks.is_first():
        return
    steps = (trainer.adapter_step, trainer.state.global_step)
    count = f"{len(data.rows)} rows"
    if data.stream:
        count = f"streamed, {data.stream.rows_read} rows read"
    write_results(output, settings, base, rows=count, steps=steps)


def answer_if_memory_suffices(output: Path, when: str, *rest: Any) -> None:
    """`write_answers`, or a line that memory ran out."""
    try:
        write_answers(output, when, *rest)
    except RuntimeError as error:
        if not is_out_of_memory(error) or is_sharded(rest[1]):  # then other ranks wait
            raise
    else:
        return
    free_unused()  # here, as the error holds the tensors of its frames
    print(f"{SAMPLES}: no answers {when} training, as memory ran out; training is not affected")


# ---- a resumed run against its start


def changed_rows(
    config: TrainConfig, counts: Any, recorded: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """What differs from the training rows of run.yaml, which --resume refuses."""
    before = recorded.get("data", {}).get("training", {})
    names = ("fingerprint", "rows", "tokens", "supervised_tokens")
    now = {name: counts["training"][name] for name in names}
    differ = differences(before, now)
    if differ and not config.resume_anyway:
        shown = ", ".join(f"{name} {old}, not {new}" for name, (old, new) in differ.items())
        raise UserError(
            f"--resume: {config.data.name} has other rows than the run's start had ({shown}): give "
            "the same data, --resume-anyway, or a new --output-dir"
        )
    return {f"rows.{name}": values for name, values in differ.items()}


def go_on(
    config: TrainConfig,
    stream: StreamedRows,
    resume_from: str,
    changed: dict[str, list[Any]],
    recorded: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """Read a stream up to the row after a checkpoint's; what differs in the rows before it."""
    state = read_stream(resume_from)
    begun = rows_from(recorded.get("resumed", []))
    if begins_anew(changed) or not state:
        return {}
    items = (state_at(resume_from).global_step - begun) * rows_a_step(config)
    if stream.go_to(items, state):
        return {}
    fault = "has other rows than those that the run has read: give the same data"
    anyway = f"--resume: {config.data.name} {fault}, --resume-anyway, or a new --output-dir"
    require(config.resume_anyway, anyway)
    return {"rows.read": [state["digest"], "other rows"]}


def rows_a_step(config: TrainConfig) -> int:
    """The rows, or packs, of an optimizer step on all ranks."""
    one = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return one * ranks.count()


def rows_from(resumed: Sequence[Mapping[str, Any]]) -> int:
    """The step from which the order of the rows is counted, of run.yaml's `resumed`."""
    return max((r["step"] for r in resumed if r.get("rows_begin_anew")), default=0)


def resumed_at(
    checkpoint: str, changed: dict[str, list[Any]], recorded: Mapping[str, Any]
) -> list[Any]:
    """run.yaml's list of changes at each resuming, with those of this one, which are printed.

    Where the rows begin anew, the step is the one that their order is counted from.
    """
    step = int(Path(checkpoint).name.removeprefix("checkpoint-"))
    if changed:
        shown = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        print(f"--resume, from step {step} on: {shown}")
    this: dict[str, Any] = {"step": step, "changed": changed}
    if begins_anew(changed):
        print("the batches are others: their order begins anew, with rows that were seen already")
        this["rows_begin_anew"] = True
    return [*recorded.get("resumed", []), *[this] * bool(changed)]


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
    known: Any = {"new_classes": False, "split": "evaluation"}
    source, stream, held_out = config.data.eval_data, None, None
    if source in config.data.sources and config.data.data_config:
        known["chosen"] = Chosen(config.data.data_config)
    parts: dict[str, Any] = {"training": None}
    if config.data.streaming:
        if source:  # first: a stream has processes
            parts["evaluation"] = (
                source,
                *data_rows.prepare_data(source, tokenizer, **same, **known),
            )
        stream = open_stream(config, tokenizer, max_length, checkpoint.vocab_size)
        training: Any = stream.head.rows, stream.stats
    else:
        training, held_out = mixing.prepare_training(
            config.data, tokenizer, seed=config.seed, classes=classes, **same
        )
        known["classes"] = training[1].classes
        if held_out:
            parts["evaluation"] = (config.data.name, *held_out)
        elif source:
            parts["evaluation"] = (
                source,
                *data_rows.prepare_data(source, tokenizer, **same, **known),
            )
    parts["training"] = (config.data.name, *training)
    counts = {}
    for part, (name, rows, stats) in parts.items():
        of = ", its first rows (streamed)" if stream and part == "training" else ""
        print(data_rows.describe(stats, name=name + of))
        hashed = stats.fingerprint or data_rows.fingerprint(rows)
        counts[part] = {"source": name, **stats.counts(), "fingerprint": hashed}
        counts[part] |= {"streamed": "the counts are those of the first rows"} if of else {}
    eval_rows = parts["evaluation"][1] if "evaluation" in parts else None
    *_, stats = parts["evaluation" if "evaluation" in parts else "training"]
    classes, chats = stats.classes, any(stats.chats for *_, stats in parts.values())
    return PreparedData(training[0], eval_rows, classes, chats, max_length, counts, stream)


def open_stream(
    config: TrainConfig, tokenizer: Any, max_length: int, vocabulary: int | None
) -> StreamedRows:
    """The rows of a run that reads them while it trains."""
    seed = config.trainer.get("data_seed")
    return StreamedRows(
        config.data,
        tokenizer,
        task=config.task,
        max_length=max_length,
        size=config.max_steps * rows_a_step(config),
        seed=config.seed if seed is None else seed,
        vocabulary=vocabulary,
    )


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
    sharded = config.sharding == "fsdp"
    with keeping_shards(offload=config.offload_base) if sharded else nullcontext():
        model = load_base(
            checkpoint,
            replace(config.quant, skip_modules=skip_modules),
            task=config.task,
            labels=data.classes,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
    share_pad(model, tokenizer.pad_token_id)
    if sharded:
        shard_base(model, offload=config.offload_base)
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
    if config.adapter:
        put_saved_adapter(model, resume_from or config.adapter, lora)
    else:
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
