"""Models of every task: their classes, their heads, and what is quantized of them."""

import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ENCODER, FP32, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from qlora.adapters.apply import apply_lora
from qlora.base.checkpoint import Checkpoint, kept_dense, skeleton
from qlora.base.load import load_base
from qlora.base.modules import auto_class, heads, state_of, task_of
from qlora.config import LoraConfig, QuantConfig
from qlora.config.tasks import TASKS, task_named, task_typed
from qlora.errors import UserError
from qlora.ops import nf4

LABELS = ("a", "b", "c")
# checkpoint, task, class, what is trained in full, and what else of its linear layers is not 4-bit
MODELS = [
    ("t5", "seq2seq", "T5ForConditionalGeneration", [], "wo lm_head"),
    ("bart", "seq2seq", "BartForConditionalGeneration", [], "lm_head"),
    ("bert", "seq-cls", "BertForSequenceClassification", ["classifier"], ""),
    ("bert", "token-cls", "BertForTokenClassification", ["classifier"], ""),
    ("bert without prefix", "seq-cls", "BertForSequenceClassification", ["classifier"], ""),
    (
        "bert without pooler",
        "seq-cls",
        "BertForSequenceClassification",
        ["classifier", "bert.pooler"],
        "",
    ),
    ("roberta", "seq-cls", "RobertaForSequenceClassification", ["classifier"], ""),
    ("modernbert", "seq-cls", "ModernBertForSequenceClassification", ["head", "classifier"], ""),
    ("llama", "seq-cls", "LlamaForSequenceClassification", ["score"], ""),
    ("llama", "token-cls", "LlamaForTokenClassification", ["score"], ""),
    ("gpt2", "seq-cls", "GPT2ForSequenceClassification", ["score"], ""),
    ("t5", "seq-cls", "T5ForSequenceClassification", ["classification_head"], "wo"),
    ("bart", "seq-cls", "BartForSequenceClassification", ["classification_head"], ""),
]


@pytest.mark.parametrize(
    ("family", "task", "class_name", "in_full", "dense"),
    MODELS,
    ids=[f"{m[0]}-{m[1]}".replace(" ", "-") for m in MODELS],
)
def test_all_is_quantized_but_the_head(family, task, class_name, in_full, dense, checkpoints):
    model = load_base(str(checkpoints(family)), FP32, task=task, labels=LABELS if in_full else ())
    assert type(model).__name__ == class_name
    assert task_of(model) is TASKS[task]
    left = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Linear4bit)
    }
    of_head = {name for name in left if any(f"{name}.".startswith(f"{h}.") for h in in_full)}
    assert {name.rpartition(".")[2] for name in left - of_head} == set(dense.split())
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    if in_full:
        assert sorted(heads(model)) == sorted(in_full)
        assert of_head
        assert state_of(model).labels == tuple(LABELS)
        assert model.config.id2label == dict(enumerate(LABELS))
        assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert state_of(model).task == task


def test_a_new_head_is_drawn_with_the_seed(checkpoints, capsys):
    one, same, other = (
        load_base(str(checkpoints("bert")), FP32, task="seq-cls", labels=LABELS, seed=seed)
        for seed in (1, 1, 2)
    )
    said = capsys.readouterr().out
    assert "The checkpoint has no classifier of this shape: made anew, seed 1" in said
    weight = one.classifier.weight
    assert weight.shape == (3, 64)
    assert torch.equal(weight, same.classifier.weight)
    assert not torch.equal(weight, other.classifier.weight)
    assert 0.01 < weight.std() < 0.03  # initializer_range is 0.02
    assert not one.classifier.bias.any()


