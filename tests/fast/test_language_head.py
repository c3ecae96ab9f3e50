"""A model's own loss with lazy logits and with all of them."""

from collections.abc import Callable, Iterator
from typing import Any

import conftest
import pytest
import torch
import transformers as hf
from chunks import chunks_of, is_lazy
from conftest import CONFIGS, FP32, SIZES, VOCAB, adapted_model, axis, tiny_model, token_ids
from torch import Tensor, nn

from qlora.adapters.apply import apply_lora, disable_adapter
from qlora.adapters.files import save_adapter
from qlora.adapters.fuse import merge_and_unload, unload
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.fast.head import LanguageHead, put_language_head
from qlora.training import prepare_for_training

MORE: dict[str, Callable[[], Any]] = {
    "cohere": lambda: hf.CohereConfig(**SIZES, logit_scale=0.0625),
    "falcon-h1": lambda: hf.FalconH1Config(
        **SIZES, lm_head_multiplier=0.5, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, mamba_n_groups=1,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=16, final_logit_softcapping=0.5),
    "granite": lambda: hf.GraniteConfig(**SIZES, logits_scaling=8.0),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=0,
    ),
}  # fmt: skip
OTHERS = ["t5", "bart", "bert without pooler", "roberta", "modernbert"]  # bart adds a bias
IDS = token_ids(rows=3, length=16)
LABELS = IDS.clone()  # on some tokens, the first and the last of a row among them
LABELS[0, 3:7] = LABELS[1, :-2] = -100


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    """Chunks of 5 tokens, so that the logits of these models are more than one."""
    with chunks_of(5 * VOCAB):
        yield


def frozen(family: str) -> Any:
    torch.manual_seed(0)
    if family in CHANGES:
        model: Any = Changed(CONFIGS["llama"]())
        model.change = CHANGES[family]
    elif family in MORE:
        model = hf.AutoModelForCausalLM.from_config(MORE[family]())
    else:
        model = tiny_model(family)
    if family == "gemma":  # whose cap of 30 the logits would not reach
        model.config.final_logit_softcapping = 0.5
    return model.requires_grad_(False).eval()


