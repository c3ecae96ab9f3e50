"""Models of every task: classes, heads, and the layers that stay unquantized."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ENCODER, FP32, axis, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from qlora import LoraConfig, QuantConfig, UserError, apply_lora, load_base
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import kept_dense, quantized_layers, skeleton
from qlora.base.modules import auto_class, heads, is_in, is_linear, read_directly, state_of, task_of
from qlora.config.tasks import TASKS, task_named, task_typed
from qlora.ops import nf4

LABELS = ("a", "b", "c")
# checkpoint, task -> class, modules trained in full, and other linear layers that stay dense
MODELS = {
    ("bert without pooler", "seq-cls"): (
        "BertForSequenceClassification", "classifier bert.pooler", "",
    ),
    ("t5", "seq2seq"): ("T5ForConditionalGeneration", "", "wo lm_head"),
    ("bart", "seq2seq"): ("BartForConditionalGeneration", "", "lm_head"),
    ("bert", "seq-cls"): ("BertForSequenceClassification", "classifier", ""),
    ("bert", "token-cls"): ("BertForTokenClassification", "classifier", ""),
    ("bert without prefix", "seq-cls"): ("BertForSequenceClassification", "classifier", ""),
    ("roberta", "seq-cls"): ("RobertaForSequenceClassification", "classifier", ""),
    ("modernbert", "seq-cls"): ("ModernBertForSequenceClassification", "head classifier", ""),
    ("llama", "seq-cls"): ("LlamaForSequenceClassification", "score", ""),
    ("llama", "token-cls"): ("LlamaForTokenClassification", "score", ""),
    ("gpt2", "seq-cls"): ("GPT2ForSequenceClassification", "score", ""),
    ("t5", "seq-cls"): ("T5ForSequenceClassification", "classification_head", "wo"),
    ("bart", "seq-cls"): ("BartForSequenceClassification", "classification_head", ""),
}  # fmt: skip
FIRST = [("t5", "seq2seq"), ("bert", "token-cls"), ("bert without pooler", "seq-cls")]
REST = [model for model in MODELS if model not in FIRST]


@pytest.mark.parametrize("model", [*FIRST, *axis(*REST)], ids=lambda m: "-".join(m))
def test_every_linear_layer_but_the_head_is_quantized(model, checkpoints):
    family, task = model
    class_name, in_full, dense = MODELS[model]
    model = load_base(str(checkpoints(family)), FP32, task=task, labels=LABELS if in_full else ())
    assert type(model).__name__ == class_name
    assert state_of(model).task == task
    assert task_of(model) is TASKS[task]
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    of_head = {name for name in plain if is_in(name, in_full.split())}
    assert {name.rpartition(".")[2] for name in plain - of_head} == set(dense.split())
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if in_full:
        assert sorted(heads(model)) == sorted(in_full.split())
        assert of_head
        assert state_of(model).labels == LABELS
        assert model.config.id2label == dict(enumerate(LABELS))
        assert model.config.label2id == {"a": 0, "b": 1, "c": 2}


def test_tasks_and_heads_by_name_type_and_class(checkpoints):
    assert task_named("seq-cls").task_type == "SEQ_CLS"
    with pytest.raises(UserError, match=r"task must be .*token-cls, got 'cls'"):
        task_named("cls")
    assert (task_typed("TOKEN_CLS"), task_typed(None)) == ("token-cls", "causal-lm")
    assert task_of(tiny_model("llama")) is task_of(tiny_model("gpt2")) is TASKS["causal-lm"]
    assert task_of(tiny_model("t5")) is TASKS["seq2seq"]
    assert task_of(nn.Linear(2, 2)) is None
    assert auto_class(TASKS["causal-lm"]).from_pretrained == AutoModelForCausalLM.from_pretrained
    assert all(auto_class(task).from_config for task in TASKS.values())
    with pytest.raises(UserError, match="is no encoder-decoder language model that"):
        skeleton(checkpoints("llama"), task=TASKS["seq2seq"])
    assert list(heads(tiny_model("llama"))) == list(heads(tiny_model("bart"))) == ["lm_head"]
    assert heads(nn.Sequential(nn.Linear(2, 2))) == {}
    assert heads(tiny_model("bert without prefix")) == {}  # all of it is the base model


def test_a_new_head_is_drawn_with_the_seed(checkpoints, capsys):
    quant = QuantConfig(compute_dtype="fp32", skip_modules=("query",))
    one, same, other = (
        load_base(str(checkpoints("bert")), quant, task="seq-cls", labels=LABELS, seed=seed)
        for seed in (1, 1, 2)
    )
    assert type(one.bert.encoder.layer[0].attention.self.query) is nn.Linear
    assert state_of(one).record()["skip_modules"] == ["query", "classifier"]
    printed = capsys.readouterr().out
    assert "has no classifier of this shape: initialised with seed 1" in printed
    weight = one.classifier.weight
    assert weight.shape == (3, 64)
    assert torch.equal(weight, same.classifier.weight)
    assert not torch.equal(weight, other.classifier.weight)
    assert 0.01 < weight.std() < 0.03  # initializer_range is 0.02
    assert not one.classifier.bias.any()


def test_a_head_of_the_checkpoint_is_kept_if_it_fits(tmp_path, capsys):
    torch.manual_seed(0)
    names = {0: "no", 1: "yes"}
    config = BertConfig(**ENCODER, id2label=names, label2id={"no": 0, "yes": 1})
    exact = BertForSequenceClassification(config)
    exact.save_pretrained(tmp_path)
    model = load_base(str(tmp_path), FP32, task="seq-cls")
    assert torch.equal(model.classifier.weight, exact.classifier.weight)
    assert state_of(model).labels == ("no", "yes")
    assert "initialised" not in capsys.readouterr().out
    model = load_base(str(tmp_path), FP32, task="seq-cls", labels=LABELS)
    assert model.classifier.weight.shape == (3, 64)
    assert "no classifier of this shape: initialised" in capsys.readouterr().out


def test_the_new_head_of_a_4_bit_checkpoint_is_dense(checkpoints, tmp_path):
    load_base(str(checkpoints("llama")), FP32).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), FP32, task="seq-cls", labels=LABELS)
    assert type(model.score) is nn.Linear
    assert model.score.weight.dtype == torch.float32
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)


def test_a_classifiers_head_is_trained_in_full_beside_modules_to_save(checkpoints):
    model = load_base(str(checkpoints("modernbert")), FP32, task="seq-cls", labels=LABELS)
    apply_lora(model, LoraConfig(r=2, modules_to_save=("final_norm",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    in_full = {name for name in trained if "lora_" not in name}
    for module in ("head.dense", "head.norm", "classifier", "final_norm"):
        assert any(module in name for name in in_full), module
    assert not any("head" in name or "classifier" in name for name in trained - in_full)
    plain = BertForSequenceClassification(BertConfig(**ENCODER))  # load_base did not load it
    apply_lora(plain, LoraConfig(r=2))
    trained = {n for n, p in plain.named_parameters() if p.requires_grad and "classifier" in n}
    assert trained
    assert not any("lora_" in name for name in trained)


def test_t5s_wo_stays_in_16_bits_and_is_fp32_where_fp16_overflows(checkpoints, capsys):
    """As in transformers: T5's wo goes beyond 65,504."""
    assert {name.rpartition(".")[2] for name in kept_dense(tiny_model("t5"))} == {"wo"}
    assert kept_dense(tiny_model("llama")) == []
    for dtype, wanted in (("fp16", torch.float32), ("bf16", torch.bfloat16)):
        quant = QuantConfig(compute_dtype=dtype)
        model = load_base(str(checkpoints("t5")), quant, task="seq2seq")
        output = capsys.readouterr().out
        assert "This family keeps wo in 16 bits: 4 layers, 0.00 GiB" in output
        assert {m.weight.dtype for n, m in model.named_modules() if n.endswith(".wo")} == {wanted}
        assert model.encoder.final_layer_norm.weight.dtype == nf4.DTYPES[dtype]


