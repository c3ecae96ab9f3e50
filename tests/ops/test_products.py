"""Products by oneDNN against torch's own, of any shape and stride."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qlora.ops.lora import add_linear, by_onednn, inner, linear

SIZES = st.sampled_from([1, 2, 3, 16, 17, 64, 131])


def strided(*shape: int, transposed: bool) -> Tensor:
    """Random numbers, of which the last two dimensions may lie the other way round."""
    if not transposed or len(shape) < 2:
        return torch.randn(shape)
    *first, rows, columns = shape
    return torch.randn(*first, columns, rows).mT


def close(got: Tensor, wanted: Tensor, terms: Tensor) -> None:
    """As near as fp32 sums are, whose size is that of their terms."""
    assert got.shape == wanted.shape
    assert ((got.double() - wanted).abs() <= 2e-6 * terms).all()


@settings(max_examples=50, deadline=None)
@given(
    first=st.lists(st.integers(0, 3), max_size=2),
    rows=SIZES,
    inputs=SIZES,
    outputs=SIZES,
    flipped=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    into=st.booleans(),
)
def test_linear(first, rows, inputs, outputs, flipped, bias, into):
    torch.manual_seed(0)
    x = strided(*first, rows, inputs, transposed=flipped[0])
    weight = strided(outputs, inputs, transposed=flipped[1])
    added = torch.randn(outputs) if bias else None
    out = torch.full((*first, rows, outputs), torch.nan) if into else None
    y = linear(x, weight, added, out)
    assert y is out or not into
    wide = [t if t is None else t.double() for t in (x, weight, added)]
    close(y, F.linear(*wide), F.linear(*(t if t is None else t.abs() for t in wide)))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_what_it_gives_is_no_view(shape):
    assert not linear(torch.randn(shape), torch.randn(8, 64))._is_view()


@settings(max_examples=50, deadline=None)
@given(rows=SIZES, columns=st.tuples(SIZES, SIZES), flipped=st.tuples(st.booleans(), st.booleans()))
def test_inner_and_add_linear(rows, columns, flipped):
    torch.manual_seed(0)
    x, y = (
        strided(rows, size, transposed=is_flipped)
        for size, is_flipped in zip(columns, flipped, strict=True)
    )
    got = inner(x, y)
    assert got.is_contiguous()
    wanted, terms = x.double().T @ y.double(), x.abs().double().T @ y.abs().double()
    close(got, wanted, terms)
    total = torch.ones(columns)
    assert add_linear(total, x.T, y.T) is total
    close(total, wanted + 1, terms + 1)


def test_it_can_be_switched_off(monkeypatch):
    x, weight = torch.randn(40, 64), torch.randn(48, 64)
    assert by_onednn(x) == (torch.backends.cpu.get_cpu_capability() == "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not by_onednn(x)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torchs(dtype):
    x, weight = torch.randn(4, 64, dtype=dtype), torch.randn(48, 64, dtype=dtype)
    assert not by_onednn(x)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(inner(x, x), x.T @ x)


def test_nothing_is_nothing():
    assert linear(torch.empty(0, 64), torch.randn(48, 64)).shape == (0, 48)
    assert torch.equal(inner(torch.empty(0, 4), torch.empty(0, 8)), torch.zeros(4, 8))
