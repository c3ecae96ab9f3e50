"""Turns of a chat, and answers as they are written."""

from itertools import pairwise

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from qlora.apps.chat import AnswerStreamer, Conversation, stream
from qlora.data.generation import answers, generation_settings, prompt_ids
from qlora.errors import UserError

TURNS = [("one", "1"), ("two", "2"), ("three", "3")]


def test_the_history_comes_before_the_question():
    tokenizer = tiny_tokenizer()
    chat = Conversation("be brief", TURNS[:1])
    expected = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "two"},
        ],
        add_generation_prompt=True,
    )["input_ids"]
    assert chat.prompt(tokenizer, "two", None) == (expected, 0)


def test_the_oldest_turns_go_where_they_do_not_fit():
    tokenizer = tiny_tokenizer()
    kept = Conversation("be brief", TURNS[2:])
    room = len(prompt_ids(tokenizer, kept.messages("four")))
    chat = Conversation("be brief", list(TURNS))
    ids, forgotten = chat.prompt(tokenizer, "four", room)
    assert (len(ids), forgotten, chat.turns) == (room, 2, TURNS[2:])
    assert chat.prompt(tokenizer, "four", room)[1] == 0
    question = "x" * room
    tokens = len(prompt_ids(tokenizer, Conversation("be brief").messages(question)))
    with pytest.raises(UserError, match=f"has {tokens} tokens, and the model takes {room} with"):
        chat.prompt(tokenizer, question, room)
    assert chat.turns == TURNS[2:]  # a question that cannot be asked costs no turn


def test_what_is_shown_grows_to_the_answers():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in ("hi", "what is it?")]
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    seen = []
    settings = generation_settings(model, tokenizer, 10)

    def show(texts, ended):
        seen.append((list(texts), list(ended)))

    texts, interrupted = stream(model, tokenizer, prompts, settings, show)
    assert texts == answers(model, tokenizer, chats, max_new_tokens=10)
    assert not interrupted
    assert len(seen) == 11  # each token, and the end
    assert seen[-1] == (texts, [True, True])
    for (before, _), (after, _) in pairwise(seen):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_a_row_ends_at_a_stop_token_and_shows_whole_characters():
    tokenizer = tiny_tokenizer()
    seen = []
    streamer = AnswerStreamer(tokenizer, 2, [2], lambda texts, ended: seen.append([*texts]))
    streamer.put(torch.zeros(2, 3))
    for left, right in zip(tokenizer("aé!")["input_ids"], [*tokenizer("b")["input_ids"], 2, 5, 5],
                           strict=True):  # fmt: skip
        streamer.put(torch.tensor([left, right]))
    assert seen == [["a", "b"], ["a", "b"], ["aé", "b"], ["aé!", "b"]]
    assert streamer.ended == [False, True]
    streamer.end()
    assert streamer.texts == ["aé!", "b"]


def test_ctrl_c_keeps_what_was_said():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    chat = [{"role": "user", "content": "what is it?"}]
    calls = []

    def show(texts, ended):
        calls.append(list(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt

    prompts = [prompt_ids(tokenizer, chat)]
    texts, interrupted = stream(
        model, tokenizer, prompts, generation_settings(model, tokenizer, 10), show
    )
    assert interrupted
    assert texts == answers(model, tokenizer, [chat], max_new_tokens=3)


def test_a_full_gpu_is_said_in_one_line(monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def full(**_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(UserError, match="GPU's memory ran out: /reset forgets the turns"):
        stream(model, tokenizer, [[5]], generation_settings(model, tokenizer, 3), print)
