"""First values of A and B, and moments of layers' inputs, against the papers' formulas with a full
SVD in float64, plain sums over tokens, and PEFT."""

from contextlib import redirect_stderr
from io import StringIO
from itertools import product

import peft
import pytest
import reference
import torch
from adapter_kinds import logits, refused
from conftest import FP32, tiny_tokenizer, token_ids
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

from qlora import LoraConfig, apply_lora, load_base, save_adapter
from qlora.adapters import starts
from qlora.adapters.apply import adapter_configs
from qlora.adapters.format import read_adapter
from qlora.adapters.lora import lora_layers
from qlora.adapters.starts import SecondMoments, best_rank, loftq, olora, pissa
from qlora.data.batches import length_batches

R, SCALING = 4, 3.0
# 64 roundings of 6e-8 in a product of values around 1; a direction's error is that times its
# singular value over the gap to the next one, 10 to 30 here
FP32_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
EVA = {"r": R, "init_lora_weights": "eva"}


def random_weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def truncated(weight, r):
    """The best rank r (Eckart and Young), float64."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :r] * values[:r] @ right[:r]


def round_trip(weight):
    return reference.round_trip(weight, double_quant=True).float()


def batches():
    """Two of different lengths, with padding."""
    padded = []
    for rows, length in ((4, 24), (6, 9)):
        ids = token_ids(rows=rows, length=length)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        padded.append({"input_ids": ids, "attention_mask": mask})
    return padded


@torch.no_grad()
def inputs(model, name):
    """A layer's inputs at the real tokens of `batches`, float64 (tokens, in)."""
    seen, tokens = [], []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for batch in batches():
        model(**batch)
        tokens.append(seen.pop()[batch["attention_mask"].bool()])
    hook.remove()
    return torch.cat(tokens).double()


@pytest.fixture(scope="module")
def base(checkpoints):
    return load_base(str(checkpoints("llama")), FP32)


@pytest.fixture
def fresh(checkpoints):
    return load_base(str(checkpoints("llama")), FP32)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64, 64)])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_are_pefts(init, shape):
    weight = random_weight(*shape)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.load_state_dict({"weight": weight})
    asked = {"target_modules": ["0"], "init_lora_weights": init}
    config = peft.LoraConfig(r=R, lora_alpha=R * SCALING, **asked)
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    wanted_A, wanted_B = (getattr(theirs, f"lora_{s}")["default"].weight.detach() for s in "AB")
    lora_A, lora_B = pissa(weight, R, SCALING) if init == "pissa" else olora(weight, R)
    delta = reference.delta(lora_A, lora_B, SCALING)
    if init == "pissa":
        torch.testing.assert_close(delta, truncated(weight, R), **FP32_TOLERANCE)
        signs = (lora_A * wanted_A).sum(1).sign()  # PiSSA's directions may have either
        lora_A, lora_B = lora_A * signs[:, None], lora_B * signs
    torch.testing.assert_close(lora_A, wanted_A, **FP32_TOLERANCE)
    torch.testing.assert_close(lora_B, wanted_B, **FP32_TOLERANCE)
    rest = theirs.base_layer.weight.detach()
    torch.testing.assert_close(weight - delta.float(), rest, **FP32_TOLERANCE)


