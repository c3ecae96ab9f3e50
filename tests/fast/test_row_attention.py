"""Rows in one batch against each alone, by each attention; models that do not keep them apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, FP32, SIZES, VOCAB, adapted_model, axis, tiny_tokenizer
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from qlora import DataConfig, TrainConfig, UserError
from qlora.data.batches import FlatCollator, PackCollator, PackedRows
from qlora.fast.attention import ROWS, VARLEN, rows_attention, rows_collator, varlen_attention
from qlora.training import prepare_for_training
from qlora.training.trainer import make_trainer

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2}
MAKE: dict[str, Any] = {  # windows are shorter than rows, and much shorter than packs
    **CONFIGS,
    "mistral, window": lambda: hf.MistralConfig(**SIZES, sliding_window=5),
    "phi3, window": lambda: hf.Phi3Config(**SIZES, sliding_window=6),
    "gemma3, window": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=7),
}
LEAKING: dict[str, Any] = {
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
    "falcon, alibi": lambda: hf.FalconConfig(**SMALL, num_attention_heads=4, alibi=True),
    "mamba": lambda: hf.MambaConfig(**SMALL),
    "lfm2": lambda: hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "gpt-oss": lambda: hf.GptOssConfig(**SIZES, head_dim=16, num_local_experts=4),
}
LENGTHS = (9, 17, 1, 12, 30, 5, 8)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()


class Swallowing(hf.LlamaForCausalLM):
    """Passes none of its other arguments on, as some remote code does."""

    def forward(self, input_ids: Any = None, labels: Any = None, **_: Any) -> Any:
        return super().forward(input_ids=input_ids, labels=labels)


def rows() -> Dataset:
    """Of LENGTHS, with labels on the second half and on the first token, which has no loss."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for length in LENGTHS:
        ids = torch.randint(4, VOCAB, (length,), generator=generator)
        labels = ids.where(torch.arange(length) >= length // 2, -100)
        labels[0] = ids[0]
        records.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "length": length})
    return Dataset.from_list(records)


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def model_of(make: Any, folder: Path) -> Any:
    random_model(make()).save_pretrained(folder)
    return prepare_for_training(adapted_model(folder), gradient_checkpointing=False)


def trainer_of(model: Any, folder: Path, data: Any, *, packing: bool, **settings: Any) -> Any:
    settings |= {"data": DataConfig("data", packing=packing), "learning_rate": 1e-3}
    config = TrainConfig("model", str(folder / "run"), **settings)
    return make_trainer(config, model, tiny_tokenizer(), data, None)


def collator_of(model: Any, *, packing: bool = True, fast_path: bool = True) -> Any:
    return rows_collator(model, packing=packing, fast_path=fast_path, pad_token_id=0)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alone(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients over all labels of rows(), a row at a time, by transformers' logits."""
    total, count = 0.0, 0
    for row in rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss.backward()
        total, count = total + loss.item(), count + int((labels != -100).sum())
    return total / count, {name: g / count for name, g in gradients(model).items()}


def together(trainer: Any, model: Any, batches: list[Any]) -> tuple[float, Any]:
    count, total = trainer._get_num_items_in_batch(batches, torch.device("cpu")), 0.0
    assert int(count) == sum((torch.tensor(row["labels"][1:]) != -100).sum() for row in rows())
    for batch in batches:
        inputs = trainer._prepare_inputs(batch)
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def assert_same(got: Any, wanted: Any) -> None:
    """fp32 sums in another order: eps * a few hundred terms."""
    (loss, gradient), (wanted_loss, wanted_gradient) = got, wanted
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradient.keys() == wanted_gradient.keys() and gradient
    for name, value in wanted_gradient.items():
        assert (gradient[name] - value).norm() <= 1e-5 * value.norm(), name


# a softcap; windows in some layers
FAMILIES = ["gemma", *axis("gemma3, window", *sorted(MAKE.keys() - {"gemma", "gemma3, window"}))]


@pytest.mark.parametrize("fast_path", [True, False], ids=["flat", "own mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_give_the_same_as_alone(family, fast_path, tmp_path):
    """Loss and gradients, for any division of a step's packs into batches, and without packing."""
    model = model_of(MAKE[family], tmp_path / "base")
    wanted, own = alone(model), model.config._attn_implementation
    packed = PackedRows(rows(), 31)
    trainer = trainer_of(model, tmp_path, packed, packing=True, fast_path=fast_path)
    flat = fast_path and family != "gemma"  # Gemma 2 has a softcap
    assert isinstance(trainer.data_collator, FlatCollator if flat else PackCollator)
    assert model.config._attn_implementation == (ROWS if flat else own)
    assert len(packed) == 3 and len(packed.packs[0]) > 1
    for size in (1, 2, 3):
        parts = [list(packed)[i : i + size] for i in range(0, 3, size)]
        assert_same(together(trainer, model, [*map(trainer.data_collator, parts)]), wanted)
    if flat:
        trainer = trainer_of(model, tmp_path, rows(), packing=False)
        batch = trainer.data_collator([{k: r[k] for k in ("input_ids", "labels")} for r in rows()])
        assert batch["input_ids"].shape == (1, sum(LENGTHS))
        assert_same(together(trainer, model, [batch]), wanted)


@pytest.mark.parametrize("family", [*LEAKING, "remote code"])
def test_a_model_that_mixes_rows_is_refused(family, capsys):
    is_remote = family == "remote code"
    model = Swallowing(CONFIGS["llama"]()) if is_remote else random_model(LEAKING[family]())
    model.train().config.use_cache = False
    before, random = model.config._attn_implementation, torch.get_rng_state()
    with pytest.raises(UserError) as error:
        collator_of(model)
    for words in ("--packing", type(model).__name__, "(a row reads the one before it)", "leave"):
        assert words in str(error.value)
    assert capsys.readouterr().out == ""
    assert collator_of(model, packing=False) is None
    assert collator_of(model, packing=False, fast_path=False) is None
    assert capsys.readouterr().out.count("rows are padded to the longest of their batch") == 1
    assert model.config._attn_implementation == before and model.training
    assert gradients(model) == {} and not model.get_input_embeddings()._forward_hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_does_not_read_position_ids_is_refused():
    model = random_model(CONFIGS["llama"]())
    model.config.use_cache = False

    def add_positions(module: Any, args: Any, outputs: Any) -> None:
        states = outputs.last_hidden_state
        states += torch.linspace(0, 1, 512)[: states.shape[1], None]

    model.model.register_forward_hook(add_positions)
    with pytest.raises(UserError, match=r"logits are \d+\.\d% off those of a row alone"):
        collator_of(model)


def test_opt_keeps_rows_apart_by_another_attention_than_its_own():
    """It makes its mask without position_ids, and reads its positions from them."""
    small = {**SMALL, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}
    model = random_model(hf.OPTConfig(**small)).eval()
    assert isinstance(collator_of(model), FlatCollator)
    assert model.config._attn_implementation == ROWS
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="a row reads the one before it"):
        collator_of(model, fast_path=False)


def heads(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Queries of 4 heads, keys and values of 2: (1, heads, total, dim), as a model has them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(LENGTHS), n, 64) for n in (4, 2, 2)]
    made = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("window", [None, 6])
def test_rows_against_one_softmax_with_a_mask(window):
    q, k, v = heads(torch.float64)
    given = {"scaling": 0.2, "sliding_window": window, "cu_seq_lens_q": BOUNDS}
    out, _ = rows_attention(None, q, k, v, None, **given)
    row = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    i = torch.arange(sum(LENGTHS))
    seen = (row[:, None] == row) & (i[:, None] >= i) & (i[:, None] - i < (window or 999))
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.2).masked_fill(~seen, -torch.inf)
    wanted = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
