"""Triton's decoding kernel, on a GPU or interpreted, and all kernels' code for other GPUs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import reference
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default import ops as by_torch
from conftest import axis, on_gpu, with_folders
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.config import QuantConfig
from qlora.ops import nf4
from qlora.ops.nf4 import Quantized

TESTS = Path(__file__).parent.parent


def quantized(shape: tuple[int, int], **quant: Any) -> Quantized:
    """A weight whose rows have very different sizes, so that absmax has many codes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(shape[0], 1, generator=generator).exp()
    return nf4.quantize(torch.randn(shape, generator=generator) * sizes, QuantConfig(**quant))


def decode(weight: Quantized, dtype: torch.dtype, device: torch.device) -> Tensor:
    """By the kernel, into a part of a larger tensor of which the rest must stay."""
    from qlora.ops.kernels import decode

    packed, state = weight
    values = state.shape.numel()
    around = torch.full((values + 64,), 7, dtype=dtype, device=device)
    state.to(device)
    decode(packed.to(device), state, around[:values])
    assert (around[values:] == 7).all()
    return around[:values].view(state.shape).cpu()


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes_is_not_compiled() -> Iterator[None]:
    """On a CPU it compiles its decoding for each odd shape and large block, which takes seconds."""
    own = by_torch._dequantize_4bit_compute
    with patch.object(by_torch, "_dequantize_4bit_compute", getattr(own, "__wrapped__", own)):
        yield


@settings(deadline=None, max_examples=30)
@example((90, 200), 32, True, "nf4", torch.float32)  # three blocks of absmax, the last is short
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 200)),
    blocksize=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    double_quant=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)
