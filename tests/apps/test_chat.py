"""The chat as people and scripts use it: expected answers are transformers' own."""

import io
import shutil
import sys
from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import FP32, larger_tokenizer, one_by_one, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from qlora import UserError, disable_adapter, load_adapter, load_base
from qlora.apps import chat
from qlora.apps.chat import AnswerStreamer, Conversation, stream
from qlora.apps.terminal import printable
from qlora.config import ChatConfig
from qlora.data.generation import answers, generation_settings, prompt_ids

QUESTIONS = ["hi", "what is it?"]
TURNS = [("one", "1"), ("two", "2"), ("three", "3")]


@pytest.fixture(scope="module")
def expected(adapters, checkpoints):
    """`expected(tuned, system)`: what transformers' generate answers to QUESTIONS in turn."""
    model = load_base(str(checkpoints("llama")), FP32)
    load_adapter(model, adapters("llama"))
    tokenizer = AutoTokenizer.from_pretrained(adapters("llama"))

    def ask(tuned, system=None):
        messages = [{"role": "system", "content": system}] if system else []
        found = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            with nullcontext() if tuned else disable_adapter(model):
                found += one_by_one(model, tokenizer, [messages], max_new_tokens=8)
            messages.append({"role": "assistant", "content": found[-1]})
        return [text.rstrip() for text in found]

    return ask


@pytest.fixture
def talk(adapters, monkeypatch, capsys):
    """`talk(lines, …)`: what comes out on standard output and error; without lines, input()'s."""

    def run(*lines, **settings):
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(stdin, "isatty", lambda: not lines, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        defaults = {"adapter": str(adapters("llama")), "max_new_tokens": 8}
        chat.chat(ChatConfig(**defaults | settings))
        return capsys.readouterr()

    return run


def widen_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


def typed(monkeypatch, *lines):
    asked = Mock(side_effect=lines)
    monkeypatch.setattr("builtins.input", asked)
    return asked


def test_pipe_gets_the_answers_alone(talk, expected):
    both = expected(tuned=True)
    assert len(set(both)) == 2
    said = talk(QUESTIONS[0], "", QUESTIONS[1])
    assert (said.out, said.err) == ("".join(f"{text}\n" for text in both), "")
    assert talk(prompt=QUESTIONS[0]).out == f"{both[0]}\n"
    again = talk("what is it?", "/reset", *QUESTIONS, "/exit", "hi")
    assert again.out.endswith(said.out)
    assert again.err == "The conversation is cleared.\n"


def test_base_and_adapter_have_a_history_each(talk, expected):
    both = zip(expected(False, "be brief"), expected(True, "be brief"), strict=True)
    said = talk("/system be brief", *QUESTIONS, compare=True)
    assert said.out == "".join(
        f"── base ──\n{base}\n── with adapter ──\n{tuned}\n" for base, tuned in both
    )


def test_wide_terminal_shows_them_side_by_side(talk, expected, monkeypatch):
    widen_terminal(monkeypatch)
    show = chat.SideBySide.show
    with patch.object(chat.SideBySide, "show", autospec=True, side_effect=show) as shown:
        lines = talk(*QUESTIONS, compare=True).out.splitlines()
    ends = [call.args[1] for call in shown.call_args_list if all(call.args[2])]
    rows = [[text.rstrip() for text in texts] for texts in ends]
    base, tuned = expected(tuned=False), expected(tuned=True)
    assert rows[-1] == [base[1], tuned[1]] and [base[0], tuned[0]] in rows
    assert lines[0].split() == ["base", "│", "with", "adapter"] and "│" in lines[-1]


def test_adapter_that_cannot_be_mixed_is_shown_below(talk, monkeypatch):
    below = talk(*QUESTIONS, compare=True).out
    monkeypatch.setattr(chat, "mixed_batch", Mock(side_effect=UserError("DoRA cannot be mixed")))
    widen_terminal(monkeypatch)
    assert talk(*QUESTIONS, compare=True).out == printable(below)


def test_interactive_chat_continues_after_mistakes(talk, monkeypatch):
    typed(monkeypatch, "/rest", "/help", "x" * 600, KeyboardInterrupt, "hi", EOFError)
    said = talk()
    for words in ("an adapter on", "/help lists", "error: unknown command /rest", chat.HELP,
                  "error: this message has 6", "/exit or Ctrl-D leaves"):  # fmt: skip
        assert words in said.err
    assert len(said.out.strip()) > 1  # the answer to hi


def test_control_characters_reach_a_pipe_only(monkeypatch, capsys):
    for is_terminal, shown in ((False, "a\x1b[2J b"), (True, "a[2J b")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda on=is_terminal: on, raising=False)
        running = chat.GrowingText()
        for text in ("a\x1b[2J", "a\x1b[2J ", "a\x1b[2J b\n"):
            running([text], [False])
        assert capsys.readouterr().out == shown


def test_ctrl_c_ends_a_script_and_not_an_interactive_chat(talk, monkeypatch):
    calls = []

    def interrupt(text):
        calls.append(text)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk(prompt="hi")
    calls.clear()
    asked = typed(monkeypatch, *QUESTIONS, "/exit")
    talk()
    assert asked.call_count == 3 and len(calls) > 8


def test_oldest_turns_are_dropped_where_they_do_not_fit(talk):
    tokenizer = tiny_tokenizer()
    longest = len(prompt_ids(tokenizer, Conversation("be brief", TURNS[2:]).messages("four")))
    conversation = Conversation("be brief", list(TURNS))
    ids, dropped = conversation.prompt(tokenizer, "four", longest)
    assert (len(ids), dropped, conversation.turns) == (longest, 2, TURNS[2:])
    assert conversation.prompt(tokenizer, "four", longest)[1] == 0
    question = "x" * longest
    tokens = len(prompt_ids(tokenizer, Conversation("be brief").messages(question)))
    with pytest.raises(UserError, match=f"has {tokens} tokens; .* context has {longest} beside"):
        conversation.prompt(tokenizer, question, longest)
    assert conversation.turns == TURNS[2:]  # a question that does not fit drops no turn
    assert "full: dropped the oldest 1 turn" in talk("x" * 300, "y" * 300).err


@pytest.mark.parametrize("stop", [None, 3])
def test_streamed_texts_grow_to_the_answers_and_ctrl_c_keeps_them(stop):
    model, tokenizer, seen = tiny_model("llama"), tiny_tokenizer(), []
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]

    def show(texts, ended):
        seen.append([*map(list, (texts, ended))])
        if len(seen) == stop:
            raise KeyboardInterrupt

    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    settings = generation_settings(model, tokenizer, 10)
    texts, interrupted = stream(model, tokenizer, prompts, settings, show)
    assert texts == answers(model, tokenizer, chats, max_new_tokens=stop or 10)
    assert interrupted is bool(stop) and seen[-1] == [texts, [True, True]]
    assert len(seen) == (stop or 10) + 1  # each token, and the end
    for (before, _), (after, _) in pairwise(seen):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_row_ends_at_a_stop_token_and_shows_whole_characters():
    tokenizer, seen = tiny_tokenizer(), []
    streamer = AnswerStreamer(tokenizer, 2, [2], lambda texts, ended: seen.append([*texts]))
    streamer.put(torch.zeros(2, 3))
    right = [*tokenizer("b")["input_ids"], 2, 5, 5]
    for pair in zip(tokenizer("aé!")["input_ids"], right, strict=True):
        streamer.put(torch.tensor(pair))
    assert seen == [["a", "b"], ["a", "b"], ["aé", "b"], ["aé!", "b"]]
    assert streamer.ended == [False, True]
    streamer.end()
    assert streamer.texts == ["aé!", "b"]