@pytest.mark.parametrize("attention", [rows_attention, varlen_attention])
def test_unsupported_arguments_are_refused(attention, argument):
    with pytest.raises(ValueError, match=f"no attention within rows has {argument}"):
        attention(None, *heads(torch.float32), None, cu_seq_lens_q=BOUNDS, **{argument: 1.0})


@pytest.mark.parametrize("family", axis("mistral, window", "llama"))
def test_usual_batches_are_computed_as_before_and_padding_is_refused(family, tmp_path):
    """Also a token at a time with a cache, as generate() does."""
    model = model_of(MAKE[family], tmp_path / "base").eval()
    ids = torch.arange(4, 28).view(2, 12)
    wanted = model(input_ids=ids).logits
    collator_of(model, packing=False)
    assert model.config._attn_implementation == ROWS
    mask = torch.ones_like(ids)
    got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # of about 1, in fp32
    cache, steps = None, []
    for i in range(ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=0, atol=1e-5)
    mask[0, 0] = 0
    with pytest.raises(UserError, match=r"rows without padding.*attn_implementation\('sdpa'\)"):
        model(input_ids=ids, attention_mask=mask)
    # a cache of a fixed size holds keys of tokens to come
    fixed = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    with pytest.raises(UserError, match=r"space for more tokens.*attn_implementation\('sdpa'\)"):
        model.generate(ids[:, :3], cache_implementation="static", **fixed)
    model.set_attn_implementation("sdpa")
    model(input_ids=ids, attention_mask=mask)


def on_ampere(test: Any) -> Any:
    has_it = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    skip = pytest.mark.skipif(not has_it, reason="needs a GPU of compute capability 8.0")
    return pytest.mark.gpu(skip(test))


@on_ampere
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_of_rows_on_a_gpu(dtype, window):
    given = {"sliding_window": window, "cu_seq_lens_q": BOUNDS.cuda(), "max_length_q": 30}
    results = []
    for attention in (varlen_attention, rows_attention):
        inputs = heads(dtype, "cuda")
        out, _ = attention(None, *inputs, None, **given)
        weights = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
        results.append([out, *torch.autograd.grad((out.float() * weights).sum(), inputs)])
    for got, wanted in zip(*results, strict=True):
        assert got.shape == wanted.shape
        # both round probabilities and outputs to 16 bits, in blocks of their own
        assert (got - wanted).float().norm() <= 4 * torch.finfo(dtype).eps * wanted.float().norm()


@on_ampere
def test_flash_attention_is_chosen_on_a_gpu(tmp_path):
    random_model(CONFIGS["qwen3"]()).save_pretrained(tmp_path / "base")
    model = adapted_model(tmp_path / "base", quant=replace(FP32, compute_dtype="bf16"))
    assert isinstance(collator_of(model), FlatCollator)
    assert model.config._attn_implementation == VARLEN
