"""Master weights in fp32 for bf16 parameters, at 2 bytes a parameter; steps of bitsandbytes'
optimizers without a wait for the GPU; and FiniteSteps, which skips the steps of a loss or gradient
that is not finite.

A bf16 number has 8 bits of mantissa, so an update below 2^-9 of it is rounded away: a fifth of the
updates of a LoRA's A at a rate of 3e-4, most as the rate falls (benchmarks/adapter_dtype.py). The
master weight is therefore stored as two halves of its bits: the parameter, which is the master
rounded to bf16, and an int16 (as in Split-SGD, arXiv:2005.04680)

    master = parameter * 2^16 + lower      of their bits, as integers; lower in [-2^15, 2^15)

This is exact: `lower` is the remainder of rounding to nearest (ties away from zero). `step` joins
the halves of about BUNDLE parameters at a time and lets the wrapped optimizer update them in place,
in fp32. Its own state is then in fp32 as well.

Cost: 2 bytes a parameter beside the optimizer's state, about 32 MiB during a step, a few passes
over the parameters. Left out: stochastic rounding, which needs its own kernels and keeps updates
only on average; fp32 parameters, which with their gradients take 4 bytes more and a cast per
forward pass.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from bitsandbytes.utils import sync_gpu
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.optimization import Adafactor

from qlora.errors import UserError
from qlora.training.outputs import complete_checkpoints, show_rows

# Optimizers whose update of a parameter depends only on its own gradient and state.
BY_PARAMETER = (Adafactor, Adagrad, Adam, AdamW, Optimizer8bit, RMSprop, SGD)
# A run stops after so many steps in a row without a finite loss or gradient; not in a row, after as
# many and more than a tenth of its steps, so that one bad row does not end a run of many epochs.
MAX_SKIPPED = 5
BUNDLE = 1 << 21  # numbers in fp32 at once: about 16 bytes each, with their gradients
LOWER = "lower_halves"
SLOW_ON = "cuda"  # bitsandbytes' steps
NOT_FINITE = "not-finite-"  # before the name of a checkpoint whose adapter gives no finite loss


def join(parameter: Tensor, lower: Tensor) -> Tensor:
    """The fp32 numbers (...) of bf16 and int16 halves (...)."""
    upper = parameter.view(torch.int16) + (lower >> 15)  # one less where `lower` is negative
    return torch.stack([lower, upper], dim=-1).view(torch.float32)[..., 0]  # little-endian


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers (N,) -> rounded to bf16 (N,), and the int16 remainder (N,); inverts `join`."""
    lower, upper = master.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)  # (N, 2) -> 2 x (N,)
    # -1 where rounding goes up; not for NaN, of which the largest would become -0
    up = (lower >> 15).masked_fill_(master.isnan(), 0)
    return (upper - up).view(torch.bfloat16), lower.contiguous()


