"""Layers calibrated in sequence: both streams against runs of the whole model."""

import pytest
import torch
from conftest import FP32
from merging import rows_file, run_merge
from merging import trained_on as trained_on
from transformers import AutoModelForCausalLM

from qlora.adapters.format import read_adapter
from qlora.adapters.live import load_live
from qlora.adapters.lora import lora_layers
from qlora.merge import codes, moments
from qlora.merge.grids import Q4_0
from qlora.merge.moments import LossMoments
from qlora.merge.streams import Calibration, Streams

IDS = torch.tensor([[1, 20, 21, 22, 23, 24], [1, 30, 31, 32, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[-100, -100, -100, 22, 23, 24], [-100, -100, 31, 32, -100, -100]])
BATCHES = [
    {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS},
    {"input_ids": IDS.flip(1), "attention_mask": torch.ones_like(MASK), "labels": IDS.flip(1)},
]
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])


def live(trained_on, family):
    adapter = read_adapter(trained_on(family).adapter)
    return load_live(adapter.base_model, adapter, quant=FP32)


def weight_of(layer):
    """What it multiplies with (out, in), adapter included."""
    wide = layer.shape[1]
    with torch.no_grad():
        return (layer(torch.eye(wide)) - layer(torch.zeros(1, wide))).T.contiguous()


