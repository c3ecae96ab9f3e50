"""Lazy logits against those of a linear layer."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from chunks import Sizes, chunks_of, is_lazy
from conftest import DEVICES, axis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from qlora.fast.head import lazy_logits, rows_and_head

VOCAB, DIM = 50, 8
FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


class Case:
    """The same logits lazily and by a linear layer, of hidden states with a gradient each."""

    def __init__(self, dtype: torch.dtype = FP32, *, bias: bool = True, device: str = "cpu"):
        generator = torch.Generator().manual_seed(0)
        hidden, weight, bias_values = (
            torch.randn(shape, generator=generator).to(device, dtype)
            for shape in ((3, 6, DIM), (VOCAB, DIM), (VOCAB,))
        )
        self.head = (weight, bias_values) if bias else (weight,)
        self.labels = torch.randint(VOCAB, (3, 6), generator=generator).to(device)
        self.labels[0, 1:3] = self.labels[2, 4] = -100
        self.inputs = [hidden.clone().requires_grad_() for _ in range(2)]

    def both(self) -> tuple[Any, Tensor]:
        return lazy_logits(self.inputs[0], *self.head), F.linear(self.inputs[1], *self.head)

    def assert_gradients(self, rtol: float = 0, atol: float = 0) -> None:
        """Those of the hidden states are the same; by default to the bit."""
        got, wanted = (x.grad for x in self.inputs)
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, equal_nan=True)


def flat(logits: Any) -> Tensor:
    """A label of each token."""
    return torch.as_tensor(torch.arange(18, device=logits.device) * 5 % VOCAB)


class Twice(torch.autograd.Function):
    """Gets its input from C++, past __torch_function__."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


# ---- materialized by any operation, they are equal bit for bit

# those that a model or a loss does, in any order, of logits (…, vocab)
STEPS: dict[str, Callable[[Any], Any]] = {
    "times": lambda z: 3 * z * 0.5,
    "halved": lambda z: z / 2,
    "softcap": lambda z: torch.tanh(z / 5.0) * 5.0,
    "plus": lambda z: z + 1,
    "float": lambda z: z.float(),
    "contiguous": lambda z: z.contiguous(),
    "last token": lambda z: z[..., -1:, :].clone(),
    "slice": lambda z: z[..., :-1, :],
    "rows": lambda z: z.contiguous().view(-1, VOCAB),
    "reshaped": lambda z: z.reshape(-1, VOCAB),
    "in place": lambda z: z.clone().mul_(2.0),
    "materialized": lambda z: z if z.sum() is not None else None,
}
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda z: z.argmax(-1),
    "softmax": lambda z: z.float().softmax(-1),
    "some words": lambda z: z[..., 3:7],
    "one word": lambda z: z[..., -1],
    "words by a list": lambda z: z[:, :, [1, 2]],
    "rows by a mask": lambda z: z[z.new_ones(3, 6).bool()],
    "new axis": lambda z: z[None],
    "a bool": lambda z: z[True],
    "divides": lambda z: 2.0 / z,
    "times a tensor": lambda z: z * torch.full((VOCAB,), 2, dtype=z.dtype, device=z.device),
    "times zero": lambda z: z * 0,
    "times infinity": lambda z: z * float("inf"),
    "rounded": lambda z: torch.div(z, 2, rounding_mode="floor"),
    "tanh twice": lambda z: z.tanh().tanh(),
    "another last axis": lambda z: z.view(3, 6, 5, 10),
    "sizes in a tuple": lambda z: z.reshape((18, -1)),
    "as integers": lambda z: z.view(torch.int16) if z.dtype == BF16 else z.view(torch.int32),
    "half": lambda z: z.to(torch.float16),
    "to a device": lambda z: z.to(z.device, torch.float32),
    "concatenated": lambda z: torch.cat([z, z[:1]]),
    "vmap": lambda z: torch.vmap(lambda row: row.sum())(z),
    "an autograd function": Twice.apply,
    "one after another": lambda z: Twice.apply(z) if z.sum() is not None else None,
    "compiled": lambda z: torch.compile(lambda z: (z * 2).sum(), backend="eager")(z),
    "numpy": lambda z: torch.from_numpy(z.detach().float().cpu().numpy()),
    "pickled": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "distillation": lambda z: F.kl_div(
        z.log_softmax(-1), z.detach().roll(1, 0).softmax(-1), reduction="sum"
    ),
    "a loss each": lambda z: F.cross_entropy(z.view(-1, VOCAB), flat(z), reduction="none"),
    "class weights": lambda z: F.cross_entropy(z.view(-1, VOCAB), flat(z), z[0, 0].detach().abs()),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), flat(z).view(3, 6)),
    "probabilities": lambda z: F.cross_entropy(z.flatten(0, 1), z.data.softmax(-1).flatten(0, 1)),
    "one label": lambda z: F.cross_entropy(z[1, 1], flat(z)[7]),
    "log-probabilities": lambda z: F.nll_loss(z.log_softmax(-1).view(-1, VOCAB), flat(z)),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", axis(FP32, BF16), ids=str)