def test_decode_is_exact(kernel_device, shape, blocksize, double_quant, quant_type, dtype):
    """bitsandbytes' values on a CPU in fp32, which test_nf4 compares with the reference."""
    weight = quantized(shape, blocksize=blocksize, double_quant=double_quant, quant_type=quant_type)
    exact = nf4.dequantize(weight)
    allowed = [exact.to(dtype)]
    if dtype == torch.bfloat16 and kernel_device.type == "cpu":  # the interpreter cuts bf16 off
        allowed.append((exact.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16())
    for storage in torch.uint8, torch.bfloat16, torch.float32:  # as with bnb_4bit_quant_storage
        if len(weight.packed) % storage.itemsize == 0:
            stored = weight._replace(packed=weight.packed.view(-1).view(storage).view(-1, 1))
            values = decode(stored, dtype, kernel_device)
            assert any(torch.equal(values, other) for other in allowed)


STEPS = pytest.mark.parametrize("shape", [(32, 100), (128, 40), (7, 33)], ids=str)


@pytest.mark.parametrize("kind", ["integers", "nf4"])
@STEPS
def test_a_step_of_the_search_for_codes(kernel_device, kind, shape):
    from qlora.ops import kernels

    assert_descends(kernels, kind, shape, kernel_device)


def test_the_search_takes_a_kernel_that_is_right(kernel_device, monkeypatch, caplog):
    from qlora.merge import loops
    from qlora.ops import kernels

    monkeypatch.setattr(loops, "may_use_triton", lambda *_: True)
    assert loops.triton_descends.__wrapped__(kernel_device)
    right = kernels.descend
    monkeypatch.setattr(kernels, "descend", Mock(side_effect=RuntimeError("no C compiler")))
    assert not loops.triton_descends.__wrapped__(kernel_device)
    assert "is not used: RuntimeError: no C compiler" in caplog.text
    monkeypatch.setattr(kernels, "descend", lambda *own, integers: right(*own, integers=True))
    assert not loops.triton_descends.__wrapped__(kernel_device)
    monkeypatch.setattr(loops, "triton_descends", lambda device: True)
    gpu = torch.device("cuda", 0)
    assert loops.descender(gpu, columns=2 * loops.WIDEST) is loops.descend
    assert loops.descender(gpu, columns=loops.WIDEST) is not loops.descend
    monkeypatch.setattr(loops, "triton_descends", lambda device: False)
    assert loops.descender(gpu, columns=32) is loops.descend


@pytest.mark.parametrize("kind", ["integers", "nf4"])
@STEPS
def test_the_same_step_compiled_for_a_cpu(kind, shape):
    compiled = pytest.importorskip("qlora.ops.compiled")
    assert_descends(compiled, kind, shape, torch.device("cpu"))
    import numba

    with pytest.raises(ValueError, match="not initialized"):  # a forked process would hang
        numba.threading_layer()


def assert_descends(module: Any, kind: str, shape: tuple[int, int], device: torch.device) -> None:
    """As the plain equivalent does."""
    from qlora.merge import grids, loops

    generator = torch.Generator().manual_seed(0)
    new: Any = {"generator": generator}
    x = torch.randn(256, shape[0], **new)
    hessian, gradient = x.T @ x / 256, torch.randn(shape, **new)
    grid: Any = grids.Q4_0(torch.randn(32, 4, **new))
    if kind == "nf4":
        grid = grids.NF4Grid(quantized((4, 64)))
    scale, shift = torch.randn(2, shape[1], **new)
    scale[:3] = torch.tensor([0.0, 1e-39, 0.5])  # a block of zeros, one of nearly zeros
    before = torch.addcmul(shift, grid.levels[torch.randint(16, shape, **new)], scale)
    wanted, slope = before.clone(), gradient.clone()
    loops.descend(wanted, slope, hessian, scale, shift, grid)
    tensors = before, gradient, hessian, scale, shift
    given = [tensor.clone().to(device) for tensor in tensors]
    module.descend(*given, grid.levels.to(device), integers=kind == "integers")
    moved, followed = (tensor.cpu() for tensor in given[:2])
    assert (wanted != before).float().mean() > 0.3
    assert torch.allclose(slope, torch.addmm(gradient, hessian, wanted - before), atol=1e-4)
    # sums in another order: the few values half-way between two levels may differ
    same = (moved - wanted).abs() < 1e-5
    assert same.float().mean() > 0.999
    assert torch.allclose(followed[:, same.all(0)], slope[:, same.all(0)], atol=1e-4)


@on_gpu
def test_decode_of_more_values_than_32_bits_count():
    from qlora.ops.kernels import decode

    values = (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 7 << 30:
        pytest.skip("needs 7 GB of GPU memory")
    packed = torch.zeros(values // 2, 1, dtype=torch.uint8, device="cuda")
    packed[-2048:] = torch.randint(256, (2048, 1), dtype=torch.uint8, device="cuda")
    state = bnb.QuantState(
        absmax=torch.ones(values // 64, device="cuda"), shape=torch.Size((values // 64, 64)),
        code=nf4.codebook("nf4").cuda(), blocksize=64, quant_type="nf4",
    )  # fmt: skip
    out = torch.empty(values, dtype=torch.bfloat16, device="cuda")
    decode(packed, state, out)
    last = torch.from_numpy(reference.unpack(packed[-2048:])).long()
    assert torch.equal(out[-4096:].cpu(), nf4.codebook("nf4")[last].bfloat16())
    assert (out[:-4096] == -1).all()


@pytest.mark.parametrize("cards", axis("one card", "all cards"))
def test_registers_loads_and_stores(cards, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = with_folders(TESTS.parent) | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "lowering.py"), cards]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    compiled = json.loads(ran.stdout)
    assert compiled.pop("starved")["stack"], "spilled registers are not seen"
    for name, code in compiled.items():
        spilled = 16 if name.startswith("descend") else 0  # bytes, of a thread's hundreds
        assert code["stack"] <= spilled, f"{name} spills registers"
        if name.startswith("decode") and ("H200" in name or "A100" in name) and "fp32" not in name:
            assert code["registers"] <= 32, name  # 65,536 of a multiprocessor, over 2048 threads
        required, forbidden = ["ld.global.v4.b32", "st.global.v4.b32"], ["global.b"]
        if name.startswith("rotate"):  # a cosine and a sine a thread
            forbidden = ["st.global.b"]
        if name.startswith("descend"):
            assert ".f64" not in code["ptx"], name
            continue
        if name.startswith("decode"):
            # loads of 4 bytes, stores of 16; a fused multiply-add rounds once, bitsandbytes twice
            required, forbidden = ["ld.global.b32", "st.global.v4.b32"], ["st.global.b", "fma"]
        assert all(text in code["ptx"] for text in required), name
        assert not any(text in code["ptx"] for text in forbidden), name
