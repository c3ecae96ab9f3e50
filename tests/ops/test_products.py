"""Fast versions against plain ones: when they agree, and matrix products by oneDNN and by torch."""

import math
import re
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import qlora
from qlora.ops import agrees, lora, may_use_triton, relative_error
from qlora.ops.lora import add_linear, by_onednn, inner, linear

X = torch.tensor([3.0, 4.0])  # norm 5


def test_relative_error_is_of_norms():
    assert relative_error(X + torch.tensor([0.0, 0.5]), X) == pytest.approx(0.1)
    assert relative_error([X, X * 2], [X, X]) == pytest.approx(1)  # the largest
    assert relative_error(X.half(), X.double()) == 0
    assert relative_error(torch.full((2,), 6e4).half(), torch.full((2,), 6e4)) == 0  # fp64 norms

    # other shapes or numbers of tensors, NaN, and any error of 0
    for pair in ((X[:1], X), ([X], [X, X]), (X * math.nan, X), (X, torch.zeros(2))):
        assert relative_error(*pair) == math.inf


def test_a_difference_or_exception_is_logged_for_a_named_version_only(caplog):
    assert agrees(torch.exp, torch.exp, X, tolerance=0)
    for tolerance in 0.009, 0.011:
        assert agrees(lambda x: x * 1.01, lambda x: x, X, tolerance=tolerance) == (tolerance > 0.01)

    broken = Mock(side_effect=RuntimeError("Failed to find C compiler"))
    assert not agrees(torch.sin, torch.exp, X, tolerance=1e-3, log_as="the sine")
    assert not agrees(broken, torch.exp, X, tolerance=1e-3, log_as="the kernel")
    first, second = (record.getMessage() for record in caplog.records)
    assert "the sine is not used" in first and "0.001" in first
    assert "the kernel is not used" in second and "Failed to find C compiler" in second
    assert not agrees(torch.sin, torch.exp, X, tolerance=1e-3) and len(caplog.records) == 2
    with pytest.raises(RuntimeError, match="C compiler"):
        agrees(broken, torch.exp, X, tolerance=1e-3)


def test_kernels_are_tried_on_gpus_with_triton_only(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert may_use_triton(gpu, torch.bfloat16)
    assert not may_use_triton(gpu, torch.float64) and not may_use_triton(cpu, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    assert not may_use_triton(gpu, torch.bfloat16)


def test_no_module_imports_triton_before_a_kernel_is_used():
    package = Path(qlora.__file__).parent
    for path in set(package.rglob("*.py")) - {package / "ops" / "kernels.py"}:
        for line in path.read_text().splitlines():  # not indented: when the module is imported
            loads = (
                r"(import|from) (triton|qlora\.ops\.kernels)\b|from qlora\.ops import .*\bkernels\b"
            )
            assert not re.match(loads, line), path


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
    onednn=st.booleans(),
)
def test_linear(first, sizes, flipped, bias, into, onednn):
    torch.manual_seed(0)
    rows, inputs, outputs = sizes
    x = strided(*first, rows, inputs, transposed=flipped[0])
    weight = strided(outputs, inputs, transposed=flipped[1])
    added = torch.randn(outputs) if bias else None
    out = torch.full((*first, rows, outputs), torch.nan) if into else None
    with patch.object(lora, "_onednn_is_faster", lambda: onednn):
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
    monkeypatch.setattr(lora, "_onednn_is_faster", lambda: True)
    x, weight = torch.randn(40, 64, dtype=dtype), torch.randn(48, 64, dtype=dtype)
    assert by_onednn(x) == (dtype == torch.float32)
    assert linear(x[:0], weight).shape == (0, 48)
    assert torch.equal(inner(x[:0], x[:0, :8]), torch.zeros(64, 8, dtype=dtype))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", dtype != torch.float32)
    assert not by_onednn(x)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(inner(x, x), x.T @ x)


@pytest.fixture
def choose():
    """The choice between oneDNN's product and torch's, made anew."""
    lora._onednn_is_faster.cache_clear()
    yield lora._onednn_is_faster
    lora._onednn_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("intels", "widest", "is_chosen"),
    [(False, "AVX512", True), (True, "AVX512", False), (False, "AVX2", False)],
)
def test_the_product_is_chosen_by_the_processor(intels, widest, is_chosen, choose, monkeypatch):
    monkeypatch.setattr(lora, "is_intels", lambda: intels)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
    assert choose() == (is_chosen and torch.backends.mkl.is_available())


def test_onednn_is_not_used_if_its_operator_fails(choose, monkeypatch, caplog):
    monkeypatch.setattr(lora, "is_intels", lambda: False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(lora, "_onednn_linear", Mock(side_effect=RuntimeError("no such operator")))
    x, weight = torch.randn(4, 64), torch.randn(48, 64)
    for _ in range(2):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert [r.getMessage().count("no such operator") for r in caplog.records] == [1]
