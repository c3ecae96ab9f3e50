"""Master weights in fp32 for parameters in bf16, for 2 bytes a parameter.

A bf16 number has 8 bits of mantissa: an update below 2^-9 of it is rounded away. At a rate of 3e-4
a fifth of the updates of a LoRA's A are, and most as the rate falls (benchmarks/adapter_dtype.py).
So the sum is kept in fp32, and its bits in two places: the parameter is the fp32 number rounded to
bf16, and beside it lie the lower 16 bits, an int16

    master = parameter * 2^16 + lower      of their bits, as integers; lower in [-2^15, 2^15)

which is exact both ways: read as a signed number, the lower half is what rounding to the nearest
left over (of a tie, always away from zero). Split-SGD keeps weights in halves (arXiv:2005.04680).

For a step the parameters become fp32 numbers, a few million at a time, with their gradients; the
optimizer, any that goes parameter by parameter, then works on those in place, unaware. Its own
state is in fp32 then as well, which torch's would else keep in bf16.

Cost: 2 bytes a parameter beside what the optimizer keeps, about 32 MiB during a step, and a few
passes over the parameters. Left out: stochastic rounding, which needs no memory but kernels of its
own, and keeps updates on average only; and fp32 parameters, which with their gradients take 4 bytes
more and a cast in every forward pass.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from transformers.optimization import Adafactor

# Those in which a parameter's update depends on nothing but its own gradient and state, so that
# some can be updated now and others later.
BY_PARAMETER = (Adafactor, Adagrad, Adam, AdamW, Optimizer8bit, RMSprop, SGD)
BUNDLE = 1 << 21  # parameters that are fp32 at once: about 16 bytes each, with their gradients
LOWER = "lower_halves"


def join(parameter: Tensor, lower: Tensor) -> Tensor:
    """The fp32 numbers of their halves (...), bf16 and int16."""
    upper = parameter.view(torch.int16) + (lower >> 15)  # one less where the rest is negative
    return torch.stack([lower, upper], dim=-1).view(torch.float32)[..., 0]  # little-endian


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers (...) rounded to bf16, and what `join` needs besides, int16."""
    lower, upper = master.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
    up = (lower >> 15).masked_fill_(master.isnan(), 0)  # past the last NaN comes -0
    return (upper - up).view(torch.bfloat16), lower.contiguous()


def keep_updates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer` with master weights for its bf16 parameters, or as it is if it has none.

    One that does not go parameter by parameter stays as it is, too: `loses_updates` tells.
    """
    if loses_updates(optimizer) and isinstance(optimizer, BY_PARAMETER):
        return MasterWeights(optimizer)
    return optimizer


def loses_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it adds updates to bf16 numbers."""
    halves = any(p.dtype == torch.bfloat16 for p in _parameters(optimizer))
    return halves and not isinstance(optimizer, MasterWeights)


class MasterWeights(torch.optim.Optimizer):
    """An optimizer whose bf16 parameters are fp32 numbers, rounded."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        # The lower halves (numel,) int16, and the version of the parameter that they belong to;
        # None for one not seen yet. Without lower halves a parameter is what it is.
        self.lower: dict[Tensor, tuple[Tensor, int | None]] = {}
        self.load_state_dict(optimizer.state_dict())  # some have one from the start, in bf16

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient; gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {p: p.grad for p in _parameters(self) if p.grad is not None}
        halves = [p for p in gradients if p.dtype == torch.bfloat16]
        others = gradients.keys() - set(halves)
        try:
            # an optimizer passes over a parameter without gradient
            for p in halves:
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
        """A step over these bf16 parameters as fp32 numbers."""
        sizes = [p.numel() for p in gradients]
        lower = torch.cat([self._lower_of(p) for p in gradients])
        master = join(torch.cat([p.data.reshape(-1) for p in gradients]), lower)
        with _standing_in(dict(zip(gradients, master.split(sizes), strict=True))):
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
        """Zeros for a parameter that was overwritten since, by load_adapter_weights say."""
        lower, version = self.lower.get(parameter, (None, None))
        if lower is None or version not in (None, parameter._version):
            return torch.zeros(parameter.numel(), dtype=torch.int16, device=parameter.device)
        return lower

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the lower halves in the order of the parameters."""
        lower = [self._lower_of(p) if p in self.lower else None for p in _parameters(self)]
        return {**self.optimizer.state_dict(), LOWER: lower}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also one of an optimizer without master weights."""
        own = {key: value for key, value in state_dict.items() if key != LOWER}
        halves = [p for p in _parameters(self) if p.dtype == torch.bfloat16]
        # optimizers cast what they load to the parameter's dtype
        nothing = {p: torch.zeros((), device=p.device).expand(p.shape) for p in halves}
        with _standing_in(nothing):
            self.optimizer.load_state_dict(own)
        # groups and state are the wrapped optimizer's, so that schedulers change those
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        saved = zip(_parameters(self), state_dict.get(LOWER, ()), strict=False)
        self.lower = {p: (low.to(p.device), None) for p, low in saved if low is not None}


@contextmanager
def _standing_in(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Parameters with other data, of any dtype, and afterwards with their own."""
    own = {p: p.data for p in values}
    try:
        for p, value in values.items():
            p.data = value.view(p.shape)
        yield
    finally:
        for p, data in own.items():
            p.data = data


def bundles(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours on one device, of at most BUNDLE numbers together; a larger one is alone."""
    for _, neighbours in groupby(parameters, key=lambda p: p.device):
        held: list[Tensor] = []
        room = BUNDLE
        for p in neighbours:
            if held and p.numel() > room:
                yield held
                held, room = [], BUNDLE
            held.append(p)
            room -= p.numel()
        yield held


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
