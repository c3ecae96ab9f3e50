"""Logits that are not made until somebody looks, against those that a linear layer makes."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from chunks import Sizes, chunks_of
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from qlora.fast.head import LazyLogits, lazy_logits

VOCAB, DIM = 50, 8
FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


class Case:
    """The same logits both ways, of hidden states that each have their own gradient."""

    def __init__(self, dtype: torch.dtype = FP32, *, bias: bool = True, device: str = "cpu"):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(3, 6, DIM, generator=generator).to(device, dtype)
        self.weight = torch.randn(VOCAB, DIM, generator=generator).to(device, dtype)
        self.bias = torch.randn(VOCAB, generator=generator).to(device, dtype) if bias else None
        self.labels = torch.randint(VOCAB, (3, 6), generator=generator).to(device)
        self.labels[0, 1:3] = self.labels[2, 4] = -100
        self.inputs = [hidden.clone().requires_grad_() for _ in range(2)]

    def both(self) -> tuple[Any, Tensor]:
        lazy = lazy_logits(self.inputs[0], self.weight, self.bias)
        return lazy, F.linear(self.inputs[1], self.weight, self.bias)

    def gradients(self) -> list[Tensor | None]:
        return [x.grad for x in self.inputs]


def is_lazy(x: Any) -> bool:
    return isinstance(x, LazyLogits) and x.value is None


# ---- looked at in any way, they are what a linear layer makes, bit for bit ----

LOOKS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda z: z.argmax(-1),
    "softmax": lambda z: z.float().softmax(-1),
    "log_softmax": lambda z: F.log_softmax(z[:, -1, :], dim=-1),
    "last token": lambda z: z[:, -1, :].clone(),
    "one token": lambda z: z[0, 2],
    "some words": lambda z: z[..., 3:7],
    "one word": lambda z: z[..., -1],
    "words by a list": lambda z: z[:, :, [1, 2]],
    "rows by a mask": lambda z: z[z.new_ones(3, 6).bool()],
    "new axis": lambda z: z[None],
    "a bool": lambda z: z[True],
    "plus": lambda z: z + 1,
    "from": lambda z: 1 - z,
    "over": lambda z: 2.0 / z,
    "times": lambda z: 3 * z * 0.5,
    "times a tensor": lambda z: z * torch.full((VOCAB,), 2.0).to(z.dtype),
    "times zero": lambda z: z * 0,
    "times infinity": lambda z: z * float("inf"),
    "rounded": lambda z: torch.div(z, 2, rounding_mode="floor"),
    "tanh twice": lambda z: z.tanh().tanh(),
    "softcap": lambda z: torch.tanh(z / 5.0) * 5.0,
    "transposed": lambda z: z.transpose(1, 2),
    "another last axis": lambda z: z.view(3, 6, 5, 10),
    "flat": lambda z: z.view(-1),
    "flattened": lambda z: z.flatten(0, 1),
    "sizes in a tuple": lambda z: z.reshape((18, -1)),
    "reshaped": lambda z: z[:, :-1].reshape(-1, VOCAB),
    "as integers": lambda z: z.view(torch.int16) if z.dtype == BF16 else z.view(torch.int32),
    "half": lambda z: z.to(torch.float16),
    "double": lambda z: z.to(torch.float64),
    "to a device": lambda z: z.to(z.device, torch.float32),
    "concatenated": lambda z: torch.cat([z, z[:1]]),
    "stacked": lambda z: torch.stack(list(z)),
    "where": lambda z: torch.where(z > 0, z, z * 2),
    "scattered": lambda z: z.scatter(-1, z.argmax(-1, keepdim=True), 0.0),
    "as an output": lambda z: torch.add(z.detach(), 1, out=z.detach()),
    "einsum": lambda z: torch.einsum("rtv,rsv->rts", z, z),
    "vmap": lambda z: torch.vmap(lambda row: row.sum())(z),
    "detached": lambda z: z.detach(),
    "data": lambda z: z.data,
    "cloned": lambda z: z.clone(),
    "in place": lambda z: z.mul_(2.0),
    "numbers": lambda z: torch.tensor(z.tolist()),
    "numpy": lambda z: torch.from_numpy(z.detach().float().numpy()),
    "pickled": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "deep copy": lambda z: copy.deepcopy(z.detach()),
    "distillation": lambda z: F.kl_div(
        z.float().log_softmax(-1), z.detach().float().roll(1, 0).softmax(-1), reduction="batchmean"
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_is_seen_is_what_a_layer_makes(look, dtype, device):
    case = Case(dtype, device=device)
    lazy, plain = case.both()
    got, wanted = look(lazy), look(plain)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert got.requires_grad == wanted.requires_grad and got.device == wanted.device
    assert got.is_floating_point() == wanted.is_floating_point() and got.dim() == wanted.dim()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    if wanted.requires_grad:
        for found in (got, wanted):
            found.float().square().sum().backward()
        gradients = case.gradients()
        torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


STEPS: dict[str, Callable[[Any], Any]] = {
    name: LOOKS[name]
    for name in ("softcap", "times", "reshaped", "last token", "plus", "in place", "cloned")
} | {
    "halves": lambda z: z / 2,
    "float": lambda z: z.float(),
    "contiguous": lambda z: z.contiguous(),
    "slice": lambda z: z[..., :-1, :],
    "rows": lambda z: z.view(-1, VOCAB),
}  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(names=st.lists(st.sampled_from(["seen", *STEPS]), max_size=5), in_16_bits=st.booleans())
def test_any_order_of_steps(names, in_16_bits):
    case = Case(BF16 if in_16_bits else FP32)
    got, wanted = case.both()
    for name in names:
        if name in ("reshaped", "last token") and wanted.ndim != 3:
            continue
        if name == "in place":  # of a tensor that is its own
            got, wanted = got.clone(), wanted.clone()
        elif name == "rows":
            got, wanted = got.contiguous(), wanted.contiguous()
        elif name == "seen":
            assert torch.equal(got.sum(), wanted.sum())
        got, wanted = STEPS.get(name, torch.clone)(got), STEPS.get(name, torch.clone)(wanted)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert not is_lazy(got) or got._like.stride() == wanted.stride()
    assert torch.equal(got, wanted)
    got.sum().backward(), wanted.sum().backward()
    assert torch.equal(*case.gradients())


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_view_shares_memory_and_a_copy_does_not(context):
    for step, shares in (
        (lambda z: z.view(-1, VOCAB), True),
        (lambda z: z[:, 1:], True),
        (lambda z: z[:, 1:].view(3, -1, VOCAB), True),
        (lambda z: z.reshape(18, VOCAB), True),
        (lambda z: z[:, 1:].contiguous(), False),
        (lambda z: z[:, 1:].reshape(-1, VOCAB), False),
        (lambda z: z * 2, False),
        (lambda z: z.float(), True),
        (lambda z: z.contiguous(), True),
    ):
        case = Case()
        with torch.no_grad():
            lazy, plain = case.both()
            with context():
                parts = step(lazy), step(plain)
            for logits in (lazy, plain):
                logits.fill_(7.0)
            assert torch.equal(*parts) and (parts[0] == 7).all() == shares


def test_what_does_nothing_returns_the_same():
    lazy, _ = Case().both()
    assert lazy.float() is lazy and lazy.contiguous() is lazy and lazy.to(FP32) is lazy


def test_copies_and_files_hold_a_tensor(capsys):
    case = Case()
    with torch.no_grad():
        lazy, plain = case.both()
        outputs = CausalLMOutput(logits=lazy)
        for made in (copy.copy(lazy), copy.deepcopy(lazy), copy.deepcopy(outputs).logits):
            assert type(made) is Tensor and torch.equal(made, plain)
        file = io.BytesIO()
        torch.save(lazy, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), plain)
    lazy, plain = case.both()
    print(lazy)
    assert repr(lazy) == repr(plain) and str(plain)[:40] in capsys.readouterr().out


@pytest.mark.parametrize("made_in", [nullcontext, torch.no_grad])
@pytest.mark.parametrize("used_in", [nullcontext, torch.no_grad, torch.inference_mode])
def test_gradients_are_asked_for_as_ever(made_in, used_in):
    """Where the logits are made says it, and not where they are looked at."""
    case = Case()
    with made_in():
        pair = case.both()
    found = []
    for logits in pair:
        with used_in():
            scaled = logits * 2
            loss = F.cross_entropy(logits[0], case.labels[0])
            logits.sum()
        found.append((logits.requires_grad, scaled.requires_grad, loss.requires_grad))
    assert found[0] == found[1]
    assert torch.equal(*pair)
    if made_in is nullcontext:
        for logits in pair:
            logits.sum().backward()
        assert torch.equal(*case.gradients())


def test_a_gradient_of_the_logits_themselves():
    case = Case()
    for logits in case.both():
        logits.retain_grad()
        (logits * 2).square().sum().backward()
        assert torch.equal(logits.grad, 8 * logits)
    assert torch.equal(*case.gradients())
    lazy, _ = case.both()
    loss = F.cross_entropy(lazy.flatten(0, 1), case.labels.flatten())
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, lazy)


class Twice(torch.autograd.Function):
    """What comes into it comes from C++."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_a_step_back_to_what_came_before():
    case = Case()
    losses = [(z[:, 1:] * 2).sum() + (z.float() / 3).square().sum() for z in case.both()]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    # the head's products are taken twice, of parts of what its gradient is the sum of
    torch.testing.assert_close(*case.gradients(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen", [True, False])
def test_functions_of_others_get_values_and_give_gradients(seen):
    case = Case()
    found = []
    for logits in case.both():
        if seen:
            logits.sum()
        y = Twice.apply(logits)
        y.square().sum().backward()
        found.append(y)
    assert torch.equal(*found) and torch.equal(*case.gradients())


@pytest.mark.parametrize("step", [lambda z: z, lambda z: z * 2, lambda z: z.flatten(0, 1)])
def test_made_in_a_function_that_has_the_gradient_itself(step):
    """Re-entrant checkpointing computes without a graph, and hands out what has one."""
    case, found = Case(), []
    for lazily, x in zip((True, False), case.inputs, strict=True):
        make = lazy_logits if lazily else F.linear
        logits = checkpoint(lambda x, make=make: step(make(x, case.weight)), x, use_reentrant=True)
        assert logits.requires_grad
        losses = [F.cross_entropy(logits.view(-1, VOCAB), case.labels.view(-1)), logits.sum()]
        sum(losses).backward()
        found.append(sum(losses))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    torch.testing.assert_close(*case.gradients(), rtol=1e-5, atol=1e-5)


def test_operations_below_python_may_not_change_what_is_not_there():
    lazy, _ = Case().both()
    raises = pytest.raises(RuntimeError, match=r"not materialized cannot be changed by aten\.zero_")
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), raises:
        lazy.zero_()


def test_compiled_functions_of_them():
    case = Case()
    found = [torch.compile(lambda z: (z * 2).sum(), backend="eager")(z) for z in case.both()]
    assert torch.equal(*found)
    for loss in found:
        loss.backward()
    assert torch.equal(*case.gradients())


# ---- their cross-entropy comes without them ----

SHAPES: dict[str, Callable[[Any], Any]] = {
    "transformers'": lambda z: z.float().view(-1, VOCAB),
    "flattened": lambda z: z.flatten(0, 1),
    "reshaped": lambda z: z.reshape(-1, VOCAB),
    "one dimension more": lambda z: z.view(3, 2, 3, VOCAB).view((-1, VOCAB)),
    "a torch function": lambda z: torch.tanh(torch.div(torch.mul(z, 2), 5.0)).view(-1, VOCAB),
    "Gemma's": lambda z: (torch.tanh(z / 5.0) * 5.0).float().view(-1, VOCAB),
    "Cohere's": lambda z: (z * 0.0625).view(-1, VOCAB),
    "Granite's": lambda z: (z / 8.0).view(-1, VOCAB),
    "all at once": lambda z: ((2 * z / 3).tanh() * -4 / 2).to(FP32).view(-1, VOCAB),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cross_entropy_without_logits(shape, has_bias, device):
    case = Case(bias=has_bias, device=device)
    labels = case.labels.view(-1)
    for settings_ in (
        {},
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"ignore_index": int(labels[0]), "reduction": "sum"},
    ):
        chosen = labels if "ignore_index" not in settings_ else labels.clamp_min(0)
        lazy, plain = case.both()
        logits = shape(lazy)
        got = F.cross_entropy(logits, chosen, **settings_)
        wanted = F.cross_entropy(shape(plain), chosen, **settings_)
        assert is_lazy(lazy) and is_lazy(logits) and got.dtype == wanted.dtype
        # the same sums in fp32, in another order
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        gradients = [
            torch.autograd.grad(loss, x)[0]
            for loss, x in zip((got, wanted), case.inputs, strict=True)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_items", [None, 30, torch.tensor(30)])
@pytest.mark.parametrize("shifted", [True, False])
def test_loss_of_transformers(num_items, shifted):
    """Of the older kind, that shifts the logits, and of today's."""
    case = Case()
    found = []
    for logits in case.both():
        if shifted:
            loss = nn.CrossEntropyLoss()(
                logits[..., :-1, :].contiguous().view(-1, VOCAB), case.labels[..., 1:].flatten()
            )
        else:
            loss = ForCausalLMLoss(logits, case.labels, VOCAB, num_items_in_batch=num_items)
        loss.backward()
        found.append(loss)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    torch.testing.assert_close(*case.gradients(), rtol=1e-5, atol=1e-7)


def test_they_are_not_made_for_it_nor_in_backward():
    case = Case()
    lazy, plain = case.both()
    for logits, most in ((lazy, 10 * VOCAB), (plain, 18 * VOCAB)):
        with Sizes() as sizes, chunks_of(10 * VOCAB):
            ForCausalLMLoss(logits, case.labels, VOCAB).backward()
        assert max(sizes.seen) == most


def test_where_no_token_has_a_label():
    case = Case()
    labels = torch.full((18,), -100)
    for reduction in ("mean", "sum"):  # torch's mean is nan
        found = [F.cross_entropy(z.view(-1, VOCAB), labels, reduction=reduction)
                 for z in case.both()]  # fmt: skip
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


MADE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a loss each": lambda z, y: F.cross_entropy(z.view(-1, VOCAB), y.view(-1), reduction="none"),
    "class weights": lambda z, y: F.cross_entropy(
        z.view(-1, VOCAB), y.view(-1), weight=torch.linspace(0, 1, VOCAB)
    ),
    "classes second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "probabilities": lambda z, y: F.cross_entropy(
        z.view(-1, VOCAB), F.one_hot(y.clamp_min(0).view(-1), VOCAB).float()
    ),
    "one token": lambda z, y: F.cross_entropy(z[1, 1], y[1, 1]),
    "log-probabilities": lambda z, y: F.nll_loss(
        z.log_softmax(-1).view(-1, VOCAB), y.view(-1), ignore_index=-100
    ),
    "nine bits of a label": lambda z, y: F.cross_entropy(
        z.view(-1, VOCAB), y.view(-1).to(torch.int32).long()
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", MADE.values(), ids=MADE)
def test_other_losses_make_them(loss):
    case = Case()
    found = [loss(z, case.labels) for z in case.both()]
    for got in found:
        got.sum().backward()
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*case.gradients(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "labels", [torch.full((18,), VOCAB), torch.zeros(17, dtype=torch.long), torch.zeros(18)]
)
def test_labels_that_torch_refuses_are_refused(labels):
    for logits in Case().both():
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            F.cross_entropy(logits.view(-1, VOCAB), labels)


# ---- mixed precision ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=["fp32", "bf16", "fp64"])
def test_autocast(dtype, device):
    """Made in it and looked at behind it, as accelerate has it."""
    case = Case(dtype, device=device)
    with torch.autocast(device, torch.bfloat16):
        lazy, plain = case.both()
        assert lazy.dtype == plain.dtype
        inside = [F.cross_entropy(z[0], case.labels[0]) for z in (lazy, plain)]
    assert is_lazy(lazy) and inside[0].dtype == inside[1].dtype
    behind = [F.cross_entropy(z.float()[0], case.labels[0]) for z in (lazy, plain)]
    for got, wanted in (inside, behind):
        # logits in bf16, but those of the plain path were rounded to it
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=0)
    assert torch.equal(lazy, plain)
    for loss in behind:
        loss.backward()
    # what 8 bits of 18 * 50 numbers make of it
    torch.testing.assert_close(*case.gradients(), rtol=0, atol=2e-2)


def test_outputs_made_fp32_by_accelerate():
    case = Case(BF16)
    lazy, plain = case.both()
    outputs = convert_outputs_to_fp32(lambda: CausalLMOutput(logits=lazy))()
    assert is_lazy(outputs.logits) and torch.equal(outputs.logits, plain.float())


def test_16_bits_give_a_loss_of_16_bits():
    case = Case(BF16)
    found = [F.cross_entropy(z.view(-1, VOCAB), case.labels.view(-1)) for z in case.both()]
    assert found[0].dtype == found[1].dtype == BF16
    torch.testing.assert_close(*found)
