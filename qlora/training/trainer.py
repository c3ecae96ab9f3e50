"""transformers' Trainer for a frozen 4-bit model with adapters.

`make_trainer` turns a config into Trainer's arguments, batches and callbacks. AdapterTrainer
differs from Trainer in:

    loss          summed over supervised tokens or labels and divided once: in training per
                  optimizer step, in evaluation per data set (qlora.data.objectives)
    steps         skipped if the loss or gradient is not finite; after max_bad_steps a run stops
    rows          ordered by the seed and the epoch alone, so that a resumed epoch goes on
    checkpoints   hold the adapter, not the model; no pickles (checkpoints.py, saving.py)
    optimizer     LoRA+ rates; fp32 masters of bf16 parameters (optimizers.py); unpaged on a CPU
    memory        micro-batches are split where it runs out (memory.py)
    ranks         of several GPUs share the rows, and average the gradients once a step (ranks.py)
    activations   optionally in host memory until the backward pass (qlora.fast.offload)
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from qlora.adapters.files import load_adapter_weights
from qlora.adapters.lora import lora_layers
from qlora.base.modules import state_of
from qlora.base.sharding import is_sharded
from qlora.config import GO_ON, TrainConfig
from qlora.data.batches import collator, row_lengths
from qlora.data.objectives import OBJECTIVES, Objective, measure
from qlora.errors import Interrupted, StreamError, UserError, first_line, require
from qlora.fast.attention import rows_collator
from qlora.fast.offload import offload_activations
from qlora.training import ranks
from qlora.training.callbacks import (
    EarlyStop,
    FiniteSteps,
    NothingLeft,
    Owed,
    SaveOnSignal,
    bad_evaluations,
    owes_evaluation,
)
from qlora.training.checkpoints import (
    OPTIMIZER,
    last_checkpoint,
    read_state,
    state_at,
)
from qlora.training.checks import refusals, training_arguments
from qlora.training.memory import Parts, out_of_memory_in
from qlora.training.optimizers import keep_updates, loses_updates
from qlora.training.outputs import (
    LastLog,
    MetricsWriter,
    PlainProgress,
)
from qlora.training.prepare import neftune
from qlora.training.saving import Saving, best_of
from qlora.training.shares import (
    SeededGroups,
    Share,
    blank_batch,
    empty_batch,
    is_empty,
    share_alone,
)


def make_trainer(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Any,
    eval_rows: Any,
    planned_bytes: int | None = None,
) -> "AdapterTrainer":
    """The Trainer of one run, with metrics.jsonl and progress lines as callbacks.

    Raises UserError, before anything is written, if Trainer or what it builds refuses the settings.
    """
    if model.dtype == torch.float16 and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise UserError("fp16 compute needs fp32 adapters: drop --adapter-dtype, or give fp32")
    collate = collator(tokenizer, config.task, model)
    if config.task == "causal-lm":
        packing, fast, pad = config.data.packing, config.fast_path, tokenizer.pad_token_id
        flat = rows_collator(model, packing=packing, fast_path=fast, pad_token_id=pad)
        collate = flat or collate
    on_cpu = model.device.type == "cpu"
    arguments = training_arguments(config, fp16=model.dtype == torch.float16, on_cpu=on_cpu)
    if on_cpu and "paged" in config.optim:
        print(f"{config.optim} runs unpaged: this machine has no GPU memory to page from")
    with refusals():
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=collate,
            processing_class=tokenizer,
            objective=OBJECTIVES[config.task],
            loraplus_lr_ratio=config.loraplus_lr_ratio,
            max_bad_steps=config.max_bad_steps,
            on_full_disk=config.on_full_disk,
            offload=offload_activations() if config.offload_activations else None,
        )
        # A check before anything is written: 10 for the number of steps, not known yet.
        trainer.create_optimizer_and_scheduler(num_training_steps=10)
        trainer.check_data()
    if loses_updates(trainer.optimizer):
        print(f"{config.optim} loses small updates of bf16 adapters: give --adapter-dtype fp32")
    trainer.optimizer = trainer.lr_scheduler = None
    for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # a notebook has another default
        trainer.remove_callback(callback)
    if ranks.is_first():
        goes_on = config.on_full_disk == GO_ON
        writer = MetricsWriter(Path(config.output_dir), planned_bytes, goes_on=goes_on)
        # first, as it adds values to the logs that the loggers receive
        trainer.callback_handler.callbacks.insert(0, writer)
        trainer.add_callback(PlainProgress())
    trainer.add_callback(LastLog())
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStop(config.early_stopping_patience))
    trainer.add_callback(Owed(trainer))  # last: the others count what it evaluates
    return trainer


class AdapterTrainer(Saving, Trainer):
    """Trainer for a frozen quantized model with LoRA adapters. `offload` is a context around each
    forward pass, `loraplus_lr_ratio` lora_B's learning rate over that of all other parameters,
    `max_bad_steps` the steps in a row without a finite loss and gradient that end a run,
    `on_full_disk` whether it goes on without a checkpoint that could not be written."""

    model: Any
    processing_class: Any
    state: Any
    optimizer: Any
    best_step: int | None = None  # of the adapter, if the best checkpoint was loaded at the end
    rows_from = 0  # the step from which the order of the rows is counted, in a resumed run
    logs_nan = False  # whether a loss since the last log was not finite

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        objective: Objective = OBJECTIVES["causal-lm"],
        loraplus_lr_ratio: float = 1.0,
        max_bad_steps: int = 5,
        on_full_disk: str = GO_ON,
        offload: offload_activations | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective: Objective = objective
        self.loraplus_lr_ratio, self.offload = loraplus_lr_ratio, offload
        self.goes_on = on_full_disk == GO_ON
        if not lora_layers(model):
            raise UserError("the model has no adapter to train: call apply_lora first")
        is_marked = model._hf_peft_config_loaded
        model._hf_peft_config_loaded = True  # PEFT's mark: Trainer refuses a 4-bit model without it
        try:
            super().__init__(model=model, compute_loss_func=self.objective.loss, **kwargs)
        finally:
            model._hf_peft_config_loaded = is_marked
        self._loss_shifts_labels = self.objective.next_tokens  # loss_type may be None
        self.neftune_noise_alpha = None  # Trainer's noise: one_pass adds it, by each row's length
        self.steps, self.on_signal = FiniteSteps(self, max_bad_steps), SaveOnSignal(self)
        self.parts, self.eval_parts = Parts(self, trains=True), Parts(self, trains=False)
        self.callback_handler.callbacks += [self.steps, self.on_signal]

    def lengths_of_run(self) -> tuple[int, int]:
        """Optimizer steps of the run, and micro-batches of an epoch."""
        with torch.random.fork_rng(devices=[]):  # as in check_data
            batches = len(self.get_train_dataloader())
        steps, per_epoch = self.args.max_steps, -(-batches // self.args.gradient_accumulation_steps)
        steps = steps if steps > 0 else math.ceil(self.args.num_train_epochs * per_epoch)
        return steps, batches

    def is_done(self, checkpoint: str) -> bool:
        """Whether `checkpoint` has all steps of this run, or those until it stopped early."""
        state, callbacks = state_at(checkpoint), self.callback_handler.callbacks
        early = [c.early_stopping_patience for c in callbacks if isinstance(c, EarlyStop)]
        has_stopped = any(bad_evaluations(state) >= patience for patience in early)
        return has_stopped or state.global_step >= self.lengths_of_run()[0]

    def check_data(self) -> None:
        """Refuse data that fill no batch, and a metric for the best model that none measures."""
        with torch.random.fork_rng(devices=[]):  # accelerate draws the seed of a random order
            loader = self.get_train_dataloader()
            if self.eval_dataset is not None:
                self.get_eval_dataloader()
        size, fix = self.args.train_batch_size, "drop --trainer.dataloader_drop_last"
        fault = f"{self.num_examples(loader)} rows fill no batch of {size}: {fix}, or lower"
        require(len(loader) > 0, f"{fault} --per-device-train-batch-size")
        metric = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        measured = measure(self.objective, (), state_of(self.model).labels)
        fault = f"--trainer.metric_for_best_model must be {' or '.join(measured)}, got {metric!r}"
        require(metric in measured, fault)

    def check_checkpoint(self, checkpoint: str) -> None:
        """Load everything in `checkpoint` that training goes on with: what is damaged raises now.
        Trainer loads it again when training starts."""
        load_adapter_weights(self.model, checkpoint)
        best = state_at(checkpoint).best_global_step
        if self.args.load_best_model_at_end and best:
            folder = Path(str(self.args.output_dir), f"checkpoint-{best}")
            fix = "restore it, or give --trainer.load_best_model_at_end false"
            require(folder.is_dir(), f"{folder}, the best so far, is missing: {fix}")
        self.create_optimizer_and_scheduler(num_training_steps=10)
        try:
            state = read_state(Path(checkpoint, OPTIMIZER))["optimizer"]
            groups = (o["param_groups"][0] for o in (state, self.optimizer.state_dict()))
            saved, own = (group.keys() - {"initial_lr"} for group in groups)
            name = OptimizerNames(self.args.optim).value
            require(saved == own, f"{OPTIMIZER} is of another optimizer than --optim {name}")
            self._load_states(checkpoint)
            self._load_rng_state(checkpoint)
        except Exception as error:  # whatever the packages raise for a damaged file
            fix = "Remove that folder to resume from an earlier one, or give a new --output-dir"
            fault = f"{checkpoint} cannot be resumed from: {first_line(error)} {fix}"
            raise UserError(fault) from error
        self.optimizer = self.lr_scheduler = None

    def fit(self, checkpoint: str | None) -> None:
        """Train, from `checkpoint` if given: not at all if it has all steps (Trainer adds one)."""
        is_done = checkpoint and self.is_done(checkpoint)
        if checkpoint and is_done and not owes_evaluation(self, state_at(checkpoint)):
            self.state = state_at(checkpoint)
            step, until, flag = self.state.global_step, "", "--max-steps"
            if step < self.lengths_of_run()[0]:
                until, flag = " until it stopped", "--early-stopping-patience"
            print(f"All {step} steps{until} are done; a larger {flag} continues.")
            if self.args.load_best_model_at_end and self.state.best_global_step:
                self._load_best_model()
            return
        # evaluating and saving have messages of their own
        if checkpoint:
            self.args.eval_on_start = False
            self.saved_best = best_of(state_at(checkpoint))
        if ranks.count() > 1:
            self.begin_together()
        with self.on_signal, out_of_memory_in(self, "the optimizer's step"):
            try:
                self.train(resume_from_checkpoint=checkpoint)
            except StreamError as error:
                saved = last_checkpoint(Path(str(self.args.output_dir)))
                raise UserError(f"step {self.state.global_step + 1}: {error}; {saved}") from error
            except NothingLeft:
                if self.args.load_best_model_at_end and self.state.best_global_step:
                    self._load_best_model()
                self.callback_handler.on_train_end(self.args, self.state, self.control)
        if number := self.on_signal.of_any():  # that came after the last step
            raise Interrupted(last_checkpoint(Path(str(self.args.output_dir))), number)
        if not (self.steps.is_sound or self.steps.passes_again()):
            ranks.refuse(self.steps.fault())

    def begin_together(self) -> None:
        """Several ranks begin with the same parameters and draw different numbers. The model is
        prepared without DistributedDataParallel (qlora.training.ranks)."""
        ranks.send_values(self.trained())
        if not ranks.is_first():  # which draws those of one process
            set_seed(self.args.seed, device_specific=True)
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # fp16's autocast

    def trained(self) -> list[Tensor]:
        """The parameters that are trained, in the order of the model."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def adapter_step(self) -> int:
        """The step whose adapter the model has: the last one, or the best."""
        return int(self.state.global_step if self.best_step is None else self.best_step)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Trainer's, in parts where memory runs out, and with the gradients of all ranks after the
        last micro-batch; 0 for a loss that is not finite, which FiniteSteps finds: sums stay
        finite."""
        loss = torch.zeros((), device=self.args.device)
        if not is_empty(inputs):
            loss = self._pass_in_parts(model, inputs, num_items_in_batch)
        elif is_sharded(model):
            self.one_pass(model, blank_batch(self.args.device), num_items_in_batch)
        if ranks.count() > 1 and self.accelerator.sync_gradients:
            ranks.average_gradients(self.trained())
        return loss

    def _pass_in_parts(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        before = self.steps.batches  # of this optimizer step
        if not before:
            self.parts.rewind.mark()
        batches = [*(batch for batch, _ in before), inputs]
        one_pass = partial(self.one_pass, model, num_items_in_batch=num_items_in_batch)
        losses = [sum(parts[1:], parts[0]) for parts in self.parts.run(batches, one_pass)]
        if len(losses) > 1:  # the step was begun again: these replace the losses so far
            for (_, old), new in zip(before, losses, strict=False):
                self._tr_loss += new.nan_to_num(0, 0, 0) - old.nan_to_num(0, 0, 0)
            before.clear()
            before.extend(zip(batches, losses, strict=True))
        else:
            before.append((inputs, losses[0]))
        return losses[-1].nan_to_num(0, 0, 0)

    def one_pass(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """Trainer's forward and backward pass; the loss."""
        alpha = self.args.neftune_noise_alpha
        with neftune(self.model, alpha, row_lengths(inputs)) if alpha else nullcontext():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the mean loss since the last log as NaN if one was not finite."""
        if "loss" in logs and self.logs_nan:
            logs["loss"], self.logs_nan = math.nan, False
        super().log(logs, start_time)

    def compute_loss_context_manager(self) -> ExitStack:
        """The context of every forward pass: Trainer's, and offloading."""
        stack: ExitStack = super().compute_loss_context_manager()
        if self.offload is not None:
            stack.enter_context(self.offload)
        return stack

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Trainer's, without the mask where position_ids delimit the rows: it would hide them."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if "position_ids" in prepared:
            prepared.pop("attention_mask", None)
        return prepared

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Trainer's, which waits for a GPU at each batch: FiniteSteps counts, once per step."""
        if self.args.include_num_input_tokens_seen != "non_padding":
            super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler, seed = super()._get_train_sampler(train_dataset), self.args.data_seed
        seed = self.args.seed if seed is None else seed
        if isinstance(sampler, LengthGroupedSampler):
            sampler = SeededGroups(sampler, seed)
        if ranks.count() > 1:
            size, drop_last = self.args.train_batch_size, self.args.dataloader_drop_last
            sampler = Share(sampler, size, seed=seed, drop_last=drop_last)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        if ranks.count() > 1:
            sampler = sampler or SequentialSampler(eval_dataset)
            sampler = Share(sampler, self.args.eval_batch_size, seed=self.args.seed)
        return sampler

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        if ranks.count() > 1:
            share_alone(loader)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Trainer's; at the end of the data, with empty batches for a rank that has fewer."""
        if ranks.count() == 1:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = list(islice(epoch_iterator, num_batches))
        batches += [empty_batch(device) for _ in range(num_batches - len(batches))]
        return batches, self._get_num_items_in_batch(batches, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.unsaved_best == self.state.global_step:  # the model has it, and no checkpoint
            return
        self.best_step = self.state.best_global_step
        load_adapter_weights(self.model, f"{self.args.output_dir}/checkpoint-{self.best_step}")

    def _init_training_state(self, max_steps: int, per_epoch: int, *rest: Any) -> tuple[int, int]:
        """Trainer's: epochs, and batches of the last one, that are done; since `rows_from`."""
        epochs, batches = super()._init_training_state(max_steps, per_epoch, *rest)
        self.state.best_model_checkpoint = self.best_folder()  # also if the output folder was moved
        if not self.rows_from:
            return epochs, batches
        epochs, steps = divmod(max(0, self.state.global_step - self.rows_from), per_epoch)
        return epochs, steps * self.args.gradient_accumulation_steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's; for every schedule, the optimizer has the rates that it began with."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return schedule

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's, with LoRA+ rates (arXiv:2402.12354) and fp32 masters of bf16 parameters."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer: Any = super().create_optimizer(model)
        if self.loraplus_lr_ratio != 1:
            layers = lora_layers(self.model).values()
            ids_of_B = {id(lora_B) for layer in layers for lora_B in layer.lora_B.values()}
            for group in list(optimizer.param_groups):
                matrices = [p for p in group["params"] if id(p) in ids_of_B]
                group["params"] = [p for p in group["params"] if id(p) not in ids_of_B]
                if matrices:
                    rate = group["lr"] * self.loraplus_lr_ratio
                    optimizer.add_param_group({**group, "params": matrices, "lr": rate})
        self.optimizer = keep_updates(optimizer)
        return self.optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Trainer's; paged optimizers run unpaged on a CPU."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        unpaged = {"is_paged": False} if args.use_cpu and "is_paged" in kwargs else {}
        return optimizer, kwargs | unpaged

    def evaluation_loop(
        self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """The loss over all labels, where Trainer averages batches; a classifier's scores."""
        self.callback_handler.eval_dataloader = dataloader  # its length, for the progress bar
        broken: list[Any] = []
        results = self._results(dataloader, broken)
        labels = state_of(self.model).labels
        measured = measure(self.objective, results, labels, gathered=ranks.gathered)
        count = sum(*ranks.numbers(len(broken)))
        if count:
            batches = -(-self.num_examples(dataloader) // self.args.eval_batch_size)
            self.steps.is_sound &= count < batches  # else the adapter is the cause
            rows = self.steps.show(broken, dataloader.dataset)
            tqdm.write(f"step {self.state.global_step}: the evaluation loss is not finite{rows}")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        size = self.num_examples(dataloader)
        return EvalLoopOutput(None, None, metrics, num_samples=size)  # type: ignore[arg-type]

    def _results(self, dataloader: Any, broken: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
        """Summed loss, outputs, labels of each evaluation batch; `broken` gets those not finite."""
        model, step_done = self.model.eval(), self.callback_handler.on_prediction_step
        # the loss stays a sum: Trainer multiplies it by the ranks
        one = torch.tensor(ranks.count(), device=self.args.device)

        def compute(part: Any) -> tuple[Any, Any, Any]:
            batch = self._prepare_inputs(part)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, dict(batch), True, num_items_in_batch=one)
            # logits of all parts at once may not fit
            return loss, outputs if self.objective.classifies else None, batch["labels"]

        before, left = torch.get_rng_state(), len(dataloader)
        for inputs in dataloader:
            left -= 1
            torch.set_rng_state(
                before
            )  # a DataLoader draws a seed: steps are as without evaluation
            (results,) = self.eval_parts.run([inputs], compute)
            if not all(loss.isfinite() for loss, _, _ in results):
                broken.append(inputs)
            yield from results
            self.control = step_done(self.args, self.state, self.control)
        for _ in range(left):  # batches that only other ranks have
            if is_sharded(model):
                compute(blank_batch(self.args.device))
            self.control = step_done(self.args, self.state, self.control)
