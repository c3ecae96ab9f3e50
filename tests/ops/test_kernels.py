"""Triton's decoding kernel, through its interpreter on a CPU or on a GPU, and the machine code of
all kernels for GPUs that are not here. The gated MLP's kernels are tested in test_gated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from bitsandbytes import functional as bnb
from conftest import NEEDS_GPU, axis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.config import QuantConfig
from qlora.ops import nf4
from qlora.ops.nf4 import Quantized

TESTS = Path(__file__).parent.parent
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def random_codes(
    shape: tuple[int, int], *, blocksize: int, double_quant: bool, quant_type: str
) -> Quantized:
    """A weight of any codes and absmax, also of those that no weight is quantized to."""
    generator = torch.Generator().manual_seed(0)
    values = shape[0] * shape[1]
    blocks = -(-values // blocksize)
    packed = torch.randint(256, (-(-values // 2), 1), generator=generator, dtype=torch.uint8)
    absmax, offset, second = torch.rand(blocks, generator=generator) + 0.01, None, None
    if double_quant:
        absmax = torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8)
        offset = torch.tensor(1.1)
        second = bnb.QuantState(
            absmax=torch.rand(-(-blocks // 256), generator=generator),
            code=torch.tensor(reference.dynamic_levels()),
            blocksize=256,
            dtype=torch.float32,
        )
    state = bnb.QuantState(
        absmax=absmax, shape=torch.Size(shape), code=nf4.codebook(quant_type),
        blocksize=blocksize, quant_type=quant_type, dtype=torch.float32, offset=offset,
        state2=second,
    )  # fmt: skip
    return Quantized(packed, state)


def to(quantized: Quantized, device: torch.device) -> Quantized:
    quantized.state.to(device)
    return Quantized(quantized.packed.to(device), quantized.state)


def expected(quantized: Quantized) -> Tensor:
    """Level times absmax, each step rounded to fp32."""
    packed, state = quantized
    absmax = state.absmax
    if state.nested:
        second = state.state2.absmax.repeat_interleave(256)[: len(absmax)]
        absmax = state.state2.code[absmax.long()] * second + state.offset
    indices = torch.from_numpy(reference.unpack(packed))[: state.shape.numel()].long()
    scale = absmax.repeat_interleave(state.blocksize)[: len(indices)]
    return (state.code.cpu()[indices] * scale.cpu()).view(state.shape)


def decode(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """By the kernel, into a part of a larger tensor of which the rest must stay."""
    from qlora.ops.kernels import decode

    packed, state = quantized
    values = state.shape.numel()
    around = torch.full((values + 64,), 7, dtype=dtype, device=packed.device)
    decode(packed, state, around[:values])
    assert (around[values:] == 7).all()
    return around[:values].view(state.shape).cpu()


def assert_rounded(values: Tensor, exact: Tensor, device: torch.device) -> None:
    """Rounded once to the dtype of `values`; Triton's interpreter cuts bf16 off instead."""
    allowed = [exact.to(values.dtype)]
    if values.dtype == torch.bfloat16 and device.type == "cpu":
        allowed.append((exact.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16())
    assert any(torch.equal(values, other) for other in allowed)


# ---- decode ----


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 200)),
    blocksize=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    double_quant=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
)
def test_decode_is_exact(kernel_device, shape, blocksize, double_quant, quant_type, dtype):
    quantized = random_codes(
        shape, blocksize=blocksize, double_quant=double_quant, quant_type=quant_type
    )
    exact = expected(quantized)
    assert_rounded(decode(to(quantized, kernel_device), dtype), exact, kernel_device)


@pytest.mark.parametrize("dtype", axis(*DTYPES))
@pytest.mark.parametrize("double_quant", axis(True, False))
@pytest.mark.parametrize("quant_type", axis("nf4", "fp4"))
def test_decode_equals_dequantize(kernel_device, quant_type, double_quant, dtype):
    quant = QuantConfig(quant_type=quant_type, double_quant=double_quant)
    weight = torch.randn(96, 576, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized = nf4.quantize(weight, quant)
    exact = nf4.dequantize(quantized)
    assert torch.equal(nf4.dequantize(quantized, dtype), exact.to(dtype))
    assert_rounded(decode(to(quantized, kernel_device), dtype), exact, kernel_device)


def test_second_blocks_beyond_the_first(kernel_device):
    """More than 256 absmax codes, and the second absmax of the last is of a short block."""
    quantized = random_codes((90, 200), blocksize=32, double_quant=True, quant_type="nf4")
    assert len(quantized.state.state2.absmax) == 3
    exact = expected(quantized)
    assert torch.equal(decode(to(quantized, kernel_device), torch.float32), exact)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_as_another_dtype(kernel_device, storage):
    """As with bnb_4bit_quant_storage, for sharding."""
    quantized = random_codes((16, 64), blocksize=64, double_quant=True, quant_type="nf4")
    exact = expected(quantized)
    moved = to(quantized, kernel_device)
    stored = moved._replace(packed=moved.packed.view(-1).view(storage).view(-1, 1))
    assert torch.equal(decode(stored, torch.float32), exact)


@pytest.mark.gpu
@NEEDS_GPU
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


# ---- the machine code ----


@pytest.fixture(scope="module", params=axis("one card", "all cards"))
def lowered(request, tmp_path_factory) -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = str(TESTS.parent)
    command = [sys.executable, str(TESTS / "lowering.py"), request.param]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_no_kernel_spills_registers(lowered):
    assert {name: code["spills"] for name, code in lowered.items() if code["spills"]} == {}


def test_decode_uses_few_registers_loads_4_bytes_and_stores_16(lowered):
    for name, code in lowered.items():
        if not name.startswith("decode"):
            continue
        if "H200" in name or "A100" in name:  # 65,536 of a multiprocessor, over 2048 threads
            assert code["registers"] <= 32 or "fp32" in name, name
        assert "ld.global.b32" in code["ptx"], name
        assert "st.global.v4.b32" in code["ptx"], name
        assert "st.global.b" not in code["ptx"], name
        # a fused multiply-add rounds once where bitsandbytes rounds twice
        assert "fma" not in code["ptx"], name


def test_gated_loads_and_stores_16_bytes(lowered):
    for name, code in lowered.items():
        if name.startswith("gated"):
            assert "ld.global.v4.b32" in code["ptx"], name
            assert "st.global.v4.b32" in code["ptx"], name
            assert "global.b" not in code["ptx"], name


def test_without_triton_everything_goes_the_plain_way():
    """In a process where Triton cannot be imported."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from qlora.ops.gated import gated_backward, gated_forward
from qlora.ops.nf4 import decoded
one = torch.ones(2, 2)
assert gated_forward(one, one, "silu").shape == (2, 2)
assert len(gated_backward(one, one, one, "silu")) == 3
assert decoded(torch.nn.Linear(2, 3), torch.float32).shape == (3, 2)
assert "qlora.ops.kernels" not in sys.modules
"""
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    assert ran.returncode == 0, ran.stderr
