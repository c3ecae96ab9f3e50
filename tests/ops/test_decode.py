"""Where a frozen layer's dense weight lies, and that it is the weight."""

import threading

import bitsandbytes
import pytest
import torch
from conftest import DEVICES, NEEDS_GPU
from torch import nn
from torch.nn import functional as F

from qlora.config import QuantConfig
from qlora.ops import nf4
from qlora.ops import nf4 as decode
from qlora.ops.nf4 import Quantized, decoded, into_scratch, scratch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def linear4bit(shape: tuple[int, int], device: str, quant_type: str = "nf4") -> nn.Module:
    """A layer as a model has it, whose weight is bitsandbytes' subclass of a Parameter."""
    out_features, in_features = shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, quant_type=quant_type, compress_statistics=True
    )
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    layer.load_state_dict({"weight": weight})
    return layer.to(device)


def quantized(shape: tuple[int, int], device: torch.device, seed: int = 0) -> Quantized:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return nf4.quantize(weight, QuantConfig())


@pytest.fixture(autouse=True)
def forget():
    """Buffers are a thread's own, and the tests share one."""
    yield
    decode._held.buffers.clear()


# ---- the weight ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4_bit_layer(quant_type, dtype, device):
    layer = linear4bit((96, 128), device, quant_type)
    want = nf4.dequantize_to(Quantized(layer.weight.detach(), layer.weight.quant_state), dtype)
    for _ in range(2):  # a second time into the same memory
        got = decoded(layer, dtype)
        assert torch.equal(got, want)
        assert type(got) is torch.Tensor
        assert not got.requires_grad


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["triton", "bitsandbytes", "plain"])
def test_every_way_gives_the_same(way, dtype, monkeypatch):
    monkeypatch.setattr(decode, "GPU_WAY", way)
    for quant_type in ("nf4", "fp4"):
        layer = linear4bit((300, 200), "cuda", quant_type)
        want = nf4.dequantize_to(Quantized(layer.weight.detach(), layer.weight.quant_state), dtype)
        assert torch.equal(decoded(layer, dtype), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_is_not_quantized(dtype):
    layer = nn.Linear(5, 3)
    got = decoded(layer, dtype)
    assert torch.equal(got, layer.weight.detach().to(dtype))
    assert not got.requires_grad
    assert decoded(layer, torch.float32).data_ptr() == layer.weight.data_ptr()


def test_on_a_cpu_each_weight_is_a_tensor_of_its_own():
    layer = linear4bit((32, 64), "cpu")
    first, second = decoded(layer, torch.float32), decoded(layer, torch.float32)
    assert first.data_ptr() != second.data_ptr()


# ---- the way ----


def test_until_it_is_measured_the_way_is_bitsandbytes():
    assert decode.GPU_WAY == "bitsandbytes"
    assert decode.way_for(torch.device("cuda:0"), torch.bfloat16) == "bitsandbytes"


@pytest.mark.parametrize("works", [True, False])
def test_triton_is_taken_where_it_works(works, monkeypatch):
    monkeypatch.setattr(decode, "GPU_WAY", "triton")
    monkeypatch.setattr(decode, "usable", lambda device, dtype: works)
    wanted = "triton" if works else "bitsandbytes"
    assert decode.way_for(torch.device("cuda:0"), torch.bfloat16) == wanted


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices_go_the_plain_way(device):
    assert decode.way_for(torch.device(device), torch.bfloat16) == "plain"


# ---- the memory ----


def test_a_slot_is_used_again_and_grows():
    small, large = torch.Size((3, 5)), torch.Size((30, 50))
    first = scratch(small, torch.float32, CPU, 0)
    assert scratch(small, torch.bfloat16, CPU, 0).data_ptr() == first.data_ptr()
    assert scratch(small, torch.float32, CPU, 1).data_ptr() != first.data_ptr()
    grown = scratch(large, torch.float32, CPU, 0)
    assert (grown.shape, grown.dtype) == (large, torch.float32)
    assert scratch(small, torch.float16, CPU, 0).data_ptr() == grown.data_ptr()
    held = decode._held.buffers.values()
    assert sum(len(buffer) for buffer in held) == 30 * 50 * 4 + 3 * 5 * 4


def test_threads_have_memory_of_their_own():
    shape = torch.Size((4, 4))
    mine, others = scratch(shape, torch.float32, CPU, 0), []
    run = threading.Thread(target=lambda: others.append(scratch(shape, torch.float32, CPU, 0)))
    run.start()
    run.join()
    assert others[0].data_ptr() != mine.data_ptr()


def test_memory_that_inference_made_is_watched_in_training():
    shape = torch.Size((4, 4))
    with torch.inference_mode():
        made = scratch(shape, torch.float32, CPU, 0)
    x = torch.ones(1, 4, requires_grad=True)
    y = F.linear(x, scratch(shape, torch.float32, CPU, 0).fill_(2))
    y.sum().backward(retain_graph=True)
    assert x.grad.tolist() == [[8.0] * 4]
    assert scratch(shape, torch.float32, CPU, 0).fill_(3).data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("inference", [False, True])
def test_decoding_into_scratch(kernel_device, inference):
    weights = [quantized((48, 64), kernel_device, seed) for seed in (0, 1)]
    wanted = [nf4.dequantize(weight) for weight in weights]
    with torch.inference_mode(inference):
        for weight, want in zip(weights, wanted, strict=True):
            got = into_scratch(weight, torch.float32, 0, "triton")
            assert torch.equal(got, want)


def test_a_weight_that_was_saved_and_then_overwritten_is_reported(kernel_device):
    x = torch.randn(2, 64, device=kernel_device, requires_grad=True)
    first, second = (quantized((48, 64), kernel_device, seed) for seed in (0, 1))
    y = F.linear(x, into_scratch(first, torch.float32, 0, "triton"))
    into_scratch(second, torch.float32, 0, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gpu
@NEEDS_GPU
def test_streams_have_memory_of_their_own():
    shape, device = torch.Size((4, 4)), torch.device("cuda", torch.cuda.current_device())
    mine = scratch(shape, torch.float32, device, 0)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = scratch(shape, torch.float32, device, 0)
    assert mine.data_ptr() != other.data_ptr()
    assert scratch(shape, torch.float32, device, 0).data_ptr() == mine.data_ptr()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("way", ["triton", "bitsandbytes"])
def test_products_in_a_row_see_their_own_weights(way, monkeypatch):
    monkeypatch.setattr(decode, "GPU_WAY", way)
    layers = [linear4bit((256, 256 + 64 * i), "cuda") for i in range(6)]
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    got = [F.linear(x[:, : len(d.T)], d) for d in (decoded(n, x.dtype) for n in layers)]
    for layer, y in zip(layers, got, strict=True):
        weight = nf4.dequantize_to(
            Quantized(layer.weight.detach(), layer.weight.quant_state), x.dtype
        )
        assert torch.equal(y, F.linear(x[:, : len(weight.T)], weight))


@pytest.mark.gpu
@NEEDS_GPU
def test_a_captured_graph_has_memory_of_its_own():
    layer = linear4bit((64, 64), "cuda")
    before = decoded(layer, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decoded(layer, torch.bfloat16)
    graph.replay()
    assert captured.data_ptr() != before.data_ptr()
    assert torch.equal(captured, before)