def test_pissa_with_niter_converges_to_the_exact_one_and_uses_the_generator():
    weight = random_weight(96, 64)

    def error(niter, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pair = pissa(weight, R, SCALING, niter=niter, generator=generator)
        return float((weight.double() - reference.delta(*pair, SCALING)).norm())

    best = float((weight.double() - truncated(weight, R)).norm())
    assert best < error(16) < best * (1 + 1e-4)
    assert error(16) < error(2) < error(0)
    assert error(0, seed=1) != error(0) == error(0)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_papers_whatever_the_scaling(iterations, scaling):
    """Algorithm 1 of arXiv:2310.08659, in float64: the product of the factors, and Q."""
    weight = random_weight(48, 64)
    product = torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(iterations):
        codes = round_trip((weight.double() - product).float()).double()
        product = truncated(weight.double() - codes, R)
    pair, subtracted = loftq(weight, R, scaling, round_trip, iterations=iterations)
    # a value half-way between two codes may take either: the tolerance is a few such steps
    error = float((reference.delta(*pair, scaling) - product).norm() / product.norm())
    assert error < 0.02
    assert (subtracted is None) == (iterations == 1)
    if subtracted is not None:
        rest = weight.double() - reference.delta(*subtracted, scaling)
        own = round_trip(rest.float()).double()
        assert float((own - codes).norm() / codes.norm()) < 0.02
        error = float((weight - own - reference.delta(*pair, scaling)).norm())
        assert error < 1.01 * float((weight - codes - product).norm())


def test_best_rank_is_exact_for_a_matrix_of_lower_rank():
    weight = random_weight(48, 1) @ random_weight(1, 64, seed=1)
    for matrix, r in product((weight, weight.T, torch.zeros(48, 64)), (1, 48)):
        left, right = best_rank(matrix, r)
        assert left.isfinite().all() and right.isfinite().all()
        torch.testing.assert_close(left @ right, matrix, **FP32_TOLERANCE)


@pytest.mark.parametrize("max_bytes", [1 << 30, 4 * (128**2 + 64**2), 1])
def test_moments_are_sums_over_real_tokens(base, max_bytes):
    layers = {n: m for n, m in base.named_modules() if n.endswith("_proj")}
    moments = SecondMoments(base, batches(), layers, max_bytes=max_bytes)
    for name in layers:
        x = inputs(base, name)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(moments.of(name), (x.T @ x).float(), **close)
        covariance = ((len(x) - 1) * torch.cov(x.T)).float()
        torch.testing.assert_close(moments.moments_of(name).covariance(), covariance, **close)
        assert moments.moments_of(name).tokens == len(x)
    assert [n for group in moments.groups for n in group] == list(layers)
    sizes = [  # down_proj has 128 inputs, all others 64
        sum(4 * (128 if "down" in name else 64) ** 2 for name in set(group.values()))
        for group in moments.groups
    ]
    assert all(size <= max_bytes for size in sizes) or len(sizes) == len(layers)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    if max_bytes == 1 << 30:  # layers that read one input share its moments
        assert len(sizes) == 1
        q, k, v, o = (moments.of(f"model.layers.1.self_attn.{name}_proj") for name in "qkvo")
        gate, up = (moments.of(f"model.layers.1.mlp.{name}_proj") for name in ("gate", "up"))
        assert q is k is v and q is not o and gate is up


def test_moments_use_half_of_the_free_gpu_memory(monkeypatch):
    for free in (2 << 30, 50 << 30):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 80 << 30))
        assert starts.moments_budget(torch.device("cuda")) == free // 2
    assert starts.moments_budget(torch.device("cpu")) == starts.MAX_BYTES