def keep_updates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer` with master weights for its bf16 parameters, if it is one of BY_PARAMETER.

    bitsandbytes' optimizers are wrapped without bf16 parameters too, on a GPU: for their speed.
    Any other is returned as it is; `loses_updates` tells whether it should have master weights.
    """
    is_there = any(p.device.type == SLOW_ON for p in _parameters(optimizer))
    is_slow = is_there and isinstance(optimizer, Optimizer8bit)
    if is_slow or (loses_updates(optimizer) and isinstance(optimizer, BY_PARAMETER)):
        return MasterWeights(optimizer)
    return optimizer


def loses_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` updates bf16 parameters without master weights."""
    in_bf16 = any(p.dtype == torch.bfloat16 for p in _parameters(optimizer))
    return in_bf16 and not isinstance(optimizer, MasterWeights)


class MasterWeights(torch.optim.Optimizer):
    """An optimizer around another, whose bf16 parameters it updates as fp32 numbers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        # Lower half (numel,) int16 and the parameter's _version at that time, None after loading.
        # Without a lower half the parameter is its own master.
        self.lower: dict[Tensor, tuple[Tensor, int | None]] = {}
        self.load_state_dict(optimizer.state_dict())  # Adagrad's is not empty, and in bf16

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient; gradients stay as they were.

        The wrapped optimizer steps once for the other parameters and once per bundle of bf16 ones:
        it skips parameters whose gradient is None.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        gradients = {p: p.grad for p in _parameters(self) if p.grad is not None}
        in_bf16 = [p for p in gradients if p.dtype == torch.bfloat16]
        others = gradients.keys() - set(in_bf16)
        try:
            for p in in_bf16:
                p.grad = None
            if others:
                step_inner(self.optimizer)
            for p in others:
                p.grad = None
            for bundle in bundles(in_bf16):
                sizes = [p.numel() for p in bundle]
                lower = torch.cat([self._lower_of(p) for p in bundle])
                master = join(torch.cat([p.data.reshape(-1) for p in bundle]), lower)  # (N,)
                in_fp32 = torch.cat([gradients[p].reshape(-1) for p in bundle]).float()
                with _with_data(dict(zip(bundle, master.split(sizes), strict=True))):
                    for p, gradient in zip(bundle, in_fp32.split(sizes), strict=True):
                        p.grad = gradient.view(p.shape)
                    step_inner(self.optimizer)
                upper, lower = split(master)
                highs = [h.view(p.shape) for p, h in zip(bundle, upper.split(sizes), strict=True)]
                torch._foreach_copy_(bundle, highs)
                for p, low in zip(bundle, lower.split(sizes), strict=True):
                    p.grad = None
                    self.lower[p] = low, p._version
            if getattr(self.optimizer, "is_paged", False) and gradients:
                sync_gpu(next(iter(gradients)))  # its state is in memory that the host shares
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
        return loss

    def _lower_of(self, parameter: Tensor) -> Tensor:
        """Zeros if the parameter was overwritten since, as load_adapter_weights does."""
        lower, version = self.lower.get(parameter, (None, None))
        if lower is None or version not in (None, parameter._version):
            return torch.zeros(parameter.numel(), dtype=torch.int16, device=parameter.device)
        return lower

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and the lower halves in the order of parameters."""
        lower = [self._lower_of(p) if p in self.lower else None for p in _parameters(self)]
        return {**self.optimizer.state_dict(), LOWER: lower}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of an optimizer without master weights."""
        inner = {key: value for key, value in state_dict.items() if key != LOWER}
        in_bf16 = [p for p in _parameters(self) if p.dtype == torch.bfloat16]
        # Optimizers cast a loaded state to the parameter's dtype: fp32 within the block.
        with _with_data({p: torch.zeros((), device=p.device).expand(p.shape) for p in in_bf16}):
            self.optimizer.load_state_dict(inner)
        # shared with the wrapped optimizer: schedulers change them here
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        saved = zip(_parameters(self), state_dict.get(LOWER, ()), strict=False)
        self.lower = {p: (low.to(p.device), None) for p, low in saved if low is not None}


