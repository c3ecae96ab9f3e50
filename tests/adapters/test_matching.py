"""Which layers a config means: what PEFT chooses, with PEFT's own functions as the oracle."""

import peft
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from qlora.adapters.apply import apply_lora
from qlora.adapters.lora import lora_layers
from qlora.adapters.targets import layer_number, target_layers
from qlora.config.lora import LoraConfig, pattern_key
from qlora.errors import UserError

NAMES = [
    "fc",
    "head.fc",
    "blocks.1.fc",
    "model.layers.0.q",
    "model.layers.0.experts.2.up.q",
    "model.layers.1.attn.q",
    "model.layers.1.attn.kq",
    "model.layers.1.experts.0.up.q",
    "model.layers.10.attn.q",
    "model.layers.10.mlp.fc",
    "model.decoder.h.2.layers.1.q",
    "model.h.01.attn.fc",
]


def tree(names):
    """A model of linear layers with these names."""
    root = nn.Module()
    for name in names:
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(leaf, nn.Linear(2, 2, bias=False, device="meta"))
    return root


def by_peft(config, names):
    values = {
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules or None,
        "layers_to_transform": list(config.layers_to_transform) or None,
        "layers_pattern": list(config.layers_pattern) or None,
    }
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    peft_config = peft.LoraConfig(**lists)
    return [name for name in names if check_target_module_exists(peft_config, name)]


def endings(names):
    return sorted({".".join(n.split(".")[i:]) for n in names for i in range(len(n.split(".")))})


entries = st.lists(st.sampled_from(endings(NAMES)), min_size=1, max_size=4, unique=True).map(tuple)
nothing = st.just(())


@settings(max_examples=400, deadline=None, database=None)
@given(
    targets=entries,
    exclude=nothing | entries,
    layers=nothing | st.lists(st.sampled_from([0, 1, 2, 10]), min_size=1, unique=True).map(tuple),
    pattern=nothing | st.sampled_from([("layers",), ("h",), ("blocks", "h"), ("model.layers",)]),
)
def test_lists_mean_what_they_mean_in_peft(targets, exclude, layers, pattern):
    config = LoraConfig(
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=pattern if layers else (),
    )
    wanted = by_peft(config, NAMES)
    try:
        assert target_layers(tree(NAMES), config) == wanted
    except UserError as error:  # PEFT is silent about layers that are not there
        told = str(error)
        assert not wanted or "layers_to_transform" in told


@pytest.mark.parametrize(
    ("target", "exclude"),
    [
        (r".*\.q", ()),
        (r"model\..*(q|fc)", r".*experts.*"),
        (r".*fc", ("blocks.1.fc", "head.fc")),
        (r"fc|.*\.kq", ()),
        (r"model\.layers\.\d\.(.*\.)?k?q", r".*\.0\..*"),
    ],
)
def test_regular_expressions_mean_what_they_mean_in_peft(target, exclude):
    config = LoraConfig(target_modules=target, exclude_modules=exclude)
    found = target_layers(tree(NAMES), config)
    assert found == by_peft(config, NAMES) != []


@pytest.mark.parametrize("pattern", [(), ("layers",), ("h",), ("model.layers",), ("blocks", "h")])
@pytest.mark.parametrize("name", [*NAMES[1:], "layers.3.q", "a.0", "a.0.b", "x.y.007.z.1.w"])
def test_the_number_of_a_layer_is_the_one_that_peft_sees(name, pattern):
    leaf = name.rpartition(".")[2]
    values = {"target_modules": [leaf], "layers_pattern": list(pattern) or None}
    number = layer_number(name, pattern)
    for tried in {0, 1, 2, 3, 7, 10} - {number}:
        config = peft.LoraConfig(layers_to_transform=[tried], **values)
        assert not check_target_module_exists(config, name)
    if number is not None:
        config = peft.LoraConfig(layers_to_transform=[number], **values)
        assert check_target_module_exists(config, name)


@given(
    pattern=st.lists(st.sampled_from([*endings(NAMES), r"q|fc", r".*attn.q", r"\d+\.q", "k?q"])),
    name=st.sampled_from(NAMES),
)
@settings(deadline=None, database=None)
def test_patterns_are_for_the_layers_that_peft_takes_them_for(pattern, name):
    theirs = get_pattern_key(pattern, name)
    assert (pattern_key(pattern, name) or name) == theirs


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_are_pefts(use_rslora):
    values = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": use_rslora,
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*_proj": 6},
        "alpha_pattern": {"q_proj": 5, "0.mlp.up_proj": 12.5},
    }
    ours = lora_layers(apply_lora(tiny_model("llama"), LoraConfig(**values)))
    theirs = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules="all-linear", **values)
    )
    for name, layer in ours.items():
        wanted = theirs.get_submodule(f"base_model.model.{name}")
        assert len(layer.lora_A["default"]) == wanted.r["default"], name
        assert layer.scaling["default"] == pytest.approx(wanted.scaling["default"]), name
    assert len({layer.scaling["default"] for layer in ours.values()}) > 3


LEAVES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exclude_modules": ("qproj",)}, r"exclude_modules 'qproj' .*Did you mean q_proj\?"),
        ({"exclude_modules": ".*"}, "exclude_modules leaves none of the layers"),
        ({"exclude_modules": "("}, "exclude_modules '\\(' is no regular expression"),
        ({"layers_to_transform": (7,)}, "7 matches no layer: .*this model has numbers 0 to 1$"),
        (
            {"layers_to_transform": (0,), "layers_pattern": ("blocks",)},
            "this model has no numbered layer after blocks",
        ),
        ({"rank_pattern": {"qproj": 2}}, r"rank_pattern 'qproj' matches no .*mean q_proj\?"),
        ({"alpha_pattern": {"lm_head": 2}}, f"no adapted layer. Choose from: {LEAVES}"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_an_error(values, message):
    model = tiny_model("llama")
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        apply_lora(model, LoraConfig(**values))
    assert dict(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_to_transform": (0,), "target_modules": ".*q"}, "write the numbers themselves"),
        ({"layers_pattern": ("layers",)}, "give both"),
        ({"rank_pattern": {"q": 0}}, "q in rank_pattern must be a whole number above 0, got 0"),
        ({"rank_pattern": {"q": True}}, "must be a whole number above 0, got True"),
        ({"alpha_pattern": {"*": 1}}, r"'\*' in alpha_pattern is no regular expression"),
        ({"alpha_pattern": {"q": -1.5}}, "q in alpha_pattern must be a number above 0, got -1.5"),
        ({"rank_pattern": ["q"]}, r"rank_pattern must be NAME: NUMBER pairs, got \['q'\]"),
    ],
    ids=str,
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**values)


def test_some_layers_of_all_linear():
    config = LoraConfig(layers_to_transform=(1,), exclude_modules=("mlp.up_proj",))
    found = target_layers(tiny_model("llama"), config)
    assert len(found) == 6 and all(".1." in name for name in found)
    with torch.no_grad():
        apply_lora(tiny_model("llama"), config)
