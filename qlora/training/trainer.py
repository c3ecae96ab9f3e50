"""transformers' Trainer for a frozen 4-bit model with adapters.

`make_trainer` turns a config into Trainer's arguments, batches and callbacks. AdapterTrainer
differs from Trainer in:

    loss          summed over supervised tokens or labels and divided once: in training per
                  optimizer step, in evaluation per data set (qlora.data.objectives)
    checkpoints   hold the adapter, not the model; a resumed epoch keeps its order of rows
    optimizer     LoRA+ learning rates; fp32 master weights of bf16 adapters
                  (qlora.training.optimizers); paged optimizers run unpaged on a CPU
    activations   optionally in host memory until the backward pass (qlora.fast.offload)
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import EvalLoopOutput

from qlora.adapters.files import load_adapter_weights, save_adapter
from qlora.adapters.lora import lora_layers
from qlora.base.modules import state_of
from qlora.config import TrainConfig
from qlora.data.objectives import OBJECTIVES, Objective, measure
from qlora.data.rows import collator
from qlora.errors import UserError, first_line, require
from qlora.fast.attention import rows_collator
from qlora.fast.offload import offload_activations
from qlora.training.optimizers import keep_updates, loses_updates
from qlora.training.outputs import MetricsWriter, PlainProgress, write_stops

# Settings with the same name and meaning in TrainConfig and TrainingArguments.
SHARED_ARGUMENTS = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim",
    "seed", "logging_steps", "eval_steps", "save_steps",
)  # fmt: skip
# Arguments that need evaluation, besides the strategies.
NEED_EVALUATION = ("load_best_model_at_end", "metric_for_best_model", "eval_on_start")
EPOCH_STATE = "epoch_rng_state.pth"  # file of a checkpoint: torch's generator as the epoch began


def training_arguments(config: TrainConfig, *, fp16: bool, on_cpu: bool) -> TrainingArguments:
    """transformers' arguments for `config`; `--trainer.NAME` overrides them."""
    eval_strategy = ("steps" if config.eval_steps else "epoch") if config.data.eval_data else "no"
    settings: dict[str, Any] = {name: getattr(config, name) for name in SHARED_ARGUMENTS}
    settings |= {
        "learning_rate": config.learning_rate or 1e-4,  # none yet before the model is known
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "warmup_steps": config.warmup_ratio,  # below 1: a fraction of the steps
        "logging_first_step": True,
        "eval_strategy": eval_strategy,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "report_to": list(config.report_to) or "none",
        "fp16": fp16,  # T4 and older: loss scaling, fp32 adapters
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        # group_by_length as in QLoRA: less padding; packs have nearly one length
        "train_sampling_strategy": "random" if config.data.packing else "group_by_length",
        "length_column_name": "length",
        "include_num_input_tokens_seen": "non_padding",
        "label_names": ["labels"],
    }
    settings |= config.trainer
    _require_evaluations(settings, config.data.eval_data)
    with refusals():
        arguments = TrainingArguments(**settings)
        arguments.get_process_log_level()  # Trainer's first use of log_level
    # One GPU even where more are visible: no setting turns off Trainer's DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _require_evaluations(settings: dict[str, Any], eval_data: str | None) -> None:
    """Refuse settings that need an evaluation where there is none, or at other steps."""
    evaluated, saved = settings["eval_strategy"], settings["save_strategy"]
    needing = [f"--trainer.{name}" for name in NEED_EVALUATION if settings.get(name)]
    needing += ["--trainer.save_strategy best"] * (saved == "best")
    if eval_data is None:
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
        require(agree, f"--trainer.load_best_model_at_end {fault}: {fix}")