def step_inner(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`; of bitsandbytes' without its wait for the GPU after each parameter."""
    if not isinstance(optimizer, Optimizer8bit):
        optimizer.step()
        return
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p.grad is not None:
                if not optimizer.state[p]:
                    optimizer.init_state(group, p, i, j)
                optimizer.prefetch_state(p)
                optimizer.update_step(group, p, i, j)


@contextmanager
def _with_data(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Replace the parameters' data by `values`, of any dtype, within the block."""
    before = {p: p.data for p in values}
    try:
        for p, value in values.items():
            p.data = value.view(p.shape)
        yield
    finally:
        for p, data in before.items():
            p.data = data


def bundles(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Successive parameters of one device with at most BUNDLE numbers; a larger one is alone."""
    bundle: list[Tensor] = []
    size = 0
    for p in parameters:
        if bundle and (size + p.numel() > BUNDLE or p.device != bundle[0].device):
            yield bundle
            bundle, size = [], 0
        bundle.append(p)
        size += p.numel()
    if bundle:
        yield bundle


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- steps without a finite loss or gradient


def tokens_of(batch: Any) -> Tensor:
    """The number of tokens in a batch without padding, on its device."""
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()


class FiniteSteps(TrainerCallback):
    """Skips the steps whose loss or gradient is not finite, and prints their rows. It counts
    the tokens of each step as well, where a GPU is waited for anyway.

    A step is also the test of the adapter that it begins with: `sound_step` is the last one at
    whose end the adapter was known to give a finite loss; `is_sound`, whether the last test passed.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.batches: list[tuple[Any, Tensor]] = []  # of this step, and whether the loss is finite
        self.skipped, self.in_a_row, self.most = 0, 0, float(MAX_SKIPPED)  # steps
        self.sound_step, self.is_sound = 0, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sound_step = state.global_step - 1  # a checkpoint is saved after a finite loss
        steps = state.max_steps - state.global_step
        self.most = max(MAX_SKIPPED - 1, steps / 10)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model, scaler = self.trainer.model, getattr(self.trainer.accelerator, "scaler", None)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # a loss scale above 1 makes fp16 gradients overflow: its scaler skips the step, lowers it
        is_scaled = scaler is not None and scaler.get_scale() > 1
        batches, self.batches = self.batches, []
        norm = get_total_norm(gradients)
        tests = [norm.isfinite(), *(is_finite for _, is_finite in batches)]
        is_counted = self.trainer.args.include_num_input_tokens_seen == "non_padding"
        counts = [tokens_of(inputs) for inputs, _ in batches] if is_counted else []
        read = torch.stack([n.to(norm.device, torch.int64) for n in (*tests, *counts)])
        has_norm, *numbers = read.tolist()  # a GPU is waited for once per step
        finite = numbers[: len(batches)]
        state.num_input_tokens_seen += sum(numbers[len(batches) :])
        broken = [inputs for (inputs, _), ok in zip(batches, finite, strict=True) if not ok]
        if not broken and (is_scaled or has_norm):
            self.sound_step, self.is_sound, self.in_a_row = state.global_step, True, 0
            return
        if scaler is None:
            model.zero_grad()  # optimizers skip parameters without a gradient
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.is_sound = bool(broken) and any(finite)
        if self.is_sound:  # of the other batches: the rows are the cause, not the adapter
            self.sound_step = state.global_step
        if broken:
            self.trainer.logs_nan = True
        step, what = state.global_step + 1, "loss" if broken else "gradient"
        shown = broken or [inputs for inputs, _ in batches]
        rows = show_rows(shown, self.trainer.train_dataset, self.trainer.processing_class)
        tqdm.write(f"step {step}: the {what} is not finite, the adapter stays as it was{rows}")
        if self.in_a_row == MAX_SKIPPED or self.skipped > self.most:
            raise UserError(self.fault())

    def passes_again(self) -> bool:
        """Whether one of MAX_SKIPPED batches has a finite loss: those of the last step had not."""
        trainer, one = self.trainer, torch.tensor(1, device=self.trainer.args.device)
        if not self.skipped:  # an evaluation had not
            return False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # as in check_data
            for inputs in islice(trainer.get_train_dataloader(), MAX_SKIPPED):
                batch = trainer._prepare_inputs(inputs)
                if trainer.compute_loss(trainer.model, batch, num_items_in_batch=one).isfinite():
                    return True
        return False

    def fault(self) -> str:
        """What went wrong, the last good checkpoint, and how to mend it. Later checkpoints are
        renamed, so that --resume goes on from the good one."""
        output = Path(str(self.trainer.args.output_dir))
        checkpoints = complete_checkpoints(output)
        good = [n for n in checkpoints if n <= self.sound_step]
        last = f"The last good checkpoint is {output}/checkpoint-{max(good, default='')}"
        last = last if good else "There is no good checkpoint"
        for folder in (checkpoints[n] for n in checkpoints.keys() - set(good)):
            aside = folder.with_name(f"{NOT_FINITE}{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            last += f", {folder.name} is now {aside.name}"
        return (
            f"the loss or its gradient was not finite ({self.skipped} steps were skipped), so "
            f"training has ended and no adapter was written. {last}. Lower --learning-rate, remove "
            "the rows named above, or give --compute-dtype fp32"
        )