def test_each_layer_gets_the_main_directions_of_its_inputs(base, fresh):
    """Also in a second adapter, from the inputs of the base; the model starts as its base."""
    apply_lora(fresh.train(), LoraConfig(r=2), adapter_name="first")
    with torch.no_grad():
        for layer in lora_layers(fresh).values():
            layer.lora_B["first"].normal_()
    apply_lora(fresh, LoraConfig(**EVA, eva_config={"rho": 1}), data=batches())
    assert fresh.training
    assert torch.equal(logits(fresh), logits(base))
    assert len(lora_layers(fresh)) == 14
    for name, layer in lora_layers(fresh).items():
        x = inputs(base, name)
        x -= x.mean(0)
        lora_A = layer.lora_A["default"].detach().double()
        torch.testing.assert_close(lora_A @ lora_A.T, torch.eye(R).double(), rtol=0, atol=1e-5)
        best = torch.linalg.svdvals(x)[:R].square().sum()
        # fp32 moments, and directions that are off by e lose e^2
        torch.testing.assert_close((x @ lora_A.T).square().sum(), best, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_the_directions_and_ranks_are_pefts(fresh):
    targets = ("q_proj", "o_proj", "down_proj")
    batch = batches()[:1]  # repeated, PEFT's incremental PCA equals the full one
    eva = peft.EvaConfig(rho=2.0, use_label_mask=False, tau=0.999)
    config = peft.LoraConfig(**EVA, target_modules=list(targets), eva_config=eva)
    with redirect_stderr(StringIO()):
        theirs = get_eva_state_dict(fresh, batch, config, show_progress_bar=False)
    layers = lora_layers(apply_lora(fresh, LoraConfig(**EVA, target_modules=targets), data=batch))
    ranks = {name: len(layer.lora_A["default"]) for name, layer in layers.items()}
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 6 * R
    for name, lora_A in theirs.items():
        # theirs comes from a truncated SVD: nearly equal shares may swap
        assert abs(ranks.get(name, 0) - len(lora_A)) <= 1
        shared = min(ranks.get(name, 0), len(lora_A), 3)
        ours = layers[name].lora_A["default"].detach()[:shared]
        assert torch.linalg.svdvals(ours @ lora_A.float().T).min() > 0.99, name


def test_layers_get_separate_ranks_and_keep_their_scaling(fresh, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8, 9, i], "labels": [-100] * 6} for i in range(40, 80)]
    config = LoraConfig(**EVA, lora_alpha=6, eva_config={"rho": 3.0}, rank_pattern={"down_proj": 6})
    apply_lora(fresh, config, data=length_batches(rows, tiny_tokenizer()))
    config, layers = adapter_configs(fresh)["default"], lora_layers(fresh)
    ranks = {name: len(layer.lora_A["default"]) for name, layer in layers.items()}
    assert sum(ranks.values()) == 12 * R + 2 * 6
    assert max(ranks.values()) <= 18
    for name, layer in layers.items():
        wanted = pytest.approx(6 / 6 if "down" in name else 6 / R)
        assert layer.scaling["default"] == wanted
        assert (config.of(name).r, config.of(name).scaling) == (ranks[name], wanted)
    save_adapter(fresh, tmp_path)
    assert {n: len(pair.lora_A) for n, pair in read_adapter(tmp_path).pairs.items()} == ranks


def test_main_directions_their_shares_of_variance_and_ranks():
    x = random_weight(500, 64) * torch.logspace(-2, 1, 64)
    x -= x.mean(0)
    _, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    directions, shares = starts.main_directions(x.T @ x, R)
    cosines = (directions.double() * right[:R]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-4, atol=0)
    wanted = (values**2 / (values**2).sum())[:R].float()
    torch.testing.assert_close(shares, wanted, rtol=1e-4, atol=0)
    # ranks go to the largest shares
    values = {"a": [0.5, 0.3, 0.1, 0.05], "b": [0.2, 0.1, 0.05, 0.01], "c": [0.04, 0.03, 0.02]}
    shares = {name: torch.tensor(share) for name, share in values.items()}
    assert starts.redistribute(shares, 4) == {"a": 3, "b": 1, "c": 0}
    assert sum(starts.redistribute(shares, 7).values()) == 7


def test_unusable_settings_or_data_for_eva_are_refused(base):
    for settings, data, message in (
        ({}, None, "'eva' needs inputs of the layers: give apply_lora `data`"),
        ({"r": 65}, batches(), r"r of at most the smaller side .*0.self_attn.q_proj has r=65"),
        ({"target_modules": ("q_proj", "lm_head")}, batches(), "^lm_head read too few tokens of"),
    ):
        with refused(base, message):
            apply_lora(base, LoraConfig(**{**EVA, **settings}), data=data)
