"""Answers in batches, against transformers' generate on one prompt at a time."""

import copy

import pytest
import torch
from conftest import CHATML, axis, one_by_one, tiny_model, tiny_tokenizer

from qlora.data import generation
from qlora.data.generation import answers, generate, generation_settings, prompt_ids, stop_ids
from qlora.data.rows import prepare_tokenizer

TEXTS = ("hi", "what is the weather like?", "lights off", "and now a longer one, please")
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
CHATS[2].insert(0, {"role": "system", "content": "be kind"})


@pytest.mark.parametrize("family", axis("llama", "gpt2", "gemma"))
def test_batches_answer_as_one_by_one(family, monkeypatch):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    expected = one_by_one(model, tokenizer, CHATS, max_new_tokens=12)
    assert len(set(expected)) > 2
    for limit, value in (("BATCH_ROWS", 32), ("BATCH_ROWS", 2), ("BATCH_TOKENS", 1)):
        monkeypatch.setattr(generation, limit, value)
        assert answers(model, tokenizer, CHATS, max_new_tokens=12) == expected
    assert answers(model, tokenizer, []) == []


def test_model_and_tokenizer_are_left_as_they_were(caplog, capsys):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, max_length=30)
    model.config.use_cache = False
    before = copy.deepcopy(model.generation_config.to_dict())
    answers(model.train(), tokenizer, CHATS, max_new_tokens=4)
    assert model.training and not model.config.use_cache
    assert model.generation_config.to_dict() == before
    assert tokenizer.padding_side == tiny_tokenizer().padding_side
    # transformers has a warning for each of: sampling settings, two lengths, no pad token
    assert caplog.text + capsys.readouterr().err == ""


def test_a_base_model_has_neither_template_nor_pad(caplog):
    model, tokenizer, written = tiny_model("llama without pad"), tiny_tokenizer(), tiny_tokenizer()
    tokenizer.chat_template = tokenizer.pad_token = written.chat_template = None
    prepare_tokenizer(written, chats=True)
    expected = one_by_one(model, written, CHATS, max_new_tokens=8)
    assert answers(model, tokenizer, CHATS, max_new_tokens=8) == expected
    assert tokenizer.chat_template is tokenizer.pad_token is None
    assert caplog.text == ""


def test_an_answer_ends_where_the_template_ends_it():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = prompt_ids(tokenizer, CHATS[1])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
    third = ids[len(prompt) + 2]
    tokenizer.eos_token = "<bos>"
    end = tokenizer.convert_ids_to_tokens(third)
    tokenizer.add_special_tokens({"extra_special_tokens": [end]})
    tokenizer.chat_template = CHATML.replace("<|im_end|>", end)
    assert stop_ids(model, tokenizer) == sorted({1, 2, third})
    settings = generation_settings(model, tokenizer, 8)
    whole, _ = generate(model, tokenizer, [prompt, prompt], settings)
    assert whole == tokenizer.decode(ids[len(prompt) : len(prompt) + 2])


def test_drawn_answers_come_from_torchs_generator():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = []
    for temperature in (2.0, 2.0, 0.0):
        torch.manual_seed(1)
        found.append(answers(model, tokenizer, CHATS, max_new_tokens=8, temperature=temperature))
    assert found[0] == found[1] != found[2]


def test_an_encoder_decoder_writes_nothing_but_the_answer():
    model, tokenizer = tiny_model("t5"), tiny_tokenizer()
    prompts = [tokenizer("one")["input_ids"], tokenizer("two and three")["input_ids"]]
    plain = {"max_new_tokens": 6, "do_sample": False}
    outputs = [model.generate(torch.tensor([prompt]), **plain)[0] for prompt in prompts]
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]
    assert generate(model, tokenizer, prompts, generation_settings(model, tokenizer, 6)) == expected
