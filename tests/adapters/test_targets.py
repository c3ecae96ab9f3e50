"""Which layers a config means: what PEFT chooses, with PEFT's own functions as the oracle."""

import peft
import pytest
from adapter_kinds import FP32_OR_16_BITS, QV, refused
from conftest import FP32, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from qlora import LoraConfig, UserError, apply_lora, load_base
from qlora.adapters.lora import lora_layers
from qlora.adapters.targets import target_layers
from qlora.config.lora import pattern_key

NAMES = [
    "fc", "head.fc", "blocks.1.fc", "model.layers.0.q", "model.layers.0.experts.2.up.q",
    "model.layers.1.attn.q", "model.layers.1.attn.kq", "model.layers.1.experts.0.up.q",
    "model.layers.10.attn.q", "model.layers.10.mlp.fc", "model.decoder.h.2.layers.1.q",
    "model.h.01.attn.fc", "layers.3.q", "a.0.b", "x.y.007.z.1.q", "h.2.h.1.fc",
]  # fmt: skip


ENDINGS = sorted({".".join(n.split(".")[i:]) for n in NAMES for i in range(len(n.split(".")))})
TREE = nn.Module()  # of linear layers with these names
for name in NAMES:
    parent, _, leaf = name.rpartition(".")
    at = TREE
    for part in filter(None, parent.split(".")):
        if not hasattr(at, part):
            at.add_module(part, nn.Module())
        at = getattr(at, part)
    at.add_module(leaf, nn.Linear(2, 2, bias=False, device="meta"))


def by_peft(config):
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    values = {field: getattr(config, field) or None for field in fields}
    lists = {field: list(v) if isinstance(v, tuple) else v for field, v in values.items()}
    return [n for n in NAMES if check_target_module_exists(peft.LoraConfig(**lists), n)]


entries = st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=4, unique=True).map(tuple)
nothing = st.just(())


@settings(max_examples=150, deadline=None, database=None)
@given(
    targets=entries,
    exclude=nothing | entries,
    layers=nothing | st.lists(st.sampled_from([0, 1, 2, 7]), min_size=1, unique=True).map(tuple),
    pattern=nothing | st.sampled_from([("layers",), ("h",), ("blocks", "h"), ("model.layers",)]),
)
def test_lists_mean_what_they_mean_in_peft(targets, exclude, layers, pattern):
    values = {"layers_to_transform": layers, "layers_pattern": pattern} if layers else {}
    config = LoraConfig(target_modules=targets, exclude_modules=exclude, **values)
    wanted = by_peft(config)
    try:
        assert target_layers(TREE, config) == wanted
    except UserError as error:  # PEFT is silent about layers that are not there
        assert not wanted or "layers_to_transform" in str(error)


@pytest.mark.parametrize(("target", "exclude"), [
    (r".*\.q", ()),
    (r"model\..*(q|fc)", r".*experts.*"),
    (r".*fc", ("blocks.1.fc", "head.fc")),
    (r"fc|.*\.kq", ()),
    (r"model\.layers\.\d\.(.*\.)?k?q", r".*\.0\..*"),
])  # fmt: skip
def test_regular_expressions_mean_what_they_mean_in_peft(target, exclude):
    config = LoraConfig(target_modules=target, exclude_modules=exclude)
    assert target_layers(TREE, config) == by_peft(config) != []


@given(
    pattern=st.lists(st.sampled_from([*ENDINGS, r"q|fc", r".*attn.q", r"\d+\.q", "k?q"])),
    name=st.sampled_from(NAMES),
)
@settings(deadline=None, database=None)
def test_patterns_are_for_the_layers_that_peft_takes_them_for(pattern, name):
    assert (pattern_key(pattern, name) or name) == get_pattern_key(pattern, name)


@pytest.mark.parametrize(("family", "targets"), [
    ("llama", "all-linear"),
    ("llama", ("q_proj", "lm_head")),
    ("phi", "all-linear"),
    ("mixtral", ("q_proj", "o_proj")),  # by all-linear PEFT means router and experts as well
    ("gpt2", "all-linear"),
])  # fmt: skip
def test_the_layers_of_models_are_those_that_peft_chooses(family, targets, checkpoints):
    base = tiny_model(family) if family != "gpt2" else load_base(str(checkpoints(family)), FP32)
    model = apply_lora(base, LoraConfig(r=2, target_modules=targets))
    lists = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=2, target_modules=lists, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(tiny_model(family), config)
    assert set(lora_layers(model)) == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def test_targets_come_in_the_models_order_also_of_an_adapted_model():
    """The matrices of an adapter, and the layer behind it, are no targets."""
    model, config = tiny_model("llama"), LoraConfig(target_modules=("v_proj", "q_proj"))
    names = target_layers(model, config)
    assert [name.split(".", 2)[2] for name in names] == [
        "0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj",
    ]  # fmt: skip
    every = target_layers(model, LoraConfig(target_modules=("all-linear",)))
    assert len(every) == 14 and "lm_head" not in every
    some = LoraConfig(layers_to_transform=(1,), exclude_modules=("mlp.up_proj",))
    assert target_layers(model, some) == [n for n in every if ".1." in n and "up_proj" not in n]
    apply_lora(model, LoraConfig(r=2))
    assert target_layers(model, config) == names and target_layers(model, LoraConfig()) == every


