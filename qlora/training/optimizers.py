"""Master weights in fp32 for bf16 parameters, at 2 bytes a parameter; and steps of bitsandbytes'
optimizers in few launches, without waits for the GPU.

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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from bitsandbytes.functional import get_paged
from bitsandbytes.optim.optimizer import Optimizer8bit
from bitsandbytes.utils import sync_gpu
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from transformers.optimization import Adafactor

# Optimizers whose update of a parameter depends only on its own gradient and state.
BY_PARAMETER = (Adafactor, Adagrad, Adam, AdamW, Optimizer8bit, RMSprop, SGD)
BUNDLE = 1 << 21  # numbers in fp32 at once: about 16 bytes each, with their gradients
BLOCK = 256  # values of a block of bitsandbytes' 8-bit states
PAGED_FROM = 100_000  # values of a state that bitsandbytes pages
LOWER = "lower_halves"
SLOW_ON = "cuda"  # bitsandbytes' steps


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

        bf16 parameters, and all of bitsandbytes' optimizers, are updated a bundle at a time; the
        wrapped optimizer steps once for the others. It skips parameters whose gradient is None.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        gradients = {p: p.grad for p in _parameters(self) if p.grad is not None}
        is_bnb = isinstance(self.optimizer, Optimizer8bit)
        others = [p for p in gradients if p.dtype != torch.bfloat16 and not is_bnb]
        bundled = gradients.keys() - set(others)
        try:
            for p in bundled:
                p.grad = None
            if others:
                self.optimizer.step()
            for p in others:
                p.grad = None
            for group in self.param_groups:
                for bundle in bundles(p for p in group["params"] if p in bundled):
                    self._update(bundle, gradients)
            if getattr(self.optimizer, "is_paged", False) and gradients:
                sync_gpu(next(iter(gradients)))  # its state is in memory that the host shares
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
        return loss

    def _update(self, bundle: list[Tensor], gradients: dict[Tensor, Tensor]) -> None:
        """Update the parameters of a bundle, all of one dtype, as one fp32 vector (N,)."""
        sizes, is_split = [p.numel() for p in bundle], bundle[0].dtype == torch.bfloat16
        master = torch.cat([p.data.reshape(-1) for p in bundle])
        if is_split:
            master = join(master, torch.cat([self._lower_of(p) for p in bundle]))
        in_fp32 = torch.cat([gradients[p].reshape(-1) for p in bundle]).float()
        with _with_data(dict(zip(bundle, master.split(sizes), strict=True))):
            for p, gradient in zip(bundle, in_fp32.split(sizes), strict=True):
                p.grad = gradient.view(p.shape)
            if isinstance(self.optimizer, Optimizer8bit):
                step_bitsandbytes(self.optimizer, bundle, master, in_fp32)
            else:
                self.optimizer.step()
        upper, lower = split(master) if is_split else (master, None)
        values = [h.view(p.shape) for p, h in zip(bundle, upper.split(sizes), strict=True)]
        torch._foreach_copy_(bundle, values)
        for p in bundle:
            p.grad = None
        if lower is not None:
            for p, low in zip(bundle, lower.split(sizes), strict=True):
                self.lower[p] = low, p._version

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


def step_bitsandbytes(
    optimizer: Any, bundle: list[Tensor], whole: Tensor, gradient: Tensor
) -> None:
    """`optimizer.step()` for parameters of one group, which are slices of `whole` (N,) as their
    gradients are of `gradient` (N,): one launch for successive ones whose states can lie together,
    and no wait for the GPU, where bitsandbytes has one of each for every parameter."""
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    groups = enumerate(optimizer.param_groups)
    i, group = next((i, g) for i, g in groups if any(p is bundle[0] for p in g["params"]))
    place = {p: j for j, p in enumerate(group["params"])}
    special, kinds, end = optimizer.mng.index2config, dict[Tensor, Any](), 0
    for p in bundle:
        if not optimizer.state[p]:
            with _unpaged(optimizer):  # states are paged once they lie together
                optimizer.init_state(group, p, i, place[p])
        is_special = (i, place[p]) in special
        kinds[p] = id(p) if is_special else _kind(optimizer.state[p], p, end)
        end += p.numel()
    end = 0
    for _, run in groupby(bundle, key=kinds.__getitem__):
        parameters = list(run)
        start, end = end, end + sum(p.numel() for p in parameters)
        states, vector = [optimizer.state[p] for p in parameters], parameters[0]
        if len(parameters) > 1:
            vector = nn.Parameter(whole[start:end], requires_grad=False)
            vector.grad = gradient[start:end]
        optimizer.state[vector] = {name: _together(optimizer, states, name) for name in states[0]}
        optimizer.prefetch_state(vector)
        optimizer.update_step(group, vector, i, place[parameters[0]])
        if len(parameters) > 1:
            step = optimizer.state.pop(vector)["step"]
            for p in parameters:
                optimizer.state[p]["step"] = step


def _kind(state: Mapping[str, Any], parameter: Tensor, start: int) -> Any:
    """Equal for successive parameters whose states can be updated as those of one vector: none of
    them lies with others yet, or they are successive slices. `start`: of the parameter, in its
    bundle."""
    first, size = state["state1"], parameter.numel()
    is_whole_blocks = first.dtype != torch.uint8 or size % BLOCK == 0
    # AdEMAMix has two in state1; unorm_vec is of the norm of one parameter
    if first.numel() != size or not is_whole_blocks or "unorm_vec" in state:
        return id(parameter)
    place = first._base is not None and (id(first._base), first.storage_offset() - start)
    return first.dtype, state["step"], place, *state


def _together(optimizer: Any, states: Sequence[dict[str, Any]], name: str) -> Any:
    """One value of a state of several parameters; those of `states` are, or become, its slices.

    It is paged, if bitsandbytes would page as many. Paged memory is never freed and torch takes it
    for the CPU's: what once lies in it is never moved.
    """
    parts = [state[name] for state in states]
    first = parts[0]
    if name in ("step", "qmap1", "qmap2"):
        return first
    sizes = [part.numel() for part in parts]
    if len(parts) > 1 and first._base is not None:  # `_kind`: successive slices
        start = first.storage_offset()
        return _marked(first._base[start : start + sum(sizes)], first)
    can_page = optimizer.is_paged and name.startswith("state") and first.device.type == SLOW_ON
    is_paged = can_page and sum(sizes) >= PAGED_FROM and not hasattr(first, "is_paged")
    if len(parts) == 1 and not is_paged:
        return first
    whole = torch.cat([part.reshape(-1) for part in parts])
    if is_paged:
        whole = get_paged(len(whole), dtype=whole.dtype, device=whole.device).copy_(whole)
    for state, part, own in zip(states, parts, whole.split(sizes), strict=True):
        state[name] = _marked(own.view(part.shape), whole)
    return whole if len(parts) > 1 else states[0][name]


def _marked(tensor: Tensor, source: Tensor) -> Tensor:
    """`tensor`, a view of `source`, marked as bitsandbytes marks paged tensors if that one is."""
    for mark in ("is_paged", "page_deviceid"):
        if hasattr(source, mark):
            setattr(tensor, mark, getattr(source, mark))
    return tensor


@contextmanager
def _unpaged(optimizer: Any) -> Iterator[None]:
    before, optimizer.is_paged = optimizer.is_paged, False
    try:
        yield
    finally:
        optimizer.is_paged = before


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
    """Successive parameters of one device and dtype with at most BUNDLE numbers; a larger one is
    alone."""
    bundle: list[Tensor] = []
    size = 0
    for p in parameters:
        is_alike = bool(bundle) and (p.device, p.dtype) == (bundle[0].device, bundle[0].dtype)
        if bundle and (not is_alike or size + p.numel() > BUNDLE):
            yield bundle
            bundle, size = [], 0
        bundle.append(p)
        size += p.numel()
    if bundle:
        yield bundle


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
