"""Matrix products, by oneDNN and by torch, of any shape and stride."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qlora.ops import lora
from qlora.ops.lora import add_linear, by_onednn, inner, linear

SIZES = st.sampled_from([1, 2, 3, 16, 17, 64, 131])


def strided(*shape: int, transposed: bool) -> Tensor:
    """Random numbers, whose last two dimensions may be transposed in memory."""
    *first, rows, columns = shape
    return torch.randn(*first, columns, rows).mT if transposed else torch.randn(shape)


def close(values: Tensor, exact: Tensor, terms: Tensor) -> None:
    """To fp32's rounding of sums, whose size is that of their terms."""
    assert values.shape == exact.shape
    assert ((values.double() - exact).abs() <= 2e-6 * terms).all()


@settings(max_examples=50, deadline=None)
@given(
    first=st.lists(st.integers(0, 3), max_size=2),
    sizes=st.tuples(SIZES, SIZES, SIZES),
    flipped=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    into=st.booleans(),
)
def test_linear(first, sizes, flipped, bias, into):
    torch.manual_seed(0)
    rows, inputs, outputs = sizes
    x = strided(*first, rows, inputs, transposed=flipped[0])
    weight = strided(outputs, inputs, transposed=flipped[1])
    added = torch.randn(outputs) if bias else None
    out = torch.full((*first, rows, outputs), torch.nan) if into else None
    y = linear(x, weight, added, out)
    assert y is out if into else not y._is_view()
    wide = [t if t is None else t.double() for t in (x, weight, added)]
    close(y, F.linear(*wide), F.linear(*(t if t is None else t.abs() for t in wide)))


@settings(max_examples=50, deadline=None)
@given(rows=SIZES, columns=st.tuples(SIZES, SIZES), flipped=st.tuples(st.booleans(), st.booleans()))
def test_inner_and_add_linear(rows, columns, flipped):
    torch.manual_seed(0)
    x, y = (strided(rows, columns[i], transposed=flipped[i]) for i in range(2))
    values = inner(x, y)
    assert values.is_contiguous()
    exact, terms = x.double().T @ y.double(), x.abs().double().T @ y.abs().double()
    close(values, exact, terms)
    total = torch.ones(columns)
    assert add_linear(total, x.T, y.T) is total
    close(total, exact + 1, terms + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_onednn_is_for_fp32_and_can_be_switched_off(dtype, monkeypatch):
    x, weight = torch.randn(40, 64, dtype=dtype), torch.randn(48, 64, dtype=dtype)
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert by_onednn(x) == (has_avx512 and dtype == torch.float32)
    assert linear(x[:0], weight).shape == (0, 48)
    assert torch.equal(inner(x[:0], x[:0, :8]), torch.zeros(64, 8, dtype=dtype))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", dtype != torch.float32)
    assert not by_onednn(x)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(inner(x, x), x.T @ x)


@pytest.mark.skipif(not by_onednn(torch.ones(1)), reason="no oneDNN, or no AVX-512")
def test_onednn_is_not_used_if_its_operator_fails(monkeypatch, caplog):
    monkeypatch.setattr(lora, "_onednn_linear", Mock(side_effect=RuntimeError("no such operator")))
    lora._has_onednn.cache_clear()
    x, weight = torch.randn(4, 64), torch.randn(48, 64)
    for _ in range(2):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert [r.getMessage().count("no such operator") for r in caplog.records] == [1]
    lora._has_onednn.cache_clear()