def run(model: Any, **inputs: Any) -> tuple[Any, Tensor]:
    """The outputs for the embeddings of IDS, and the gradient of the loss in them."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    outputs = model(inputs_embeds=x, labels=LABELS, **inputs)
    return outputs, torch.autograd.grad(outputs.loss, x)[0]


def check(model: Any, *, lazily: bool = True, **inputs: Any) -> Any:
    """Loss and gradient with and without the head; returns the outputs with it."""
    plain, plain_gradient = run(model, **inputs)
    put_language_head(model)
    outputs, gradient = run(model, **inputs)
    assert is_lazy(outputs.logits) is lazily
    # fp32: the same sums in another order
    torch.testing.assert_close(outputs.loss, plain.loss, rtol=1e-6, atol=0)
    assert (gradient - plain_gradient).norm() <= 1e-5 * plain_gradient.norm()
    assert torch.equal(outputs.logits, plain.logits)
    return outputs


def test_the_number_of_labels_of_all_micro_batches_and_the_loss_of_experts():
    check(frozen("gemma"), num_items_in_batch=40)
    model = frozen("mixtral")
    model.config.output_router_logits = True
    assert check(model).aux_loss > 0


class Changed(hf.LlamaForCausalLM):
    """Changes its logits by what no config says."""

    change: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.change(outputs.logits)
        outputs.loss = self.loss_function(outputs.logits, labels, VOCAB)
        return outputs


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda logits: 1.05 * logits,
    "shifted": lambda logits: logits + torch.arange(VOCAB) / VOCAB,
}


@pytest.mark.parametrize("family", [*axis(*CONFIGS), *MORE, *OTHERS, *CHANGES])
def test_loss_logits_and_gradient_of_a_family(family):
    check(frozen(family), lazily=family not in ("shifted", "bart"))


@pytest.mark.parametrize("checkpointing", axis(True, False))
@pytest.mark.parametrize("family", axis("gemma", "llama", "gpt2", "mixtral"))
def test_gradients_of_adapters(family, checkpointing, checkpoints):
    model, runs = adapted_model(checkpoints(family)), []
    for fast_path in (True, False):
        prepare_for_training(model, checkpointing, fast_path=fast_path)
        torch.manual_seed(0)  # of GPT-2's dropout
        outputs = model(input_ids=IDS, labels=LABELS)
        trained = [p for p in model.parameters() if p.requires_grad]
        runs.append(torch.autograd.grad(outputs.loss, trained))
        assert is_lazy(outputs.logits) is fast_path  # never computed, also not in backward
    for got, wanted in zip(*runs, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_files_generation_and_unloading_are_the_same(family, checkpoints, tmp_path, capsys):
    base_logits = load_base(str(checkpoints(family)), FP32).eval()(IDS).logits
    fast, slow, merged = (adapted_model(checkpoints(family)) for _ in range(3))
    for model, is_fast in ((fast, True), (fast, True), (slow, False), (merged, True)):
        prepare_for_training(model, False, fast_path=is_fast).eval()  # twice is as once
    head = fast.get_output_embeddings()
    assert isinstance(head, LanguageHead) and type(head.base_layer) is nn.Linear
    assert (head.weight is fast.get_input_embeddings().weight) is (family == "gemma")
    for model, name in ((fast, "fast"), (slow, "slow")):
        save_adapter(model, tmp_path / name)
    conftest.require_same_adapter(tmp_path / "fast", tmp_path / "slow")
    prompt = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(**prompt), slow.generate(**prompt))
    with torch.no_grad():  # with gradients, the layers sum in another order
        assert torch.equal(fast(IDS).logits, slow(IDS).logits)
    with disable_adapter(fast):
        assert torch.equal(fast(IDS).logits, base_logits)
    for remove, model in ((unload, fast), (merge_and_unload, merged)):
        remove(model)
        assert not any(isinstance(module, LanguageHead) for module in model.modules())
        assert not any("base_layer" in name for name in model.state_dict())
    assert torch.equal(fast(IDS).logits, base_logits)
    assert capsys.readouterr().out == ""


def test_few_tokens_inference_mode_and_a_compiled_head():
    model = frozen("llama")
    put_language_head(model)
    assert type(model(IDS[:1, :5]).logits) is Tensor
    assert is_lazy(model(IDS[:1, :6]).logits)
    assert type(model(IDS, logits_to_keep=1).logits) is Tensor
    with torch.no_grad():
        assert is_lazy(model(IDS).logits)
    with torch.inference_mode():
        assert type(model(IDS).logits) is Tensor
    hidden = torch.randn(3, 16, 64)
    logits = torch.compile(model.lm_head, backend="eager", fullgraph=True)(hidden)
    assert type(logits) is Tensor and torch.equal(logits, model.lm_head(hidden))


FROM_LOGITS = "the loss is computed from all logits: the output head, {}\n"
TOUCHED = FROM_LOGITS.format("lm_head, is trained, adapted or no plain linear layer")


@pytest.mark.parametrize(
    "family, settings",
    [("llama", {"modules_to_save": ("lm_head",)}),
     ("llama", {"target_modules": ("lm_head", "q_proj")}),
     ("phi", {"bias": "all"}),
     ("gemma", {"trainable_token_indices": (5, 6)})],  # of the embedding that the head is tied to
    ids=str,
)  # fmt: skip
def test_a_trained_or_adapted_head(family, settings, checkpoints, capsys):
    gradients = []
    for head_is_put in ("never", "before", "after"):
        model = load_base(str(checkpoints(family)), FP32)
        if head_is_put == "before":
            put_language_head(model)
        apply_lora(model, LoraConfig(r=4, **settings), generator=torch.Generator().manual_seed(0))
        capsys.readouterr()
        if head_is_put == "after":
            put_language_head(model)
            assert capsys.readouterr().out == TOUCHED
        conftest.randomize_adapter(model)
        outputs = model(IDS, labels=LABELS)
        outputs.loss.backward()
        assert type(outputs.logits) is Tensor
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, before, after in zip(*gradients, strict=True):
        assert torch.equal(before, plain) and torch.equal(after, plain)


HEADS = [
    ("llama", {"modules_to_save": ("lm_head",)}),
    ("gemma", {"target_modules": ("lm_head", "q_proj")}),  # with a softcap
    ("gemma", {"trainable_token_indices": (5, 6)}),
]


@pytest.mark.parametrize("family, settings", HEADS, ids=str)
def test_without_gradients_a_trained_or_adapted_head_is_lazy(family, settings, checkpoints):
    """Logits are those of the adapter that was active, also where they are computed later."""
    model = load_base(str(checkpoints(family)), FP32).eval()
    apply_lora(model, LoraConfig(r=4, **settings), generator=torch.Generator().manual_seed(0))
    conftest.randomize_adapter(model)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.01  # of copies, which randomize_adapter leaves
    with torch.no_grad(), disable_adapter(model):
        base = model(IDS).logits
    with torch.no_grad():
        plain = model(IDS, labels=LABELS)
        put_language_head(model)
        outputs = model(IDS, labels=LABELS)
        with disable_adapter(model):
            without = model(IDS).logits
        assert is_lazy(outputs.logits) and is_lazy(without)
        torch.testing.assert_close(outputs.loss, plain.loss, rtol=1e-6, atol=0)
        assert torch.equal(outputs.logits, plain.logits) and torch.equal(without, base)
        assert not torch.equal(plain.logits, base)
    assert type(model(IDS).logits) is Tensor


def test_a_head_with_a_gradient_or_hooks_or_codes(checkpoints, capsys):
    model = frozen("llama")
    put_language_head(model)
    calls: list[int] = []
    with model.lm_head.base_layer.register_forward_hook(lambda *_: calls.append(1)):
        assert type(model(IDS).logits) is Tensor and calls
    assert is_lazy(model(IDS).logits)
    model.lm_head.weight.requires_grad_()
    model(IDS, labels=LABELS).loss.backward()
    assert model.lm_head.weight.grad.norm() > 0
    put_language_head(frozen("llama").model)  # without a head
    assert capsys.readouterr().out == ""
    model = frozen("llama")
    model.lm_head.weight.requires_grad_()
    put_language_head(model)
    assert capsys.readouterr().out == TOUCHED
    model = load_base(str(checkpoints("llama")), FP32)
    model.lm_head = model.model.layers[0].self_attn.q_proj
    put_language_head(model)
    wanted = FROM_LOGITS.format("model.layers.0.self_attn.q_proj, is quantized")
    assert capsys.readouterr().out == wanted


def test_weights_are_tied_again():
    model = tiny_model("gemma").requires_grad_(False)
    plain_names = list(model.state_dict())
    put_language_head(model)
    names = list(model.state_dict())
    model.tie_weights()
    model.resize_token_embeddings(VOCAB + 8)
    head = model.get_output_embeddings()
    assert head.base_layer.weight is model.get_input_embeddings().weight
    assert len(head.weight) == VOCAB + 8
    assert list(model.state_dict()) == names and len(names) == len(plain_names)
