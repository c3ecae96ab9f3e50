"""bf16 parameters with master weights are trained as fp32 ones, bit for bit, also resumed."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from conftest import on_gpu
from reference import nearest_bf16
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.optimization import Adafactor

from qlora.training import optimizers
from qlora.training.optimizers import MasterWeights, join, keep_updates, loses_updates, split

RATE = 3e-4
Make = Callable[[list[Any]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw_torch": lambda ps: AdamW(ps, RATE, weight_decay=0.1),
    "adamw_torch_fused": lambda ps: AdamW(ps, RATE, fused=True),
    "adagrad": lambda ps: Adagrad(ps, RATE),
    "sgd": lambda ps: SGD(ps, RATE, momentum=0.9),
    "rmsprop": lambda ps: RMSprop(ps, RATE),
    "adafactor": lambda ps: Adafactor(ps, RATE, scale_parameter=False, relative_step=False),
    "adamw_8bit": lambda ps: bnb.optim.AdamW8bit(ps, RATE, weight_decay=0.1),
    "adamw_bnb": lambda ps: bnb.optim.AdamW(ps, RATE),
    "lion_8bit": lambda ps: bnb.optim.Lion8bit(ps, RATE),
    "ademamix": lambda ps: bnb.optim.AdEMAMix(ps, RATE),
}
PAGED: dict[str, Make] = {
    "paged_adamw_8bit": lambda ps: bnb.optim.PagedAdamW8bit(ps, RATE),
    "paged_adamw_32bit": lambda ps: bnb.optim.PagedAdamW32bit(ps, RATE),
    "paged_lion_8bit": lambda ps: bnb.optim.PagedLion8bit(ps, RATE),
}
SHAPES = {"A": (8, 704), "B": (640, 8), "small": (5, 3), "gain": (640,), "idle": (4, 4)}


def start(device: str = "cpu", scale: int = 1) -> dict[str, nn.Parameter]:
    """A and B of a layer and others, in bf16 except the gain."""
    draw, named = torch.Generator().manual_seed(0), {}
    for name, shape in SHAPES.items():
        value = torch.randn([size * scale if size > 8 else size for size in shape], generator=draw)
        dtype = torch.float32 if name == "gain" else torch.bfloat16
        named[name] = nn.Parameter((0.04 * value).to(device, dtype))
    return named


def loss(named: dict[str, Tensor], seed: int = 0) -> Tensor:
    """The loss of one batch, which depends on all parameters but "idle"."""
    A, B, draw = named["A"], named["B"], torch.Generator().manual_seed(seed)
    x = torch.randn(4, A.shape[1], generator=draw).to(A)
    y = F.linear(F.linear(x, A), B).float() * (1 + named["gain"])
    return F.mse_loss(y, x[:, : y.shape[1]].float()) + named["small"].float().square().sum()


def train(named: dict[str, nn.Parameter], optimizer: Any, steps: range) -> None:
    for step in steps:
        loss(named, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_in_fp32(named: dict[str, nn.Parameter], make: Make, steps: int) -> dict[str, Tensor]:
    """The oracle: fp32 weights, rounded for the forward pass, get the bf16 weights' gradients."""
    masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in named.items()}
    optimizer = make(list(masters.values()))
    for step in range(steps):
        rounded: dict[str, Any] = {
            name: (master.detach() if name == "gain" else nearest_bf16(master)).requires_grad_()
            for name, master in masters.items()
        }
        loss(rounded, step).backward()
        for name, master in masters.items():
            gradient = rounded[name].grad
            master.grad = None if gradient is None else gradient.float()
        optimizer.step()
    return {name: master.detach() for name, master in masters.items()}


def masters_of(named: dict[str, nn.Parameter], optimizer: Any) -> dict[str, Tensor]:
    """The fp32 numbers of halves that an optimizer holds."""
    masters = {name: p.detach().float() for name, p in named.items()}
    for name, p in named.items():
        if p in optimizer.lower:
            masters[name] = join(p.detach(), optimizer.lower[p][0].view(p.shape))
    return masters


def require_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def bits(count: int = 1 << 18) -> Tensor:
    edges = [0x7FFFFFFF, -1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, -(2**31), 0, 1, 0x8000, 0x18000]
    edges += [0x3F808000, 0x3F818000, 0x3F7F8000, 0x3F807FFF, 0x3F808001]  # ties, and beside them
    drawn = np.random.default_rng(0).integers(-(2**31), 2**31, count)
    return torch.from_numpy(np.concatenate([drawn, edges]).astype(np.int32)).view(torch.float32)


