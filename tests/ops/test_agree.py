"""When a fast version counts as equal to the plain one."""

import math
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import qlora
from qlora.ops import agrees, may_use_triton, relative_error

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
