"""Triton's kernels of 4-bit weights: through its interpreter on a CPU, as they are on a GPU, and
what its compiler makes of them for GPUs that are not here. (The gated MLP's are in test_gated.)"""

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
from conftest import NEEDS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.config import QuantConfig
from qlora.ops import gated as kernels
from qlora.ops import nf4
from qlora.ops.nf4 import Quantized

TESTS = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_codes(
    shape: tuple[int, int], *, blocksize: int, double_quant: bool, quant_type: str, seed: int = 0
) -> Quantized:
    """A weight of any codes and absmax, also of those that no weight is quantized to."""
    generator = torch.Generator().manual_seed(seed)
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


def rounded(exact: Tensor, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What `exact` may become: Triton's interpreter cuts bf16 off where a GPU rounds."""
    allowed = [exact.to(dtype)]
    if dtype == torch.bfloat16 and device.type == "cpu":
        allowed.append((exact.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype))
    return allowed


def decode(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """By the kernel, into a part of a larger tensor of which the rest must stay."""
    from qlora.ops.kernels import decode

    packed, state = quantized
    values = state.shape.numel()
    around = torch.full((values + 64,), 7, dtype=dtype, device=packed.device)
    decode(packed, state, around[:values])
    assert (around[values:] == 7).all()
    return around[:values].view(state.shape).cpu()


def equals_one(got: Tensor, allowed: list[Tensor]) -> bool:
    return any(torch.equal(got, other) for other in allowed)


# ---- decode ----


@settings(deadline=None, max_examples=60)
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
    want = expected(quantized)
    got = decode(to(quantized, kernel_device), dtype)
    assert equals_one(got, rounded(want, dtype, kernel_device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decode_equals_dequantize(kernel_device, quant_type, double_quant, dtype):
    quant = QuantConfig(quant_type=quant_type, double_quant=double_quant)
    weight = torch.randn(96, 576, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized = nf4.quantize(weight, quant)
    want = nf4.dequantize_to(quantized, dtype)
    cut = rounded(nf4.dequantize(quantized), dtype, kernel_device)[1:]
    assert equals_one(decode(to(quantized, kernel_device), dtype), [want, *cut])


def test_second_blocks_beyond_the_first(kernel_device):
    """More than 256 absmax codes, and the second absmax of the last is of a short block."""
    quantized = random_codes((90, 200), blocksize=32, double_quant=True, quant_type="nf4")
    assert len(quantized.state.state2.absmax) == 3
    want = expected(quantized)
    assert torch.equal(decode(to(quantized, kernel_device), torch.float32), want)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_are_stored_as_another_dtype(kernel_device, storage):
    """As with bnb_4bit_quant_storage, for sharding."""
    quantized = random_codes((16, 64), blocksize=64, double_quant=True, quant_type="nf4")
    want = expected(quantized)
    there = to(quantized, kernel_device)
    stored = there._replace(packed=there.packed.view(-1).view(storage).view(-1, 1))
    assert torch.equal(decode(stored, torch.float32), want)


@pytest.mark.gpu
@NEEDS_GPU
def test_more_values_than_32_bits_count():
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


# ---- the product ----


@pytest.mark.parametrize("parts", [1, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 16, 33, 70])
def test_product(kernel_device, tokens, parts, monkeypatch):
    from qlora.ops import kernels as kernel

    monkeypatch.setattr(kernel, "_multiprocessors", lambda device: parts)
    for shape in [(7, 40), (33, 1032)]:
        check_product(kernel_device, tokens, shape, torch.float32)


@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("blocksize", "double_quant"), [(32, False), (256, True)])
def test_product_in_16_bits(kernel_device, blocksize, double_quant, quant_type, tokens):
    check_product(
        kernel_device, tokens, (35, 136), torch.float16,
        blocksize=blocksize, double_quant=double_quant, quant_type=quant_type,
    )  # fmt: skip
    if kernel_device.type == "cuda":  # the interpreter's tl.dot knows no bf16
        check_product(kernel_device, tokens, (35, 136), torch.bfloat16)


def check_product(
    device: torch.device, tokens: int, shape: tuple[int, int], dtype: torch.dtype, **kind: Any
) -> None:
    from qlora.ops.kernels import product

    kind = {"blocksize": 64, "double_quant": True, "quant_type": "nf4"} | kind
    quantized = random_codes(shape, **kind)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = expected(quantized).to(dtype).double()
    got = product(x.to(device), *to(quantized, device))
    assert (got.dtype, got.shape) == (dtype, (tokens, shape[0]))
    # fp32 sums of `in` products, each with half a step of fp32; and one rounding to the dtype
    most = (x.double().abs() @ weight.abs().T) * shape[1] * 2.0**-24
    want = x.double() @ weight.T
    apart = (got.cpu().double() - want).abs()
    assert (apart <= most + want.abs() * torch.finfo(dtype).eps).all()


def test_product_refuses_rows_of_odd_lengths(kernel_device):
    from qlora.ops.kernels import product

    quantized = random_codes((4, 12), blocksize=64, double_quant=True, quant_type="nf4")
    with pytest.raises(ValueError, match="in_features must be a multiple of 8, got 12"):
        product(torch.zeros(1, 12, device=kernel_device), *to(quantized, kernel_device))


# ---- compiled ----


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(TESTS / "lowering.py")]
    done = subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_spills(lowered):
    assert {name: made["spills"] for name, made in lowered.items() if made["spills"]} == {}


@pytest.mark.parametrize("card", ["A100", "H200"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_decode_lets_every_thread_run(lowered, dtype, card):
    """65,536 registers of a multiprocessor over 2048 threads."""
    assert lowered[f"decode {dtype} {card}"]["registers"] <= 32


def test_decode_loads_4_bytes_and_stores_16(lowered):
    for name in (n for n in lowered if n.startswith("decode")):
        ptx = lowered[name]["ptx"]
        assert "ld.global.b32" in ptx, name
        assert "st.global.v4.b32" in ptx, name
        assert "st.global.b" not in ptx, name


def test_decode_fuses_no_multiply_and_add(lowered):
    """Which would round once where bitsandbytes rounds twice."""
    for name in (n for n in lowered if n.startswith("decode")):
        assert "fma" not in lowered[name]["ptx"], name


def test_gated_loads_and_stores_16_bytes(lowered):
    for name in (n for n in lowered if n.startswith("gated")):
        ptx = lowered[name]["ptx"]
        assert "ld.global.v4.b32" in ptx, name
        assert "st.global.v4.b32" in ptx, name
        assert "global.b" not in ptx, name


# ---- optional ----


def test_nothing_imports_triton_before_a_kernel_is_wanted():
    """bitsandbytes does, so it is asked with Triton out of reach: all goes the plain way."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from qlora import QuantConfig, nf4
from qlora.decode import decoded
from qlora.gated import gated_backward, gated_forward
one = torch.ones(2, 2)
assert gated_forward(one, one, "silu").shape == (2, 2)
assert len(gated_backward(one, one, one, "silu")) == 3
assert decoded(torch.nn.Linear(2, 3), torch.float32).shape == (3, 2)
assert not any(name.startswith("qlora.ops.gated.") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """`usable`, asked about a GPU whose memory is this CPU's."""
    kernels.usable.cache_clear()
    monkeypatch.setattr(torch, "ones", lambda *shape, **kind: torch.full(shape, 1.0))
    yield lambda dtype: kernels.usable(torch.device("cuda:0"), dtype)
    kernels.usable.cache_clear()


def test_kernels_are_usable_where_one_runs(as_on_a_gpu):
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU of this machine")
    assert as_on_a_gpu(torch.bfloat16)
    assert not as_on_a_gpu(torch.float64)
    assert not kernels.usable(torch.device("cpu"), torch.float32)


def test_a_kernel_that_does_not_run_is_reported_once(as_on_a_gpu, monkeypatch, caplog):
    pytest.importorskip("triton", reason="Triton is not installed")
    from qlora.ops import kernels as gated

    def broken(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gated, "forward", broken)
    assert not as_on_a_gpu(torch.float32)
    assert not as_on_a_gpu(torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "Triton's kernels do not run over torch.float32 on cuda:0, so slower ways are taken: "
        "Failed to find C compiler"
    ]