LEAVES = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
ROWS = "trainable_token_indices"
REFUSED = {
    "llama": [
        ({"target_modules": ("query",)}, rf"'query' matches no layer\..*from: {LEAVES}\."),
        ({"target_modules": ("q_prj",)}, r"'q_prj' matches no layer\. Did you mean q_proj\?"),
        ({"target_modules": ("q_proj", "x", "y")}, "target_modules 'x', 'y' matches no layer"),
        ({"target_modules": ("proj",)}, "'proj' matches no layer"),  # part of a name is no ending
        ({"target_modules": r".*mlp\.up"}, "matches no layer"),  # the whole name is matched
        ({"target_modules": "q_proj"}, "'q_proj' matches no layer"),  # likewise
        ({"target_modules": "q_proj,v_proj"}, "layer. Put spaces .*in Python, give a list. Choose"),
        ({"modules_to_save": ("norm lm_head",)}, "'norm lm_head' matches no module. Put spaces"),
        ({"target_modules": "*q_proj"}, r"'\*q_proj' is no regular .* endings give a list"),
        ({"target_modules": ("norm",)}, r"or embedding: model\.norm\. .* linear layers: down_proj"),
        ({"target_modules": ".*"}, r"convolution or embedding: .* and \d+ more\. This"),
        ({"exclude_modules": ("qproj",)}, r"exclude_modules 'qproj' .*Did you mean q_proj\?"),
        ({"exclude_modules": ".*"}, "exclude_modules leaves none of the layers"),
        ({"exclude_modules": "("}, r"exclude_modules '\(' is no regular expression"),
        ({"layers_to_transform": (7,)}, "7 matches no layer: the targets have 0 to 1$"),
        ({"layers_to_transform": (0,), "layers_pattern": ("blocks",)}, "no numbers after blocks"),
        ({"rank_pattern": {"qproj": 2}}, r"rank_pattern 'qproj' matches no .*mean q_proj\?"),
        ({"alpha_pattern": {"lm_head": 2}}, "no adapted layer. Choose from: q_proj, v_proj"),
        ({"modules_to_save": ("lm_hed",)}, r"no module\. Did you mean lm_head\?"),
        ({"modules_to_save": ("q_proj",)}, "q_proj is in target_modules and in modules_to_save"),
        ({"target_modules": "all-linear", "modules_to_save": ("model",)}, "leaves none"),
        ({"bias": "all"}, "bias=all has nothing to train: no module has a bias"),
        ({ROWS: (5, 320)}, f"{ROWS} 320: model.embed_tokens has 320 rows"),
        ({ROWS: {"q_proj": (5,)}}, "'q_proj' matches no embedding"),
        ({"target_modules": ("embed_tokens",), ROWS: (5,)}, f"trained in full, and in {ROWS}"),
        ({"target_modules": ("embed_tokens",), "lora_bias": True}, "an embedding, which has no"),
        ({"revision": "v2"}, "revision='v2', and the base was loaded at its default"),
        ({"fan_in_fan_out": True}, r"layers store \(out, in\): leave"),
    ],
    "gpt2": [
        ({"target_modules": ("c_attn",), "fan_in_fan_out": False}, r"store \(in, out\): leave")
    ],
    "qwen2": [({"bias": "lora_only", "target_modules": ("o_proj",)}, "no layer of target_modules")],
    "mixtral": [
        ({"target_parameters": ("experts.up",)}, "'experts.up' matches no parameter"),
        ({"target_parameters": ("norm.weight",)}, "norm.weight, which is no matrix in 16"),
    ],
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_model_as_it_was(family, checkpoints):
    model = load_base(str(checkpoints(family, False)), FP32_OR_16_BITS).eval()
    model.lm_head.weight.requires_grad_(True)
    for config, message in REFUSED[family]:
        with refused(model, message):
            apply_lora(model, LoraConfig(r=2, **{"target_modules": QV} | config))


def test_a_model_without_linear_layers_or_a_known_vocabulary_is_refused():
    embedding = nn.Sequential(nn.Embedding(2, 2))
    with pytest.raises(UserError, match="all-linear found no linear layer: name layers"):
        apply_lora(embedding)
    with pytest.raises(UserError, match="which embedding is meant"):
        apply_lora(embedding, LoraConfig(target_modules=("0",), trainable_token_indices=(1,)))