@contextmanager
def refusals() -> Iterator[None]:
    """Turns transformers' exceptions about settings into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError, ImportError, TypeError, KeyError, OSError) as error:
        raise UserError(f"Trainer refuses these settings: {first_line(error)}") from error


def make_trainer(
    config: TrainConfig, model: PreTrainedModel, tokenizer: Any, rows: Any, eval_rows: Any
) -> "AdapterTrainer":
    """The Trainer of one run, with metrics.jsonl and progress lines as callbacks.

    Raises UserError if Trainer, an optimizer or a data loader refuses the settings; nothing was
    written then.
    """
    if model.dtype == torch.float16 and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise UserError("fp16 compute needs fp32 adapters: drop --adapter-dtype, or give fp32")
    collate = collator(tokenizer, config.task, model)
    if config.task == "causal-lm":
        packing, fast, pad = config.data.packing, config.fast_path, tokenizer.pad_token_id
        unpadded = rows_collator(model, packing=packing, fast_path=fast, pad_token_id=pad)
        collate = unpadded or collate
    on_cpu = model.device.type == "cpu"
    arguments = training_arguments(config, fp16=model.dtype == torch.float16, on_cpu=on_cpu)
    if on_cpu and "paged" in config.optim:
        print(f"{config.optim} runs unpaged: this machine has no GPU memory to page from")
    try:
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
                offload=offload_activations() if config.offload_activations else None,
            )
            # A check before anything is written: 10 for the number of steps, not known yet.
            trainer.create_optimizer_and_scheduler(num_training_steps=10)
            trainer.check_data()
    except UserError:
        with suppress(OSError):
            Path(config.output_dir).rmdir()  # Trainer has created it; removed only if empty
        raise
    if loses_updates(trainer.optimizer):
        print(f"{config.optim} loses small updates of bf16 adapters: give --adapter-dtype fp32")
    trainer.optimizer = trainer.lr_scheduler = None
    for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # a notebook has another default
        trainer.remove_callback(callback)
    # first, as it adds values to the logs that the loggers receive
    trainer.callback_handler.callbacks.insert(0, MetricsWriter(Path(config.output_dir)))
    trainer.add_callback(PlainProgress())
    return trainer


class ResumableSampler(Sampler[int]):
    """Trainer's group_by_length, whose order of a resumed epoch is that of the interrupted one.

    An epoch begins by drawing its order; Trainer's checkpoints have only the generator's later
    state. `draw_from`: the state for the next draw, None for the current one; `drawn_from`: that of
    the last draw.
    """

    def __init__(self, sampler: Any, draw_from: Tensor | None) -> None:
        self.sampler, self.draw_from, self.drawn_from = sampler, draw_from, draw_from

    def __iter__(self) -> Iterator[int]:
        if self.draw_from is not None:
            torch.set_rng_state(self.draw_from)
            self.draw_from = None
        self.drawn_from = torch.get_rng_state()
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class AdapterTrainer(Trainer):
    """Trainer for a frozen quantized model with LoRA adapters. `offload` is a context around each
    forward pass, `loraplus_lr_ratio` lora_B's learning rate over that of all other parameters."""

    model: Any
    processing_class: Any
    state: Any
    optimizer: Any
    sampler: ResumableSampler | None = None
    epoch_state: Tensor | None = None  # of torch's generator, from a checkpoint

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        objective: Objective = OBJECTIVES["causal-lm"],
        loraplus_lr_ratio: float = 1.0,
        offload: offload_activations | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective: Objective = objective
        self.loraplus_lr_ratio, self.offload = loraplus_lr_ratio, offload
        if not lora_layers(model):
            raise UserError("the model has no adapter to train: call apply_lora first")
        is_marked = model._hf_peft_config_loaded
        model._hf_peft_config_loaded = True  # PEFT's mark: Trainer refuses a 4-bit model without it
        try:
            super().__init__(model=model, compute_loss_func=self.objective.loss, **kwargs)
        finally:
            model._hf_peft_config_loaded = is_marked

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

    def fit(self, checkpoint: str | None) -> None:
        """Train, from `checkpoint` if given: not at all if it has all steps (Trainer adds one)."""
        if checkpoint:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if 0 < self.args.max_steps <= state.global_step:
                self.state = state
                print(f"All {state.global_step} steps are done; a larger --max-steps continues.")
                return
            if (file := Path(checkpoint) / EPOCH_STATE).exists():
                self.epoch_state = torch.load(file, weights_only=True)
        self.train(resume_from_checkpoint=checkpoint)

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
            prepared.pop("attention_mask", None)  # Trainer has counted its tokens by now
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.train_sampling_strategy == "group_by_length":
            sampler = self.sampler = ResumableSampler(sampler, self.epoch_state)
        return sampler

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.sampler is not None:
            torch.save(self.sampler.drawn_from, Path(output_dir) / EPOCH_STATE)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's, called before the draw of a new epoch but after that of a resumed one."""
        super()._load_rng_state(checkpoint)
        if self.sampler is not None:
            self.sampler.draw_from = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = str(output_dir or self.args.output_dir)
        save_adapter(self.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
            write_stops(Path(folder), self.model, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter_weights(self.model, self.state.best_model_checkpoint)

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
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.use_cpu and "is_paged" in kwargs:
            kwargs["is_paged"] = False
        return optimizer, kwargs

    def evaluation_loop(
        self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """The loss over all labels, where Trainer averages batches; a classifier's scores."""
        self.callback_handler.eval_dataloader = dataloader  # its length, for the progress bar
        measured = measure(self.objective, self._results(dataloader), state_of(self.model).labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        size = self.num_examples(dataloader)
        return EvalLoopOutput(None, None, metrics, num_samples=size)  # type: ignore[arg-type]

    def _results(self, dataloader: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Summed loss, outputs and labels of each evaluation batch."""
        model, step_done = self.model.eval(), self.callback_handler.on_prediction_step
        one = torch.tensor(1, device=self.args.device)  # num_items=1 keeps the loss a sum
        for batch in map(self._prepare_inputs, dataloader):
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, dict(batch), True, num_items_in_batch=one)
            yield loss, outputs, batch["labels"]
            self.control = step_done(self.args, self.state, self.control)
