"""The dense weight of a frozen layer: its values, its decoder, and the memory it lies in."""

import threading
from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import DEVICES, axis, on_gpu
from torch import nn
from torch.nn import functional as F

from qlora.config import QuantConfig
from qlora.ops import nf4
from qlora.ops.nf4 import DECODERS, Quantized, decoded, into_scratch, scratch


def linear4bit(rows: int, columns: int, device: str, quant_type: str = "nf4") -> nn.Module:
    """A layer as a model has it, whose weight is bitsandbytes' subclass of a Parameter."""
    torch.manual_seed(0)
    return bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type=quant_type).to(device)


def dense(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    return nf4.dequantize(Quantized(layer.weight.detach(), layer.weight.quant_state), dtype)


@pytest.fixture(autouse=True)
def fresh_buffers():
    """Buffers belong to a thread, and all tests run in one."""
    vars(nf4._thread).clear()
    yield
    vars(nf4._thread).clear()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", axis(torch.bfloat16, torch.float32, torch.float16))
@pytest.mark.parametrize("quant_type", axis("nf4", "fp4"))
def test_a_4_bit_layer(quant_type, dtype, device):
    layer = linear4bit(96, 128, device, quant_type)
    weights = [decoded(layer, dtype) for _ in range(2)]
    assert (weights[0].data_ptr() == weights[1].data_ptr()) == (device == "cuda")
    for weight in weights:
        assert torch.equal(weight, dense(layer, dtype))
        assert type(weight) is torch.Tensor and not weight.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_freed_buffers_are_made_anew(device):
    layer = linear4bit(64, 64, device)
    for _ in range(2):
        assert torch.equal(decoded(layer, torch.float32), dense(layer, torch.float32))
        nf4.free_scratch()
        assert "buffers" not in vars(nf4._thread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_that_is_not_quantized(dtype):
    layer = nn.Linear(5, 3)
    weight = decoded(layer, dtype)
    assert torch.equal(weight, layer.weight.to(dtype)) and not weight.requires_grad
    assert decoded(layer, torch.float32).data_ptr() == layer.weight.data_ptr()


def test_triton_decodes_if_it_agrees_with_bitsandbytes(kernel_device, monkeypatch, caplog):
    monkeypatch.setattr(nf4, "may_use_triton", lambda *_: True)
    monkeypatch.setattr(nf4, "triton_decodes", nf4.triton_decodes.__wrapped__)  # no cache
    assert nf4.triton_decodes(kernel_device, torch.float32)
    monkeypatch.setattr(nf4, "_by_triton", lambda quantized, out: out.zero_())
    assert not nf4.triton_decodes(kernel_device, torch.float32)
    assert "Triton's decoding to torch.float32" in caplog.text


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("agrees", [True, False])
def test_which_decoder_is_used(name, agrees, monkeypatch):
    monkeypatch.setattr(nf4, "GPU_DECODER", name)
    monkeypatch.setattr(nf4, "triton_decodes", lambda *_: agrees)
    used = [nf4.decoder(torch.device(kind), torch.bfloat16) for kind in ("cuda", "cpu", "xpu")]
    assert used == [DECODERS[name if agrees else "bitsandbytes"], None, None]


@on_gpu
def test_the_fastest_decoder_is_one_that_is_right():
    device = torch.device("cuda", 0)
    assert nf4.fastest_decoder(device, torch.bfloat16) in DECODERS
    assert nf4.fastest_decoder(device, torch.float64) == "bitsandbytes"  # has no kernel


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(nf4, "triton_decodes", lambda *_: False)
    fastest = nf4.fastest_decoder.__wrapped__
    assert fastest(torch.device("cuda"), torch.bfloat16) == "bitsandbytes"


@on_gpu
def test_bitsandbytes_decoding_into_a_tensor_is_a_change_that_autograd_sees():
    quantized = nf4.quantize(torch.randn(48, 64, device="cuda"), QuantConfig())
    out = torch.empty(48, 64, device="cuda")
    version = out._version
    DECODERS["bitsandbytes"](quantized, out)
    assert out._version > version and torch.equal(out, nf4.dequantize(quantized))


@pytest.mark.parametrize("device", DEVICES)
def test_slots_threads_and_streams_have_buffers_that_grow(device):
    small, large = torch.Size((3, 5)), torch.Size((30, 50))
    get = partial(scratch, dtype=torch.float32, device=torch.device(device), slot=0)
    first, others = get(small), [get(small, slot=1)]
    run = threading.Thread(target=lambda: others.append(get(small)))
    run.start()
    run.join()
    if device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            others.append(get(small))
    assert all(other.data_ptr() != first.data_ptr() for other in others)
    assert get(small, dtype=torch.bfloat16).data_ptr() == first.data_ptr()
    grown = get(large)
    assert (grown.shape, grown.dtype) == (large, torch.float32)
    assert get(small, dtype=torch.float16).data_ptr() == grown.data_ptr()
    # the other thread's has gone
    held = sum(len(views[None]) for views in nf4._thread.buffers.values())
    assert held == 30 * 50 * 4 + (2 if device == "cuda" else 1) * 3 * 5 * 4


@pytest.mark.parametrize(("fraction", "has_room"), [(1.0, True), (0.1, True), (0.07, False)])
def test_room_is_of_what_torch_may_take(fraction, has_room, monkeypatch):
    """1 GiB more beside 6 GiB that are used, of 100 GiB with 10 GiB that are free."""
    memory: dict[str, Any] = {
        "mem_get_info": (10 << 30, 100 << 30), "memory_allocated": 6 << 30,
        "memory_reserved": 8 << 30, "get_per_process_memory_fraction": fraction,
    }  # fmt: skip
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(nf4, "_thread", threading.local())
    monkeypatch.setattr(nf4, "SPARE", 0.1)
    assert nf4._has_room(3, 1 << 30, torch.device("cuda", 0)) == has_room


@on_gpu
def test_a_weight_is_kept_where_the_gpu_has_room(monkeypatch):
    layer, found = linear4bit(64, 96, "cuda"), []
    x = torch.ones(1, requires_grad=True, device="cuda")

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            found.append(nf4.keep(layer, torch.bfloat16, 3).clone())
            found.append(nf4.kept(layer, torch.bfloat16, 3))
            found.append(nf4._thread.room[3])
            vars(nf4._thread).clear()
            return dx

    for spare, has_room in ((0.0, True), (1.0, False)):
        monkeypatch.setattr(nf4, "SPARE", spare)
        found.clear()
        Twice.apply(x).backward()
        assert torch.equal(found[0], dense(layer, torch.bfloat16))
        assert torch.equal(found[0], found[1]) and found[2] is has_room
    assert torch.equal(nf4.keep(layer, torch.bfloat16, 3), found[0])  # outside: decoded
    assert torch.equal(nf4.kept(layer, torch.bfloat16, 3), found[0])


def test_a_kept_weight_is_that_of_its_layer(monkeypatch):
    """Another layer may have overwritten it, or written over its buffer."""
    layers, found = [linear4bit(64, 96, "cpu"), linear4bit(64, 96, "cpu", "fp4")], []
    monkeypatch.setattr(nf4, "decoder", lambda *_: lambda q, out: out.copy_(dequantize(q, out)))
    monkeypatch.setattr(nf4, "_has_room", lambda *_: True)

    def dequantize(quantized, out):
        return nf4.dequantize(quantized, out.dtype)

    def in_backward(dx):
        nf4.keep(layers[0], torch.float32, 3)
        nf4.keep(layers[1], torch.float32, 3)
        found.append(nf4.kept(layers[0], torch.float32, 3).clone())
        nf4.keep(layers[0], torch.float32, 3)
        decoded(layers[1], torch.float32, 3)
        found.append(nf4.kept(layers[0], torch.float32, 3).clone())

    x = torch.ones(1, requires_grad=True)
    x.register_hook(in_backward)
    x.sum().backward()
    assert len(found) == 2 and all(torch.equal(w, dense(layers[0], w.dtype)) for w in found)


@pytest.mark.parametrize("modes", [(False, False), (True, True), (True, False)])
def test_decoding_overwrites_scratch_and_autograd_reports_it(kernel_device, modes):
    """Buffers made and overwritten in inference mode are watched, too."""
    x = torch.ones(1, 64, device=kernel_device, requires_grad=True)
    ys = []
    for i, inference in enumerate(modes):
        quantized = nf4.quantize(torch.randn(48, 64, device=kernel_device) + i, QuantConfig())
        with torch.inference_mode(inference):
            weight = into_scratch(quantized, torch.float32, 0, DECODERS["triton"])
            assert torch.equal(weight, nf4.dequantize(quantized))
        ys.append(F.linear(x, weight))
        (dx,) = torch.autograd.grad(ys[i].sum(), x, retain_graph=True)
        torch.testing.assert_close(dx, weight.sum(0, keepdim=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[0].sum().backward()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", DECODERS)
def test_products_in_a_row_read_their_own_weights(name, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "GPU_DECODER", name)
    kinds = ["nf4", "fp4"] * 3
    layers = [linear4bit(300, 200 + 64 * i, "cuda", kind) for i, kind in enumerate(kinds)]
    x = torch.randn(512, 1024, device="cuda", dtype=dtype)
    ys = [F.linear(x[:, : len(d.T)], d) for d in (decoded(layer, dtype) for layer in layers)]
    for layer, y in zip(layers, ys, strict=True):
        weight = dense(layer, dtype)
        assert torch.equal(decoded(layer, dtype), weight)
        assert torch.equal(y, F.linear(x[:, : len(weight.T)], weight))


@on_gpu
def test_a_captured_graph_has_its_own_memory():
    layer = linear4bit(64, 64, "cuda")
    before = decoded(layer, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decoded(layer, torch.bfloat16)
    graph.replay()
    assert captured.data_ptr() != before.data_ptr()
    assert torch.equal(captured, before)
