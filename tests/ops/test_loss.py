"""Linear + cross-entropy in chunks, against a float64 reference and transformers' loss."""

from typing import Any

import pytest
import reference
import torch
from chunks import Sizes, chunks_of
from conftest import DEVICES, axis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qlora.errors import UserError
from qlora.ops import loss as loss_module
from qlora.ops.loss import linear_cross_entropy


def case(
    tokens: int, dim: int, vocab: int, *, masked: float = 0.3, dtype: torch.dtype = torch.float32,
    size: float = 1.0, seed: int = 0, device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Hidden states, a head whose logits have about that standard deviation, its bias, labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * size * dim**-0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = -100
    hidden, weight, bias, labels = (t.to(device) for t in (hidden, weight, bias, labels))
    return hidden.requires_grad_(), weight, bias, labels


def plain_path(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, **how: Any
) -> Tensor:
    """What transformers computes: logits in the dtype of the head, softcapped, the loss in fp32."""
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float(), labels, reduction="sum", **how)


def with_gradient(loss: Tensor, hidden: Tensor, by: float = 1.0) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss * by, hidden)[0] / by


@settings(deadline=None, max_examples=60)
@given(
    inputs=st.builds(
        case, tokens=st.integers(0, 13), dim=st.integers(1, 9), vocab=st.integers(2, 40),
        masked=st.sampled_from([0.0, 0.5, 0.9, 1.0]), size=st.sampled_from([0.1, 1.0, 10.0]),
        seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64]),
    ),
    how=st.builds(
        dict, scale=st.sampled_from([1.0, 0.0625, 1.7]), softcap=st.sampled_from([None, 2.0, 30.0]),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]), ignore_index=st.sampled_from([-100, 1]),
    ),
    has_bias=st.booleans(), chunk_rows=st.integers(1, 14),
)  # fmt: skip
def test_loss_and_gradient_equal_the_reference(inputs, how, has_bias, chunk_rows):
    hidden, weight, bias, labels = inputs
    labels[labels == -100] = how["ignore_index"]
    how["bias"] = bias if has_bias else None
    with chunks_of(len(weight) * chunk_rows, itemsize=weight.itemsize):
        loss = linear_cross_entropy(hidden, weight, labels, **how)
    expected = reference.linear_cross_entropy(hidden, weight, labels, **how)
    values, exact = with_gradient(loss, hidden, by=3.0), with_gradient(expected, hidden)
    assert loss.dtype == weight.dtype and values[1].shape == hidden.shape
    # a loss near 0 is the difference of logits, which fp32 knows to 6e-8 of the largest
    rtol = 1e-5 if weight.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(values[0].double(), exact[0], rtol=rtol, atol=rtol * len(hidden))
    # likewise a gradient near 0; where a softcap is all but reached its slope is such a difference
    atol = rtol * float(weight.abs().max()) * how["scale"]
    torch.testing.assert_close(values[1].double(), exact[1].double(), rtol=rtol, atol=atol)
    assert not values[1][labels == how["ignore_index"]].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap, label_smoothing", [(None, 0.0), (30.0, 0.1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_s_loss_with_no_more_than_a_chunk_of_logits(dtype, softcap, label_smoothing, device):
    """At a size where one chunk has many tokens and the last is cut."""
    hidden, weight, _, labels = case(301, 64, 1000, size=3.0, dtype=dtype, device=device)
    how: dict[str, Any] = {"softcap": softcap, "label_smoothing": label_smoothing}
    with Sizes() as sizes:
        expected = with_gradient(plain_path(hidden, weight, labels, **how), hidden)
    assert max(sizes.seen) == 301 * 1000
    with Sizes() as sizes, chunks_of(64 * 1000):
        values = with_gradient(linear_cross_entropy(hidden, weight, labels, **how), hidden)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(hidden, weight, labels, **how), values[0])
    assert max(sizes.seen) == 64 * 1000
    if dtype == torch.float32:  # sums of 64 products and of 1000 exponentials in another order
        errors = [reference.relative_rms(*pair) for pair in zip(values, expected, strict=True)]
        assert errors[0] <= 1e-6 and errors[1] <= 1e-5