def test_gpu_out_of_memory_is_an_error_a_chat_survives(talk, monkeypatch):
    full = Mock(side_effect=torch.OutOfMemoryError)
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", full)
    typed(monkeypatch, "hi", "/exit")
    assert "error: the GPU's memory ran out: /reset clears" in talk().err


def test_what_cannot_chat(talk, tmp_path, checkpoints):
    message = "--max-new-tokens 512 leaves no tokens .* context has 512 for"
    with pytest.raises(UserError, match=message):
        talk("hi", max_new_tokens=512)
    base = load_base(str(checkpoints("llama")), FP32, task="seq-cls", labels=("a", "b"))
    base.save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="classifier is a classifier of texts: chat needs a causal"):
        talk("hi", adapter=None, model=str(tmp_path / "classifier"))


def test_tokens_beyond_the_embedding_are_refused(talk, checkpoints, tmp_path):
    base = larger_tokenizer(shutil.copytree(checkpoints("llama"), tmp_path / "base"))
    assert talk("<t0>", adapter=None, model=str(base)).out
    with pytest.raises(UserError, match=r"these are used: '<t69>'\."):
        talk("<t69>", adapter=None, model=str(base))


def test_base_without_a_template_is_noted(talk, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    said = talk("hi", adapter=None, model=str(folder)).err
    assert "no chat template: turns are written as `### User:`" in said
