"""EVA against a full SVD in float64 of what the layers read, and against PEFT's."""

from contextlib import redirect_stderr
from io import StringIO

import peft
import pytest
import torch
from conftest import FP32, tiny_tokenizer, token_ids

from qlora.adapters.apply import adapter_configs, apply_lora, set_adapter
from qlora.adapters.files import save_adapter
from qlora.adapters.format import read_adapter
from qlora.adapters.lora import lora_layers
from qlora.adapters.starts import main_directions, share_out
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.errors import UserError

R = 4


def batches(seed=0):
    """Two of different lengths, with padding."""
    found = []
    for rows, length in ((4, 24), (6, 9)):
        ids = token_ids(rows=rows, length=length, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def started(base, *, rho=1.0, **settings):
    config = LoraConfig(
        r=R, lora_alpha=6, init_lora_weights="eva", eva_config={"rho": rho}, **settings
    )
    return apply_lora(load_base(str(base), FP32), config, data=batches())


def centred_inputs(model, name):
    """What the layer reads of the real tokens, less their mean, float64 (tokens, in)."""
    seen = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    tokens = []
    with torch.no_grad():
        for batch in batches():
            model(**batch)
            tokens.append(seen.pop()[batch["attention_mask"].bool()])
    hook.remove()
    inputs = torch.cat(tokens).double()
    return inputs - inputs.mean(0)


def test_each_layer_gets_the_main_directions_of_its_inputs(checkpoints):
    base = checkpoints("llama")
    model, plain = started(base), load_base(str(base), FP32)
    assert len(lora_layers(model)) == 14
    for name, layer in lora_layers(model).items():
        inputs = centred_inputs(plain, name)
        lora_A = layer.lora_A["default"].detach().double()
        torch.testing.assert_close(lora_A @ lora_A.T, torch.eye(R).double(), rtol=0, atol=1e-5)
        best = torch.linalg.svdvals(inputs)[:R].square().sum()
        # fp32 moments, and directions that are off by e lose e^2
        torch.testing.assert_close((inputs @ lora_A.T).square().sum(), best, rtol=1e-4, atol=0)


def test_the_model_begins_as_its_base_and_stays_in_training(checkpoints):
    base = load_base(str(checkpoints("llama")), FP32).train()
    with torch.no_grad():
        before = base(token_ids()).logits
        config = LoraConfig(r=R, init_lora_weights="eva")
        model = apply_lora(base, config, data=batches())
        assert model.training
        assert torch.equal(model(token_ids()).logits, before)


@pytest.mark.filterwarnings("ignore")
def test_the_directions_and_ranks_are_peft_s(checkpoints):
    """Of one batch that it reads again and again, PEFT's incremental PCA is the whole one."""
    from peft.tuners.lora.eva import get_eva_state_dict

    base = load_base(str(checkpoints("llama")), FP32)
    batch = batches()[:1]
    theirs_config = peft.LoraConfig(
        r=R,
        target_modules=["q_proj", "o_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, use_label_mask=False, tau=0.999),
    )
    with redirect_stderr(StringIO()):
        theirs = get_eva_state_dict(base, batch, theirs_config, show_progress_bar=False)
    config = LoraConfig(
        r=R, target_modules=("q_proj", "o_proj", "down_proj"), init_lora_weights="eva"
    )
    layers = lora_layers(apply_lora(base, config, data=batch))
    ranks = {name: len(layer.lora_A["default"]) for name, layer in layers.items()}
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 6 * R
    for name, lora_A in theirs.items():
        # theirs comes from a truncated SVD: shares that are nearly equal may change places
        assert abs(ranks.get(name, 0) - len(lora_A)) <= 1
        shared = min(ranks.get(name, 0), len(lora_A), 3)
        own = layers[name].lora_A["default"].detach()[:shared]
        cosines = torch.linalg.svdvals(own @ lora_A.float().T)
        assert cosines.min() > 0.99, name


def test_layers_get_ranks_of_their_own_and_keep_their_scaling(checkpoints, tmp_path):
    model = started(checkpoints("llama"), rho=3.0, rank_pattern={"down_proj": 6})
    config = adapter_configs(model)["default"]
    ranks = {name: len(layer.lora_A["default"]) for name, layer in lora_layers(model).items()}
    assert sum(ranks.values()) == 12 * R + 2 * 6
    assert max(ranks.values()) <= 18
    for name, layer in lora_layers(model).items():
        wanted = 6 / 6 if "down" in name else 6 / R
        assert layer.scaling["default"] == pytest.approx(wanted)
        assert (config.of(name).r, config.of(name).scaling) == (
            ranks[name],
            pytest.approx(wanted),
        )
    save_adapter(model, tmp_path)
    saved = read_adapter(tmp_path)
    assert {name: len(pair.lora_A) for name, pair in saved.pairs.items()} == ranks


def test_a_second_adapter_looks_at_the_base(checkpoints):
    model = load_base(str(checkpoints("llama")), FP32)
    apply_lora(model, LoraConfig(r=2), adapter_name="first")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["first"].normal_()
    config = LoraConfig(r=R, lora_alpha=6, init_lora_weights="eva", eva_config={"rho": 1})
    apply_lora(model, config, data=batches())
    alone = lora_layers(started(checkpoints("llama")))
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A["default"], alone[name].lora_A["default"])
    set_adapter(model, "first")


def test_main_directions_and_their_shares_of_variance():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 64, generator=generator) * torch.logspace(-2, 1, 64)
    inputs -= inputs.mean(0)
    _, values, right = torch.linalg.svd(inputs.double(), full_matrices=False)
    directions, shares = main_directions(inputs.T @ inputs, R)
    cosines = (directions.double() * right[:R]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-4, atol=0)
    wanted = (values**2 / (values**2).sum())[:R].float()
    torch.testing.assert_close(shares, wanted, rtol=1e-4, atol=0)


def test_ranks_go_to_the_directions_with_the_largest_shares():
    shares = {
        "a": torch.tensor([0.5, 0.3, 0.1, 0.05]),
        "b": torch.tensor([0.2, 0.1, 0.05, 0.01]),
        "c": torch.tensor([0.04, 0.03, 0.02, 0.01]),
    }
    assert share_out(shares, 4) == {"a": 3, "b": 1, "c": 0}
    assert sum(share_out(shares, 7).values()) == 7


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, None, "'eva' looks at what the layers read: give apply_lora `data`, batches of"),
        (
            {"r": 65},
            batches(),
            r"more|above that in model.layers.0.self_attn.q_proj, .*up_proj: gi",
        ),
        (
            {"target_modules": ("q_proj", "lm_head")},
            batches(),
            "^lm_head read too little of EVA's data, no more than r tokens: give more of it, or",
        ),
    ],
    ids=["no data", "rank", "idle"],
)
def test_what_eva_cannot_do_is_refused(settings, data, message, checkpoints):
    model = load_base(str(checkpoints("llama")), FP32)
    config = LoraConfig(**{"r": R, **settings}, init_lora_weights="eva")
    with pytest.raises(UserError, match=message):
        apply_lora(model, config, data=data)
    assert not lora_layers(model)


def test_the_tokenizer_s_batches_will_do(checkpoints):
    """As train.py makes them, with labels beside."""
    from qlora.data.rows import length_batches

    rows = [{"input_ids": [5, 6, 7, 8, 9, i], "labels": [-100] * 6} for i in range(40, 80)]
    data = length_batches(rows, tiny_tokenizer())
    model = load_base(str(checkpoints("llama")), FP32)
    apply_lora(model, LoraConfig(r=2, init_lora_weights="eva"), data=data)
    assert lora_layers(model)