def test_halves_are_exact_and_the_upper_is_the_nearest():
    master = bits()
    numbers = ~master.isnan()
    upper, lower = split(master)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    joined = join(upper, lower)
    assert torch.equal(joined.view(torch.int32)[numbers], master.view(torch.int32)[numbers])
    assert not upper[~numbers].isfinite().any()  # NaN stays NaN: a diverged run is noticed
    assert torch.equal(join(upper, torch.zeros_like(lower))[numbers], upper.float()[numbers])
    # the upper half is the nearest bf16 number
    master = master[(master.abs() > 2.0**-126) & (master.abs() < 2.0**127)]  # normal
    upper, _ = split(master)
    assert torch.equal(upper, nearest_bf16(master))
    tie = master.view(torch.int32) & 0xFFFF == 0x8000  # torch rounds ties to even
    assert tie.sum() >= 4 and torch.equal(upper[~tie], master.bfloat16()[~tie])


@pytest.mark.parametrize("size", [5500, 1 << 21])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_fp32_weights_and_resumes(name, size, monkeypatch, tmp_path):
    """Bit for bit, in several bundles, of fewer numbers than A and more than B and "small"; and in
    one, where bitsandbytes updates A and B together."""
    monkeypatch.setattr("qlora.training.optimizers.BUNDLE", size)
    make, named = OPTIMIZERS[name], start()
    in_fp32 = train_in_fp32(named, make, 25)
    optimizer = keep_updates(make(list(named.values())))
    before = {n: p.detach().clone() for n, p in named.items()}
    train(named, optimizer, range(25))
    require_equal(masters_of(named, optimizer), in_fp32)
    assert {n: p.dtype for n, p in named.items()} == {n: p.dtype for n, p in before.items()}
    assert [n for n in named if torch.equal(named[n], before[n])] == ["idle"]
    assert torch.equal(named["A"], nearest_bf16(in_fp32["A"]))

    state = optimizer.state_dict()
    files = [tmp_path / "optimizer.pt", tmp_path / "inner.pt"]
    torch.save(state, files[0])
    torch.save({k: v for k, v in state.items() if k != "lower_halves"}, files[1])
    lower_bytes = files[0].stat().st_size - files[1].stat().st_size
    assert 0 <= lower_bytes - 2 * sum(named[n].numel() for n in ("A", "B", "small")) < 4096
    again = {n: nn.Parameter(p.detach().clone()) for n, p in named.items()}
    resumed = keep_updates(make(list(again.values())))
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert all(p.dtype == named[n].dtype for n, p in again.items())
    for parameters, one in ((named, optimizer), (again, resumed)):
        train(parameters, one, range(25, 31))
    require_equal(masters_of(again, resumed), masters_of(named, optimizer))


def test_step_keeps_gradients_and_storage_and_evaluates_a_closure():
    named = start()
    loss(named).backward()
    before = {n: (p.data_ptr(), p.grad, p._version) for n, p in named.items()}
    optimizer = keep_updates(AdamW(named.values(), RATE))

    def closure() -> float:
        optimizer.zero_grad(set_to_none=False)
        total = loss(named)
        total.backward()
        return total.item()

    assert optimizer.step(closure) > 0
    for n, p in named.items():
        address, gradient, version = before[n]
        assert p.data_ptr() == address and p.grad is gradient
        assert (p._version > version) == (n != "idle")  # autograd sees the change


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "ademamix", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_waits_for_the_gpu_once_a_step(name, dtype, monkeypatch):
    waits: list[Any] = []
    for module in (bnb.optim.optimizer, optimizers):
        monkeypatch.setattr(module, "sync_gpu", waits.append)
    # those of a GPU are wrapped in any dtype
    monkeypatch.setattr(optimizers, "SLOW_ON", "cpu")
    named = {n: nn.Parameter(p.detach().to(dtype)) for n, p in start().items()}
    optimizer = keep_updates({**OPTIMIZERS, **PAGED}[name](list(named.values())))
    before = {n: p.detach().clone() for n, p in named.items()}
    train(named, optimizer, range(3))
    assert len(waits) == (3 if name.startswith("paged") else 0)
    assert [n for n in named if torch.equal(named[n], before[n])] == ["idle"]