def inputs_in(model, name, changed):
    """Of each batch what `name` reads when layers have the `changed` weights, in one whole run."""
    layers, seen, hooks = lora_layers(model), [], []
    for other, weight in changed.items():
        change = weight - weight_of(layers[other])
        hooks.append(
            layers[other].register_forward_hook(lambda _, args, y, d=change: y + args[0] @ d.T)
        )
    hooks.append(layers[name].register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    for batch in BATCHES:
        with torch.no_grad():
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return seen


def test_layers_that_read_one_tensor_are_one_stage(trained_on):
    model = live(trained_on, "llama")
    streams = Streams(model, BATCHES, lora_layers(model))
    stages = {name.rpartition(".")[2]: place for name, place in streams.places.items()}
    of = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
    of |= {"gate_proj": 2, "up_proj": 2, "down_proj": 3}
    assert stages == {name: (1, stage) for name, stage in of.items()}  # of the last layer
    assert len(streams.places) == 14


@FAMILIES
def test_streams_are_those_of_the_model_as_trained_and_as_merged(trained_on, family):
    model = live(trained_on, family)
    layers = lora_layers(model)
    streams = Streams(model, BATCHES, layers)
    assert streams.places.keys() == layers.keys()
    for _ in range(2):  # a second merge begins anew
        changed = {}
        for name, layer in layers.items():
            found = list(streams.inputs(name))
            # the layers of this stage are chosen, which it does not read
            before = {n: w for n, w in changed.items() if streams.places[n] < streams.places[name]}
            wanted = inputs_in(model, name, {}), inputs_in(model, name, before)
            for (x, y), *both in zip(found, *wanted, strict=True):
                torch.testing.assert_close(x, both[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(y, both[1], rtol=1e-4, atol=1e-5)
            assert not before or not torch.equal(found[0][0], found[0][1])
            changed[name] = Q4_0(weight_of(layer).T.contiguous()).weight.T
            streams.chosen[name] = changed[name]


def test_moments_of_the_merged_inputs_and_their_drift(trained_on, monkeypatch):
    monkeypatch.setattr(moments, "BLOCK", 24)  # several a layer
    model = live(trained_on, "llama")
    layers = lora_layers(model)
    calibration = Calibration(model, BATCHES, layers, in_sequence=True)
    plain = LossMoments(model, BATCHES, layers, with_outputs=True)
    sizes = LossMoments(model, BATCHES, layers, with_outputs=True, sized=layers)
    names = list(layers)
    first, name = names[0], "model.layers.1.mlp.down_proj"
    found = calibration.of(first)  # nothing is merged before it
    torch.testing.assert_close(found.inputs, plain.of(first).inputs)
    torch.testing.assert_close(found.outputs, plain.of(first).outputs)
    assert not found.drift.any()
    changed = {n: Q4_0(weight_of(layers[n]).T.contiguous()).weight.T for n in names[:-1]}
    for each, weight in changed.items():
        calibration.of(each)
        calibration.chose(each, weight)
    found, counts = calibration.of(name), torch.cat([s.flatten() for s in sizes.sizes_of(name)])
    x, y = (
        torch.cat([i.flatten(0, 1) for i in inputs_in(model, name, given)])
        for given in ({}, changed)
    )
    close = {"rtol": 1e-3, "atol": 1e-3 * float(found.drift.abs().max())}
    torch.testing.assert_close(found.inputs, torch.einsum("t,ti,tj->ij", counts, y, y), **close)
    torch.testing.assert_close(found.drift, torch.einsum("t,ti,tj->ij", counts, x - y, y), **close)
    assert found.drift.any()


def test_values_make_up_for_what_the_layers_before_have_changed():
    draw = torch.Generator().manual_seed(0)
    target, x = torch.randn(48, 64, generator=draw), torch.randn(2000, 64, generator=draw)
    y = x + 0.3 * torch.randn(2000, 64, generator=draw) + 0.2 * x.roll(1, 1)
    errors = []
    for drift in None, (x - y).T @ y:
        grid = Q4_0(target.T.contiguous())
        codes.keep_outputs(grid, target, moments.Moments(y.T @ y, None, drift))
        errors.append(float((x @ target.T - y @ grid.weight).square().sum()))
    assert errors[1] < 0.75 * errors[0]  # half of the step: three quarters of what it gains


@pytest.mark.parametrize("occur", [48, 7, 0])
def test_what_a_layer_is_asked_to_make_up_for(occur):
    """Of inputs in few directions, of very different sizes, and of a layer that reads zeros."""
    draw = torch.Generator().manual_seed(0)
    target, x = torch.randn(8, 48, generator=draw), torch.randn(200, 48, generator=draw)
    y = (x + 0.1 * x.roll(1, 1))[:, :occur] @ torch.randn(occur, 48, generator=draw)
    sizes = torch.logspace(0, 3, 48)
    x, y = x * sizes, y * sizes
    inputs, drift = y.T @ y, (x - y).T @ y
    inputs.diagonal().mul_(1 + codes.RIDGE)
    found = codes._made_up(target, inputs, codes._factor(inputs, 64), drift)
    inverse = torch.linalg.pinv(inputs.double(), rtol=1e-14, hermitian=True)
    wanted = target.double() @ drift.double() @ inverse @ y.T.double()
    scale = float(wanted.std())
    torch.testing.assert_close(found.double() @ y.T.double(), wanted, rtol=0, atol=0.01 * scale)
    assert bool(scale) == bool(occur)


def test_a_model_that_is_no_chain_is_calibrated_on_its_own_inputs(trained_on):
    model = live(trained_on, "llama")
    layers = lora_layers(model)
    second = model.model.layers[1]
    hook = second.register_forward_pre_hook(lambda _, args: (args[0] + 0, *args[1:]))
    calibration = Calibration(model, BATCHES, layers, in_sequence=True)
    plain = LossMoments(model, BATCHES, layers, with_outputs=True)
    for name in layers:
        found = calibration.of(name)
        assert found.drift is None
        assert torch.equal(found.inputs, plain.of(name).inputs)
    hook.remove()


def test_a_layer_that_reads_some_tokens_only_is_left_out(trained_on):
    model = live(trained_on, "llama")
    layers = lora_layers(model)
    name = "model.layers.0.mlp.down_proj"
    streams = Streams(model, BATCHES, layers)
    shape = BATCHES[0]["input_ids"].shape
    streams.places.clear()
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: (args[0][:, :3],))
    back = model.model.layers[0].mlp.register_forward_hook(
        lambda _, args, y: torch.nn.functional.pad(y, (0, 0, 0, shape[1] - 3))
    )
    streams._find_stages(shape)
    assert name not in streams.places
    assert name.replace("0", "1") in streams.places
    hook.remove()
    back.remove()


def test_the_model_is_left_as_it_was(trained_on):
    model = live(trained_on, "gpt2")
    layers, batch = lora_layers(model), {k: v for k, v in BATCHES[0].items() if k != "labels"}
    before = model(**batch).logits
    streams = Streams(model, BATCHES, layers)
    for name, layer in layers.items():
        list(streams.inputs(name))
        streams.chosen[name] = torch.zeros(layer.shape)
    assert torch.equal(model(**batch).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(layer) for layer in layers.values())


def test_a_merge_tells_what_it_has_chosen(trained_on, tmp_path, monkeypatch):
    told, chose = {}, Calibration.chose
    note = lambda self, name, weight: (told.update({name: weight}), chose(self, name, weight))  # noqa: E731
    monkeypatch.setattr(Calibration, "chose", note)
    trained, output = trained_on("llama"), tmp_path / "out"
    run_merge(trained.adapter, output, format="int4", calibration=rows_file(tmp_path))
    written = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert list(told) == list(lora_layers(trained.model))  # in the model's order
    for name, weight in told.items():
        torch.testing.assert_close(written.get_submodule(name).weight, weight, rtol=1e-2, atol=1e-4)