@pytest.mark.parametrize("name", [*STEPS, *OPERATIONS])
def test_any_operation_gives_equal_values_and_gradients(name, dtype, device):
    case = Case(dtype, device=device)
    got, wanted = map((STEPS | OPERATIONS)[name], case.both())
    for attribute in ("dtype", "shape", "requires_grad", "device", "ndim"):
        assert getattr(got, attribute) == getattr(wanted, attribute)
    assert got.is_floating_point() == wanted.is_floating_point()
    # CUDA sums this loss in its dtype, by atomic additions in any order: its gradient is compared
    # as it is, not times the loss
    is_atomic = (name, device) == ("classes second", "cuda")
    rtol = 2 * torch.finfo(dtype).eps if is_atomic else 0
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=0, equal_nan=True)
    if wanted.requires_grad:
        for result in (got, wanted):
            (result if is_atomic else result.float().square().sum()).backward()
        case.assert_gradients()


@pytest.mark.parametrize("step", [lambda z: z, *map(STEPS.get, ("times", "softcap"))])
def test_a_gradient_in_the_logits_without_all_of_them(step):
    case = Case()
    lazy, plain = map(step, case.both())
    rows, head = rows_and_head(lazy)
    got = head.gradient(rows[0], lambda z: z.cos())
    torch.testing.assert_close(head.logits(rows[0].detach()), plain[0].detach())
    plain.sin().sum().backward()
    torch.testing.assert_close(got, case.inputs[1].grad[0])


@settings(deadline=None, max_examples=100)
@given(names=st.lists(st.sampled_from([*STEPS]), max_size=5), wide=st.booleans())
def test_any_order_of_steps(names, wide):
    case = Case(FP32 if wide else BF16)
    got, wanted = case.both()
    for name in names:
        if wanted.numel() == 0:
            break
        got, wanted = STEPS[name](got), STEPS[name](wanted)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert not is_lazy(got) or got._like.stride() == wanted.stride()
    assert torch.equal(got, wanted)
    got.sum().backward(), wanted.sum().backward()
    case.assert_gradients()


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_view_shares_memory_and_a_copy_does_not(context):
    for step, shares in (
        (lambda z: z[:, 1:].view(3, -1, VOCAB), True),
        (lambda z: z.reshape(18, VOCAB), True),
        (lambda z: z[:, 1:].contiguous(), False),
        (lambda z: z[:, 1:].reshape(-1, VOCAB), False),
        (lambda z: z * 2, False),
        (lambda z: z.float(), True),
    ):
        case = Case()
        with torch.no_grad():
            lazy, plain = case.both()
            with context():
                parts = step(lazy), step(plain)
            for logits in (lazy, plain):
                logits.fill_(7.0)
            assert torch.equal(*parts) and (parts[0] == 7).all() == shares


