"""Master weights in fp32 for bf16 parameters, at 2 bytes a parameter.

A bf16 number has 8 bits of mantissa, so an update below 2^-9 of it is rounded away: a fifth of the
updates of a LoRA's A at a rate of 3e-4, most as the rate falls (benchmarks/adapter_dtype.py). Here
the fp32 sum is kept in two halves of its bits: the parameter, which is the sum rounded to bf16, and
an int16 beside it (as Split-SGD does, arXiv:2005.04680)

    master = parameter * 2^16 + lower      of their bits, as integers; lower in [-2^15, 2^15)

which is exact: `lower` is what rounding to nearest (ties away from zero) left over. In a step a few
million parameters at a time become fp32 numbers, on which any optimizer that goes parameter by
parameter works in place; its own state is then in fp32 too.

Cost: 2 bytes a parameter beside the optimizer's state, about 32 MiB during a step, a few passes
over the parameters. Left out: stochastic rounding, which needs its own kernels and keeps updates
only on average; fp32 parameters, which with their gradients take 4 bytes more and a cast per
forward pass.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from transformers.optimization import Adafactor

# Optimizers whose update of a parameter depends only on its own gradient and state.
BY_PARAMETER = (Adafactor, Adagrad, Adam, AdamW, Optimizer8bit, RMSprop, SGD)
BUNDLE = 1 << 21  # parameters in fp32 at once: about 16 bytes each, with their gradients
LOWER = "lower_halves"


def join(parameter: Tensor, lower: Tensor) -> Tensor:
    """fp32 numbers (...) of their bf16 and int16 halves (...)."""
    upper = parameter.view(torch.int16) + (lower >> 15)  # one less where `lower` is negative
    return torch.stack([lower, upper], dim=-1).view(torch.float32)[..., 0]  # little-endian


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers (...) -> rounded to bf16, and the int16 that `join` needs besides."""
    lower, upper = master.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
    up = (lower >> 15).masked_fill_(master.isnan(), 0)  # the bits after the last NaN are -0's
    return (upper - up).view(torch.bfloat16), lower.contiguous()


def keep_updates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer` with master weights for its bf16 parameters.

    Returned as it is if it has none, or is not in BY_PARAMETER: then `loses_updates` is true.
    """
    if loses_updates(optimizer) and isinstance(optimizer, BY_PARAMETER):
        return MasterWeights(optimizer)
    return optimizer


def loses_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it adds updates to bf16 numbers."""
    halves = any(p.dtype == torch.bfloat16 for p in _parameters(optimizer))
    return halves and not isinstance(optimizer, MasterWeights)


class MasterWeights(torch.optim.Optimizer):
    """Wraps an optimizer: its bf16 parameters are updated as fp32 numbers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        # Lower half (numel,) int16, and the parameter's version it belongs to, None after loading.
        # A parameter without one is its own master.
        self.lower: dict[Tensor, tuple[Tensor, int | None]] = {}
        self.load_state_dict(optimizer.state_dict())  # Adagrad's starts filled, in bf16

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient; gradients stay as they were."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {p: p.grad for p in _parameters(self) if p.grad is not None}
        halves = [p for p in gradients if p.dtype == torch.bfloat16]
        others = gradients.keys() - set(halves)
        try:
            for p in halves:  # an optimizer skips parameters without gradient
                p.grad = None
            if others:
                self.optimizer.step()
            for p in others:
                p.grad = None
            for bundle in bundles(halves):
                self._update({p: gradients[p] for p in bundle})
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
        return loss

    def _update(self, gradients: dict[Tensor, Tensor]) -> None:
        """A step of the wrapped optimizer over these bf16 parameters as fp32 numbers."""
        sizes = [p.numel() for p in gradients]
        lower = torch.cat([self._lower_of(p) for p in gradients])
        master = join(torch.cat([p.data.reshape(-1) for p in gradients]), lower)
        with _with_data(dict(zip(gradients, master.split(sizes), strict=True))):
            for p, gradient in gradients.items():
                p.grad = gradient.float()
            self.optimizer.step()
            master = torch.cat([p.data.reshape(-1) for p in gradients])
        rounded, lower = split(master)
        parts = zip(gradients, rounded.split(sizes), lower.split(sizes), strict=True)
        for p, upper, rest in parts:
            p.grad = None
            p.copy_(upper.view(p.shape))
            self.lower[p] = rest, p._version

    def _lower_of(self, parameter: Tensor) -> Tensor:
        """Zeros for a parameter that was overwritten since, as load_adapter_weights does."""
        lower, version = self.lower.get(parameter, (None, None))
        if lower is None or version not in (None, parameter._version):
            return torch.zeros(parameter.numel(), dtype=torch.int16, device=parameter.device)
        return lower

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the lower halves in parameter order."""
        lower = [self._lower_of(p) if p in self.lower else None for p in _parameters(self)]
        return {**self.optimizer.state_dict(), LOWER: lower}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state of this class, or of an optimizer without master weights."""
        own = {key: value for key, value in state_dict.items() if key != LOWER}
        halves = [p for p in _parameters(self) if p.dtype == torch.bfloat16]
        # optimizers cast what they load to the parameter's dtype
        nothing = {p: torch.zeros((), device=p.device).expand(p.shape) for p in halves}
        with _with_data(nothing):
            self.optimizer.load_state_dict(own)
        # shared with the wrapped optimizer: schedulers change them here
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        saved = zip(_parameters(self), state_dict.get(LOWER, ()), strict=False)
        self.lower = {p: (low.to(p.device), None) for p, low in saved if low is not None}


@contextmanager
def _with_data(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Within the block parameters have these data, of any dtype; afterwards their own."""
    own = {p: p.data for p in values}
    try:
        for p, value in values.items():
            p.data = value.view(p.shape)
        yield
    finally:
        for p, data in own.items():
            p.data = data


def bundles(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours on one device with at most BUNDLE numbers together; a larger one is alone."""
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