@pytest.fixture
def classifier(tmp_path):
    """A trained one with two labels."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier", model


def test_a_head_of_the_checkpoint_stays_where_it_fits(classifier, capsys):
    folder, exact = classifier
    model = load_base(str(folder), FP32, task="seq-cls")
    assert torch.equal(model.classifier.weight, exact.classifier.weight)
    assert state_of(model).labels == ("no", "yes")
    assert "anew" not in capsys.readouterr().out
    model = load_base(str(folder), FP32, task="seq-cls", labels=LABELS)
    assert model.classifier.weight.shape == (3, 64)
    assert "no classifier of this shape: made anew" in capsys.readouterr().out


def test_what_is_missing_elsewhere_is_an_error(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints("bert"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of its model.*layer\.0\.output\.dense"):
        load_base(str(folder), FP32, task="seq-cls", labels=LABELS)


def test_a_4_bit_checkpoint_gets_a_head_that_is_not(checkpoints, tmp_path):
    load_base(str(checkpoints("llama")), FP32).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), FP32, task="seq-cls", labels=LABELS)
    assert type(model.score) is nn.Linear
    assert model.score.weight.dtype == torch.float32
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)


def test_t5_tells_what_stays_in_16_bits(checkpoints, capsys):
    load_base(str(checkpoints("t5")), FP32, task="seq2seq")
    said = capsys.readouterr().out
    assert "wo of this family is never quantized: 4 layers, 0.00 GiB, stay in 16 bits" in said
    assert {name.rpartition(".")[2] for name in kept_dense(tiny_model("t5"))} == {"wo"}
    assert kept_dense(tiny_model("llama")) == []


def test_t5_keeps_in_fp32_what_overflows_in_fp16(checkpoints):
    """As transformers does: T5's wo goes beyond 65,504."""
    for dtype, wanted in (("fp16", torch.float32), ("bf16", torch.bfloat16)):
        quant = QuantConfig(compute_dtype=dtype)
        model = load_base(str(checkpoints("t5")), quant, task="seq2seq")
        assert {m.weight.dtype for n, m in model.named_modules() if n.endswith(".wo")} == {wanted}
        assert model.encoder.final_layer_norm.weight.dtype == nf4.DTYPES[dtype]


def test_a_classifiers_head_is_trained_in_full_beside_what_is_asked_for(checkpoints):
    model = load_base(str(checkpoints("modernbert")), FP32, task="seq-cls", labels=LABELS)
    apply_lora(model, LoraConfig(r=2, modules_to_save=("final_norm",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    in_full = {name for name in trained if "lora_" not in name}
    for module in ("head.dense", "head.norm", "classifier", "final_norm"):
        assert any(module in name for name in in_full), module
    assert not any("head" in name or "classifier" in name for name in trained - in_full)


def test_a_head_of_a_model_that_load_base_did_not_load_is_trained_too():
    model = BertForSequenceClassification(BertConfig(**ENCODER))
    apply_lora(model, LoraConfig(r=2))
    assert model.classifier.weight is not None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "classifier" in name}
    assert not any("lora_" in name for name in trained if "classifier" in name)


def test_heads_of_models_that_load_base_did_not_load():
    assert list(heads(tiny_model("llama"))) == ["lm_head"]
    assert list(heads(tiny_model("bart"))) == ["lm_head"]
    assert list(heads(nn.Sequential(nn.Linear(2, 2)))) == []
    assert list(heads(tiny_model("bert without prefix"))) == []  # it is all base


def test_tasks_by_name_type_and_class(checkpoints):
    assert task_named("seq-cls").task_type == "SEQ_CLS"
    with pytest.raises(UserError, match=r"task must be .*token-cls, got 'cls'"):
        task_named("cls")
    assert task_typed("TOKEN_CLS") == "token-cls"
    assert task_typed(None) == "causal-lm"
    assert task_of(tiny_model("llama")) is task_of(tiny_model("gpt2")) is TASKS["causal-lm"]
    assert task_of(tiny_model("t5")) is TASKS["seq2seq"]
    assert task_of(nn.Linear(2, 2)) is None
    with pytest.raises(UserError, match="is no encoder-decoder language model that"):
        skeleton(checkpoints("llama"), task="seq2seq")


def test_auto_classes_are_transformers(checkpoints):
    assert auto_class(TASKS["causal-lm"]).from_pretrained == AutoModelForCausalLM.from_pretrained
    for task in TASKS.values():
        assert auto_class(task).from_config


@pytest.mark.parametrize(("family", "positions"), [("roberta", 512), ("bert", 512), ("t5", None)])
def test_the_longest_row(family, positions, checkpoints):
    """RoBERTa's positions start after the pad's id; T5's are relative."""
    assert Checkpoint(checkpoints(family)).max_positions == positions


def test_skip_modules_are_kept_beside_a_head(checkpoints):
    quant = QuantConfig(compute_dtype="fp32", skip_modules=("query",))
    model = load_base(str(checkpoints("bert")), quant, task="seq-cls", labels=LABELS)
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear
    assert state_of(model).record()["skip_modules"] == ["query", "classifier"]