def test_copies_files_and_prints_hold_a_tensor():
    case, file = Case(), io.BytesIO()
    lazy, plain = case.both()
    assert repr(lazy) == repr(plain)
    with torch.no_grad():
        lazy, plain = case.both()
        # a step that changes nothing copies nothing
        assert lazy.float() is lazy and lazy.contiguous() is lazy and lazy.to(FP32) is lazy
        torch.save(lazy, file)
        file.seek(0)
        copies = copy.copy(lazy), copy.deepcopy(CausalLMOutput(logits=lazy)).logits
        for made in (*copies, torch.load(file, weights_only=True)):
            assert type(made) is Tensor and torch.equal(made, plain)


@pytest.mark.parametrize("made_in", [nullcontext, torch.no_grad])
@pytest.mark.parametrize("used_in", [nullcontext, torch.no_grad, torch.inference_mode])
def test_gradient_modes_where_they_are_made_and_used(made_in, used_in):
    case = Case()
    with made_in():
        pair = case.both()
    requires = []
    for logits in pair:
        with used_in():
            scaled, loss = logits * 2, F.cross_entropy(logits[0], case.labels[0])
            logits.sum()
        requires.append((logits.requires_grad, scaled.requires_grad, loss.requires_grad))
    assert requires[0] == requires[1]
    assert torch.equal(*pair)
    if made_in is nullcontext:
        pair[0].sum().backward(), pair[1].sum().backward()
        case.assert_gradients()


def test_a_gradient_in_the_logits_themselves():
    case = Case()
    for logits in case.both():
        logits.retain_grad()
        (logits * 2).square().sum().backward()
        assert torch.equal(logits.grad, 8 * logits)
    case.assert_gradients()
    lazy, _ = case.both()
    loss = F.cross_entropy(lazy.flatten(0, 1), case.labels.flatten())
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, lazy)
    raises = pytest.raises(RuntimeError, match=r"not materialized cannot be changed by aten\.zero_")
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), raises:
        lazy.zero_()  # from C++


def test_losses_of_several_steps_of_one_chain_add_up():
    case = Case()
    losses = [(z[:, 1:] * 2).sum() + (z.float() / 3).square().sum() for z in case.both()]
    sum(losses).backward()
    assert torch.equal(*losses)
    case.assert_gradients(rtol=1e-5, atol=1e-5)  # two products with the head, of parts of one


@pytest.mark.parametrize("step", [lambda z: z, lambda z: z * 2, lambda z: z.flatten(0, 1)])
def test_reentrant_checkpointing(step):
    """It computes without a graph, and returns what has one."""
    case, losses = Case(), []
    for make, x in zip((lazy_logits, F.linear), case.inputs, strict=True):
        logits = checkpoint(lambda x, make=make: step(make(x, *case.head)), x, use_reentrant=True)
        assert logits.requires_grad
        losses.append(F.cross_entropy(logits.view(-1, VOCAB), flat(logits)) + logits.sum())
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    case.assert_gradients(rtol=1e-5, atol=1e-5)


# ---- their cross-entropy is computed without them

