"""Every kind of adapter, merged, against PEFT's live model; several at once; files that misfit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_kinds import ADAPTER_KINDS, FP32_OR_16_BITS, logits
from conftest import FP32, VOCAB, axis
from merging import merged, refused, report_of, require_logits, run_merge, trained
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora import UserError, disable_adapter, load_adapter, load_base
from qlora.adapters.format import combine, read_adapter
from qlora.adapters.live import load_live
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import Checkpoint

KINDS = [
    kind
    for kind, asked in ADAPTER_KINDS.items()
    if asked.base == "any" and not asked.by_peft and asked.family != "mixtral"
]
OFTEN = [
    "rslora, alphas and ranks", "dora on conv1d", "dora beside biases", "all biases", "lora_bias",
    "norms", "embedding and tied head", "lora on the tied embedding", "lora on the tied head",
    "dora on the embedding", "token rows, tied", "token rows of the head", "grown vocabulary",
]  # fmt: skip
EACH_KIND = [*OFTEN, *axis("lora", *(kind for kind in KINDS if kind not in [*OFTEN, "lora"]))]


def edit(adapter: Path, change: Any = dict, **config: Any) -> None:
    """`change` is given the tensors as stored, and returns others; `config` is set."""
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture
def plain(adapter_build, tmp_path):
    return shutil.copytree(adapter_build("lora").peft_folder, tmp_path / "adapter")


# ---- one adapter ----


@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_merged_model_is_pefts_live_model(kind, adapter_build, tmp_path):
    built = adapter_build(kind)
    assert (built.base_logits - built.logits).abs().max() > 1e-3  # the adapter is not idle
    run_merge(built.peft_folder, tmp_path / "fp32", format="fp32")
    require_logits(tmp_path / "fp32", built.logits)
    run_merge(built.peft_folder, tmp_path / "nf4", format="nf4", calibration="none")
    change = logits(load_base(str(tmp_path / "nf4"), FP32_OR_16_BITS)) - built.base_logits
    wanted = built.logits - built.base_logits
    share = float((change * wanted).sum() / wanted.square().sum())
    # noise, without data; a merge without the adapter, or with it twice, has 0 or 2
    assert share == pytest.approx(1, abs=0.5)
    for output in (tmp_path / "fp32", tmp_path / "nf4"):
        assert Checkpoint(output).config["vocab_size"] == built.logits.shape[-1]


def test_a_layer_trained_in_full_is_not_quantized(adapter_build, checkpoints, tmp_path):
    """Neither in the merge nor when transformers loads it again."""
    adapter = shutil.copytree(adapter_build("q_proj alone").peft_folder, tmp_path / "adapter")
    name, weight = "model.layers.1.mlp.up_proj.weight", torch.randn(128, 64) * 0.1
    in_full = {f"base_model.model.{name}": weight}
    edit(adapter, lambda tensors: tensors | in_full, modules_to_save=["layers.1.mlp.up_proj"])
    for format_ in ("fp32", "nf4"):
        data = {"calibration": "none"} if format_ == "nf4" else {}
        tensors = merged(adapter, tmp_path / format_, format=format_, **data)
        rtol = 1e-2 * (format_ == "nf4")
        torch.testing.assert_close(tensors[name].float(), weight, rtol=rtol, atol=0)
    settings = Checkpoint(tmp_path / "nf4").config["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in settings["llm_int8_skip_modules"]
    live = load_adapter(load_base(str(checkpoints("llama", False)), FP32), adapter)
    require_logits(tmp_path / "fp32", logits(live.eval()))


def test_a_vocabulary_grown_on_the_original_weights(adapter_build, tmp_path):
    built = adapter_build("grown vocabulary", "plain")
    run_merge(built.peft_folder, tmp_path / "out", format="fp32", onto="original")
    require_logits(tmp_path / "out", built.logits)
    assert Checkpoint(tmp_path / "out").config["vocab_size"] == VOCAB + 16


def test_parameters_of_experts_are_refused(adapter_build, tmp_path):
    match = r"changes model\.layers\.0\.mlp\.experts.*merge_and_unload"
    refused(adapter_build("experts").folder, tmp_path / "out", match)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of the tied head, and of Conv1D
def test_conv1d_and_linear_layers_in_one_adapter(tied, checkpoints, tmp_path):
    """GPT-2's layers are (in, out) on disk, its head is (out, in)."""
    base = checkpoints("gpt2", tied)
    live = trained(base, tmp_path / "adapter", target_modules=("c_attn", "lm_head"))
    run_merge(live.adapter, tmp_path / "out", format="fp32")
    require_logits(tmp_path / "out", logits(live.model))
    run_merge(live.adapter, tmp_path / "nf4", format="nf4", calibration="none")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    run_merge(tmp_path / "peft", tmp_path / "of peft", format="fp32", trained_on="16bit")
    require_logits(tmp_path / "of peft", logits(theirs))


def test_adapters_of_single_experts_are_refused_with_what_opens_them(checkpoints, tmp_path):
    """As PEFT saved them with transformers 4: the checkpoint has the layers, the model has none."""
    base, experts = (
        checkpoints("mixtral"),
        "base_model.model.model.layers.0.block_sparse_moe.experts",
    )
    adapter = trained(base, tmp_path / "adapter", target_modules=("q_proj",)).adapter
    shapes = {"lora_A": (4, 64), "lora_B": (128, 4)}
    more = {f"{experts}.2.w1.{leaf}.weight": torch.ones(shape) for leaf, shape in shapes.items()}
    edit(adapter, lambda tensors: tensors | more)
    match = r"single experts \(.*experts\.2\.w1\); transformers 5 has .* fused.*PeftModel"
    refused(adapter, tmp_path / "out", match)
    with pytest.raises(UserError, match=match):
        load_adapter(load_base(str(base), replace(FP32, allow_unquantized=True)), adapter)
    # a dense model has no experts at all
    edit(plain := shutil.copytree(adapter, tmp_path / "plain"), dict)
    match = r"experts\.2\.w1\.weight is not in the checkpoint"
    refused(plain, tmp_path / "out", match, base_model=str(checkpoints("llama", False)))