@pytest.mark.parametrize("device", [*DEVICES, "as a GPU"])
@pytest.mark.parametrize("softcap", axis(10.0, None))
@pytest.mark.parametrize("size", axis(3.0, 0.5))
@pytest.mark.parametrize("dtype", axis(torch.bfloat16, torch.float16), ids=str)
def test_16_bits_are_no_further_off_than_the_plain_path(dtype, size, softcap, device, monkeypatch):
    """For half of the tokens the model predicts the label: dz is no round number there. The plain
    path rounds it after division by the number of tokens, so several numbers are tried."""
    if device == "as a GPU":
        monkeypatch.setattr(loss_module, "is_gpu", lambda device: True)
        monkeypatch.setattr(torch, "mm", lambda x, y, out_dtype: x.to(out_dtype) @ y.to(out_dtype))
    place = "cuda" if device == "cuda" else "cpu"
    scaling = 2.0**16 if dtype == torch.float16 else 1.0  # as a GradScaler's
    ours, plain = [], []
    for seed, count in enumerate((18, 21, 25, 29, 37, 1237, 1500, 4097)):
        hidden, weight, _, labels = case(37, 64, 3000, dtype=dtype, size=size, seed=seed)
        best = F.linear(hidden, weight).argmax(1)
        labels[::2] = torch.where(labels == -100, -100, best)[::2]
        if device == "cpu":  # where a second rounding would show
            labels[(labels != -100).cumsum(0) > count] = -100
            count = int((labels != -100).sum())
        # in float64, as autograd rounds the gradient of hidden to its dtype
        wide = hidden.detach().double().requires_grad_()
        loss = reference.linear_cross_entropy(wide, weight, labels, softcap=softcap) / count
        exact = with_gradient(loss, wide)
        hidden, weight, labels = (t.detach().to(place) for t in (hidden, weight, labels))
        hidden.requires_grad_()
        with chunks_of(3000 * 16):
            fast = linear_cross_entropy(hidden, weight, labels, softcap=softcap) / count
        slow = plain_path(hidden, weight, labels, softcap=softcap) / count
        for errors, loss in ((ours, fast), (plain, slow)):
            gradient = torch.autograd.grad(loss * scaling, hidden)[0].double() / scaling
            off = reference.relative_rms(gradient.cpu(), exact[1])
            errors.append((abs(loss.item() - exact[0].item()), off))
    errors, plain_errors = (torch.tensor(x).norm(dim=0) for x in (ours, plain))
    # The same roundings to 16 bits. Sums in fp32 in another order: an ulp of a loss of 8 is 1e-6.
    slack = 1.0 if device == "cpu" else 1.05  # products of other sizes round other logits
    assert errors[0] <= slack * plain_errors[0] + 2e-6 and errors[1] <= 1.001 * plain_errors[1]


def test_small_probabilities_keep_their_digits_in_fp16():
    """1e-5 is 167.8 of the smallest steps of fp16, so rounding loses 0.14 %. With rows of the head
    that have much in common, the label's probability does not make up for that."""
    hidden, weight, _, labels = case(3, 4, 100_000, masked=0.0, dtype=torch.float16, size=0.2)
    hidden = torch.zeros_like(hidden).requires_grad_()  # all words are equally likely
    weight = weight + 1
    wide = hidden.detach().double().requires_grad_()
    expected = with_gradient(reference.linear_cross_entropy(wide, weight, labels) / 4096, wide)
    loss = linear_cross_entropy(hidden, weight, labels) / 4096
    (gradient,) = torch.autograd.grad(loss * 2.0**16, hidden)
    assert (
        reference.relative_rms(gradient.double() / 2**16, expected[1]) <= 5e-3
    )  # without care it is 1e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", axis(torch.float32, torch.bfloat16), ids=str)
def test_autocast_does_not_change_the_dtype_of_products(dtype, device):
    hidden, weight, _, labels = case(20, 8, 50, dtype=dtype, device=device)
    expected = with_gradient(linear_cross_entropy(hidden, weight, labels), hidden)
    with torch.autocast(device, torch.bfloat16):
        values = with_gradient(linear_cross_entropy(hidden, weight, labels), hidden)
    assert all(map(torch.equal, values, expected))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_head_is_refused(trained):
    hidden, weight, bias, labels = case(4, 4, 9)
    (weight if trained == "weight" else bias).requires_grad_()
    with pytest.raises(UserError, match="no gradient for the output head, and this one is trained"):
        linear_cross_entropy(hidden, weight, labels, bias=bias)