SCALES: dict[str, Callable[[Any], Any]] = {
    "none": lambda z: z,
    "torch's functions": lambda z: torch.tanh(torch.div(torch.mul(z, 2), 5.0)),
    "Gemma's": lambda z: (torch.tanh(z / 5.0) * 5.0).float(),
    "Cohere's": lambda z: z * 0.0625,
    "all at once": lambda z: ((2 * z / 3).tanh() * -4 / 2).to(FP32),
}
LOSSES: list[Callable[[Any, Tensor], Tensor]] = [
    lambda z, labels: F.cross_entropy(z.float().view(-1, VOCAB), labels.view(-1)),
    lambda z, labels: F.cross_entropy(z.flatten(0, 1), labels.view(-1), reduction="sum"),
    lambda z, labels: F.cross_entropy(
        z.view(3, 2, 3, VOCAB).reshape((-1, VOCAB)), labels.view(-1), label_smoothing=0.1
    ),
    lambda z, labels: F.cross_entropy(
        z.view(-1, VOCAB), labels.where(labels != -100, 7).view(-1), ignore_index=7, reduction="sum"
    ),
]
MODEL_LOSSES: list[Callable[[Any, Tensor], Tensor]] = [
    lambda z, labels: ForCausalLMLoss(z, labels, VOCAB),
    lambda z, labels: ForCausalLMLoss(z, labels, VOCAB, num_items_in_batch=30),
    lambda z, labels: ForCausalLMLoss(z, labels, VOCAB, num_items_in_batch=torch.tensor(30)),
    lambda z, labels: nn.CrossEntropyLoss()(  # of older models
        z[..., :-1, :].contiguous().view(-1, VOCAB), labels[..., 1:].flatten()
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_bias", axis(True, False))
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_losses_without_logits(scale, has_bias, device):
    case = Case(bias=has_bias, device=device)
    for loss_of in (*LOSSES, *MODEL_LOSSES):
        lazy, plain = case.both()
        scaled = scale(lazy)
        losses = [loss_of(z, case.labels) for z in (scaled, scale(plain))]
        assert is_lazy(lazy) and is_lazy(scaled) and losses[0].dtype == losses[1].dtype
        # the same fp32 sums in another order
        is_mean = loss_of in MODEL_LOSSES and device == "cpu"
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0 if is_mean else 1e-6)
        pairs = zip(losses, case.inputs, strict=True)
        gradients = [torch.autograd.grad(loss, x)[0] for loss, x in pairs]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7 if is_mean else 1e-6)


def test_loss_and_backward_make_no_more_than_a_chunk_of_logits():
    case = Case()
    for logits, most in zip(case.both(), (10 * VOCAB, 18 * VOCAB), strict=True):
        with Sizes() as sizes, chunks_of(10 * VOCAB):
            ForCausalLMLoss(logits, case.labels, VOCAB).backward()
        assert max(sizes.seen) == most


def test_no_token_with_a_label_and_labels_that_torch_refuses():
    none = torch.full((18,), -100)
    pair = [z.view(-1, VOCAB) for z in Case().both()]
    for reduction in ("mean", "sum"):  # torch's mean is nan
        losses = [F.cross_entropy(z, none, reduction=reduction) for z in pair]
        torch.testing.assert_close(*losses, rtol=0, atol=0, equal_nan=True)
    for labels in (none.where(none > 0, VOCAB), none[1:], torch.zeros(18)):
        for logits in pair:
            with pytest.raises((IndexError, ValueError, RuntimeError)):
                F.cross_entropy(logits, labels)


def test_16_bit_logits_give_a_16_bit_loss():
    losses = [F.cross_entropy(z.view(-1, VOCAB), flat(z)) for z in Case(BF16).both()]
    assert losses[0].dtype == losses[1].dtype == BF16
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", axis(FP32, BF16, FP64), ids=str)
def test_autocast(dtype, device):
    """Made in it, and used behind it as accelerate does, which makes outputs fp32."""
    case = Case(dtype, device=device)
    with torch.autocast(device, torch.bfloat16):
        pair = case.both()
        inside = [F.cross_entropy(z[0], case.labels[0]) for z in pair]
    outputs = [CausalLMOutput(logits=z) for z in pair]
    wide = [convert_outputs_to_fp32(lambda o=o: o)().logits for o in outputs]
    for one, other in (pair, wide, inside):
        assert one.dtype == other.dtype
    behind = [F.cross_entropy(z[0], case.labels[0]) for z in wide]
    assert is_lazy(pair[0]) and is_lazy(wide[0])
    for losses in (inside, behind):
        # logits in bf16, but those of the plain path were rounded to it
        torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    assert torch.equal(*pair)
    sum(behind).backward()
    case.assert_gradients(atol=2e-2)  # 8 bits of 18 * 50 numbers