# ---- several at once ----


def test_several_adapters_add_up_with_their_weights(adapter_build, checkpoints, tmp_path):
    base, some = checkpoints("llama", False), {"r": 2, "target_modules": ("q_proj", "up_proj")}
    paths = trained(base, tmp_path / "one").adapter, trained(base, tmp_path / "two", **some).adapter
    model = load_base(str(base), FP32).eval()
    for folder in paths:
        load_adapter(model, folder, adapter_name=folder.name)
    for layer in lora_layers(model).values():
        layer.active_adapters = tuple(layer.lora_A)
        for name in layer.scaling:
            layer.scaling[name] *= {"one": 0.5, "two": -2.0}[name]
    folders, output = tuple(map(str, paths)), tmp_path / "out"
    run_merge(folders, output, weights=(0.5, -2), format="fp32")
    require_logits(output, logits(model))
    assert report_of(output)["adapters"] == dict(zip(folders, (0.5, -2), strict=True))
    assert "one` times 0.5" in (output / "README.md").read_text()

    one, two = map(read_adapter, paths)
    assert combine([one], [1.0]) is one
    with pytest.raises(UserError, match="DoRA's magnitudes, which cannot be summed"):
        combine([one, read_adapter(adapter_build("dora").peft_folder)], [1, 1])
    two.base["blocksize"] = 128
    with pytest.raises(UserError, match="different or differently quantized bases"):
        combine([one, two], [1, 1])


LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}}


@pytest.mark.parametrize(
    "init", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, LOFTQ], ids=str
)
def test_a_weight_on_an_adapter_of_a_changed_base(init, checkpoints, tmp_path):
    """The model that --verify and calibration load computes the merged function."""
    base = checkpoints("llama")
    model, folder = trained(base, tmp_path / "adapter", rank_pattern={"v_proj": 2}, **init)
    for weight in (0.5, -1.0):
        live = load_live(str(base), combine([read_adapter(folder)], [weight]), quant=FP32)
        run_merge(folder, tmp_path / f"{weight}", weights=(weight,), format="fp32")
        require_logits(tmp_path / f"{weight}", logits(live))
    none = load_live(str(base), combine([read_adapter(folder)], [0]), quant=FP32)
    with disable_adapter(model):
        torch.testing.assert_close(logits(none), logits(model), atol=1e-5, rtol=1e-5)  # fp32


def test_a_sum_of_adapters_of_different_bases_is_refused_without_fingerprints(
    adapter_build, tmp_path
):
    """PEFT's files name the base, and no more. Paths of one folder are the same."""
    one = adapter_build("q_proj alone").peft_folder
    two = shutil.copytree(one, tmp_path / "two")
    folders, base = (str(one), str(two)), Path(read_adapter(one).base_model)
    edit(two, lambda tensors: tensors, base_model_name_or_path=f"{base.parent}/./{base.name}/")
    run_merge(folders, tmp_path / "same")
    other = shutil.copytree(base, tmp_path / "other")
    for name, revision in (
        (str(other), None),
        ("someone/model", None),
        (str(base), "v2"),
        ("", ""),
    ):
        edit(two, lambda tensors: tensors, base_model_name_or_path=name, revision=revision)
        shown = f"{name or 'an unnamed base'}{' .v2.' * bool(revision)}"
        match = f"two was trained on {shown} and .* on {base}: merge them apart, or .*--base-model"
        refused(folders, tmp_path / "out", match)
    run_merge(folders, tmp_path / "given", base_model=str(base))


# ---- files that do not fit ----


def test_a_bias_where_the_model_has_none(plain, tmp_path):
    def with_biases(tensors):
        parts = [(name.removesuffix("weight"), len(tensor)) for name, tensor in tensors.items()]
        return tensors | {f"{n}bias": torch.zeros(out) for n, out in parts if "lora_B" in n}

    edit(plain, with_biases, lora_bias=True)
    refused(plain, tmp_path / "out", r"q_proj\.bias is not in the checkpoint")


def test_all_misfits_of_another_base_are_listed(plain, tmp_path):
    """PEFT's files have no fingerprint."""
    up_proj, nowhere = (f"base_model.model.{n}" for n in ("model.layers.0.mlp.up_proj", "nowhere"))
    other = {
        f"{up_proj}.lora_B.weight": torch.zeros(99, 4),
        f"{nowhere}.lora_A.weight": torch.zeros(4, 64),
        f"{nowhere}.lora_B.weight": torch.zeros(64, 4),
    }
    edit(plain, lambda tensors: tensors | other, target_modules="all-linear")
    refused(plain, tmp_path / "out", r"nowhere.weight is not in.*\(128, 64\).*\(99, 64\)")


def test_a_layer_that_the_files_lack_is_named(plain, checkpoints, tmp_path):
    """PEFT would silently leave it at its initial values."""
    lacks = "layers.1.self_attn.v_proj"
    edit(plain, lambda tensors: {n: t for n, t in tensors.items() if lacks not in n})
    match = rf"{lacks} is in target_modules, but the files have no A and B"
    model = load_base(str(checkpoints("llama", False)), FP32)
    with pytest.raises(UserError, match=match):
        load_adapter(model, plain)
    assert not lora_layers(model)
    refused(plain, tmp_path / "out", match)
    edit(plain, exclude_modules=[lacks])  # then it may be missing
    load_adapter(model, plain)