@pytest.mark.parametrize(("name", "updates"), [("adamw_8bit", [2, 1, 1]), ("adamw_bnb", [3, 1]),
                                               ("ademamix", [1, 1, 1, 1])])  # fmt: skip
def test_bitsandbytes_updates_a_bundle_in_one_launch(name, updates, monkeypatch):
    """A and B have 8-bit states, "small" has one in fp32."""
    named = start()
    optimizer = keep_updates(OPTIMIZERS[name](list(named.values())))
    update, seen = type(optimizer.optimizer).update_step, list[int]()

    def counted(self: Any, group: Any, p: Any, *rest: int) -> None:
        seen.append(p.numel())
        update(self, group, p, *rest)

    monkeypatch.setattr(type(optimizer.optimizer), "update_step", counted)
    train(named, optimizer, range(2))
    sizes = iter(p.numel() for n, p in named.items() if n != "idle")
    assert seen == 2 * [sum(next(sizes) for _ in range(count)) for count in updates]


def test_bundles_keep_overrides_and_parameters_without_a_gradient(monkeypatch):
    """The states of A and C lie together until C, as an expert without tokens, has no gradient in a
    step; B's is in fp32. Bit for bit as those of single parameters."""
    trained = []
    for size in (1, 1 << 21):
        monkeypatch.setattr("qlora.training.optimizers.BUNDLE", size)
        named = start()
        named = {"A": named.pop("A"), "C": nn.Parameter(named["B"].detach().T.clone()), **named}
        optimizer = keep_updates(bnb.optim.AdamW8bit(list(named.values()), RATE))
        monkeypatch.setitem(optimizer.optimizer.mng.index2config, (0, 2), {"optim_bits": 32})
        for step in range(5):
            named["C"].requires_grad_(step != 3)
            (loss(named, step) + named["C"].float().square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(masters_of(named, optimizer))
        states = [optimizer.state[named[name]] for name in ("A", "C", "B")]
        assert [state["step"] for state in states] == [5, 4, 5]
        assert [state["state1"].element_size() for state in states] == [1, 1, 4]
    require_equal(*trained)


class PagedMemory(TorchDispatchMode):
    """Memory that bitsandbytes pages. torch takes it for the CPU's, and raises where an operation
    has a tensor of it beside a GPU's, but for copies; bitsandbytes raises unless it is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[Any] = []

    def get(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Any:
        tensor: Any = torch.zeros(size, dtype=dtype).view(size)
        tensor.is_paged, tensor.page_deviceid = True, device.index
        self.storages.append(tensor.untyped_storage())
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(storage.data_ptr() == address for storage in self.storages)

    def update(self, optimizer: Any, step: Any, group: Any, p: Tensor, *place: int) -> None:
        with _disable_current_modes():
            states = [value for key, value in optimizer.state[p].items() if key[:5] == "state"]
            assert all(hasattr(state, "is_paged") == self.holds(state) for state in states)
            step(group, p, *place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {self.holds(tensor) for tensor in tensors}
        assert len(devices) < 2 or "copy" in func.name(), f"{func}: tensors of two devices"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("paged_from", [2000, 5500, 10_000])
@pytest.mark.parametrize("name", PAGED)
def test_paged_states_train_as_others(name, paged_from, monkeypatch):
    """Bit for bit as those of single parameters on a CPU, with an expert that has no gradient in a
    step, and resumed, which moves states to the GPU. Those of A, B and C alone are large enough to
    page, of A alone, or of two together."""
    trained, memory = [], PagedMemory()
    monkeypatch.setattr(optimizers, "get_paged", memory.get)
    monkeypatch.setattr(optimizers, "PAGED_FROM", paged_from)
    for is_paged in (False, True):
        monkeypatch.setattr(optimizers, "SLOW_ON", "cpu" if is_paged else "cuda")
        monkeypatch.setattr(optimizers, "BUNDLE", 1 << 21 if is_paged else 1)
        named = start()
        named = {"A": named.pop("A"), "C": nn.Parameter(named["B"].detach().T.clone()), **named}
        inner: Any = PAGED[name](list(named.values()))
        monkeypatch.setattr(inner, "update_step", partial(memory.update, inner, inner.update_step))
        monkeypatch.setattr(inner, "prefetch_state", lambda _: None)
        optimizer: Any = keep_updates(inner)
        counts = []
        for step in range(6):
            named["C"].requires_grad_(step != 2)
            (loss(named, step) + named["C"].float().square().sum()).backward()
            with memory:
                optimizer.step()
            optimizer.zero_grad()
            counts.append(len(memory.storages))
            if step < 4:
                assert memory.holds(optimizer.state[named["A"]]["state1"]) == is_paged
            if step == 3:
                optimizer.load_state_dict(optimizer.state_dict())
                for state in optimizer.state.values():
                    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
                    state.update(tensors)
        assert counts[0] == counts[3] and counts[4] == counts[5]  # paged memory is never freed
        trained.append(masters_of(named, optimizer))
    require_equal(*trained)


def test_error_within_a_step_changes_nothing():
    named = start()
    inner = SGD([named["A"], named["B"]], RATE)
    inner.step = Mock(side_effect=RuntimeError("out of memory"))
    optimizer = keep_updates(inner)
    loss(named).backward()
    before = {n: (p.detach().clone(), p.grad) for n, p in named.items()}
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for n, p in named.items():
        assert torch.equal(p, before[n][0]) and p.dtype == before[n][0].dtype
        assert p.grad is before[n][1]


def test_schedules_and_new_groups_reach_the_optimizer():
    named = start()
    inner = AdamW([named["A"]], RATE)
    optimizer = keep_updates(inner)
    optimizer.add_param_group({"params": [named["B"]], "lr": 4 * RATE})
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 1)
    before = named["B"].detach().clone()
    train(named, optimizer, range(1))
    schedule.step()
    assert [group["lr"] for group in inner.param_groups] == [RATE / 2, 2 * RATE]
    assert not torch.equal(named["B"], before) and named["B"] in inner.state
    assert optimizer.state is inner.state


def test_optimizers_that_are_not_wrapped():
    in_fp32 = AdamW([nn.Parameter(torch.ones(3))], RATE)
    assert keep_updates(in_fp32) is in_fp32 and not loses_updates(in_fp32)
    halves = [nn.Parameter(torch.ones(3).bfloat16())]
    lbfgs = torch.optim.LBFGS(halves)  # an update depends on the gradients of all parameters
    assert keep_updates(lbfgs) is lbfgs and loses_updates(lbfgs)
    wrapped = keep_updates(SGD(halves))
    assert isinstance(wrapped, MasterWeights)
    assert keep_updates(wrapped) is wrapped and not loses_updates(wrapped)


def test_state_without_lower_halves_is_loaded():
    """A state with bf16 moments, of an optimizer without master weights: they become fp32."""
    named = start()
    plain = AdamW(named.values(), RATE)
    train(named, plain, range(3))
    optimizer = keep_updates(AdamW(named.values(), RATE))
    optimizer.load_state_dict(plain.state_dict())
    moment = optimizer.state[named["A"]]["exp_avg"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, plain.state[named["A"]]["exp_avg"].float())
    train(named, optimizer, range(3, 5))


def test_overwritten_parameter_loses_its_lower_half():
    named = start()
    optimizer: Any = keep_updates(SGD(named.values(), RATE))
    train(named, optimizer, range(3))
    assert optimizer.lower[named["A"]][0].any()
    with torch.no_grad():
        named["A"].copy_(torch.ones_like(named["A"]))
    saved = optimizer.state_dict()["lower_halves"]
    assert not saved[0].any() and saved[1].any()
    named["A"].grad = torch.zeros_like(named["A"])
    optimizer.step()
    assert torch.equal(masters_of(named, optimizer)["A"], torch.ones(SHAPES["A"]))


@on_gpu
@pytest.mark.parametrize("name", [*OPTIMIZERS, *PAGED])
def test_training_on_a_gpu_is_that_of_fp32_weights(name):
    """With parameters of more than 1e5 numbers, which bitsandbytes pages."""
    make, named = {**OPTIMIZERS, **PAGED}[name], start("cuda", scale=32)
    in_fp32 = train_in_fp32(named, make, 10)
    optimizer = keep_updates(make(list(named.values())))
    train(named, optimizer, range(10))
    require_equal(masters_of(named, optimizer), in_fp32)
    optimizer.load_state_dict(optimizer.state_dict())
    train(named, optimizer, range(10, 12))
    assert all(p.isfinite().all() for p in named.values())