class Same(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x.view(-1, x.shape[-1]))
        return scores.topk(2).values, scores


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Masked(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_told_by_what_it_computes(bias):
    for kind in (nn.Linear, Same, Router, Scaled, Masked):
        layer = kind(8, 6, bias=bias, device="meta")  # nothing is allocated to try it
        assert is_linear(layer) == (kind in (nn.Linear, Same)), kind
        assert layer.weight.is_meta
    assert is_linear(Linear4bit(8, 6, bias=bias))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in "abcd")
        nn.init.zeros_(self.a.weight)

    def init_weights(self):
        nn.init.ones_(self.b.weight)

    def forward(self, x):
        x = self.a(x.to(self.b.weight.dtype)) if isinstance(self.b.weight, torch.Tensor) else x
        return self.d(self.b(x) @ self.c.weight.T)


def test_weights_that_the_model_reads_itself():
    model = nn.Sequential(Mixer(), nn.MultiheadAttention(4, 2))
    assert read_directly(dict(model.named_modules())) == {"0.c", "1.out_proj"}
    apply_lora(model, LoraConfig(r=2))
    assert set(lora_layers(model)) == {"0.a", "0.b", "0.d"}
    for target in (("c",), r"0\.[ac]"):
        with pytest.raises(UserError, match=r"0\.c, whose weight the model reads past the layer"):
            apply_lora(nn.Sequential(Mixer()), LoraConfig(r=2, target_modules=target))


class Helper(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def correct(self, x):
        return self._clamped() @ x

    def _clamped(self):
        return self.a.weight.clamp(-1, 1)

    def fuse(self):  # that nothing here calls
        return self.b.weight.T


class Caller(nn.Module):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        return self.helper.correct(x)


def test_weights_that_methods_read_which_another_module_calls():
    assert read_directly(dict(Caller().named_modules())) == {"helper.a"}


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in "abc")

    def forward(self, x):
        if self.b.weight.dtype != torch.uint8:
            x = x.to(self.b.weight.dtype)
        return self.a(x.to(dtype=self.a.weight.dtype)) + self.b(x) + self.c(x)


def test_layers_to_whose_dtype_the_model_casts_are_dense_and_adapted():
    """Codes would make bytes of their input."""
    model = nn.Sequential(Casting())
    assert kept_dense(model) == ["0.a"]
    assert set(quantized_layers(model, QuantConfig())) == {"0.b", "0.c"}
    apply_lora(model, LoraConfig(r=2))
    assert set(lora_layers(model)) == {"0.a", "0.b", "0.c"}
