"""The chat as people and scripts use it: expected answers are transformers' own."""

import io
import subprocess
import sys
from contextlib import nullcontext

import pytest
from conftest import FP32
from transformers import AutoTokenizer

from qlora import disable_adapter, load_adapter, load_base
from qlora.apps import chat
from qlora.apps.terminal import printable
from qlora.config import ChatConfig
from qlora.errors import UserError

QUESTIONS = ["hi", "what is it?"]


def oracle(adapter, base, *, tuned, system=None):
    """What transformers' generate answers to the questions in turn, with the history."""
    model = load_base(str(base), FP32)
    load_adapter(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    messages = [{"role": "system", "content": system}] if system else []
    found = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with nullcontext() if tuned else disable_adapter(model):
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        found.append(
            tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
        messages.append({"role": "assistant", "content": found[-1]})
    return [text.rstrip() for text in found]


@pytest.fixture
def talk(adapters, monkeypatch, capsys):
    """`talk(lines, …)`: what comes out on standard output and error."""

    def run(lines, terminal=False, **settings):
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        settings = {"max_new_tokens": 8, **settings}
        if "model" not in settings:
            settings = {"adapter": str(adapters("llama")), **settings}
        capsys.readouterr()
        chat.chat(ChatConfig(**settings))
        return capsys.readouterr()

    return run


def test_a_pipe_gets_the_answers_alone(talk, adapters, checkpoints):
    expected = oracle(adapters("llama"), checkpoints("llama"), tuned=True)
    assert len(set(expected)) == 2
    said = talk([QUESTIONS[0], "", QUESTIONS[1]])
    assert (said.out, said.err) == ("".join(f"{text}\n" for text in expected), "")
    alone = talk([], prompt=QUESTIONS[0])
    assert alone.out == f"{expected[0]}\n"
    again = talk(["what is it?", "/reset", *QUESTIONS, "/exit", "hi"])
    assert again.out.endswith(said.out)
    assert again.err == "The turns so far are forgotten.\n"


def test_base_and_adapter_have_a_history_each(talk, adapters, checkpoints):
    both = [
        oracle(adapters("llama"), checkpoints("llama"), tuned=tuned, system="be brief")
        for tuned in (False, True)
    ]
    said = talk(["/system be brief", *QUESTIONS], compare=True)
    assert said.out == "".join(
        f"── base ──\n{base}\n── with adapter ──\n{tuned}\n"
        for base, tuned in zip(*both, strict=True)
    )


def test_on_a_wide_terminal_they_stand_side_by_side(talk, adapters, checkpoints, monkeypatch):
    both = [oracle(adapters("llama"), checkpoints("llama"), tuned=t) for t in (False, True)]
    rows = []

    class Seen(chat.SideBySide):
        def show(self, texts, ended):
            super().show(texts, ended)
            if all(ended):
                rows.append([text.rstrip() for text in texts])

    monkeypatch.setattr(chat, "SideBySide", Seen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    said = talk(QUESTIONS, compare=True)
    assert rows[-1] == [both[0][1], both[1][1]]
    assert [both[0][0], both[1][0]] in rows
    lines = said.out.splitlines()
    assert lines[0].split() == ["base", "│", "with", "adapter"]
    assert "│" in lines[-1]


def test_rows_that_cannot_be_mixed_are_answered_in_turn(talk, monkeypatch, capsys):
    def refuse(model, names):
        raise UserError("DoRA's, which cannot be mixed by rows")

    expected = talk(QUESTIONS, compare=True).out
    monkeypatch.setattr(chat, "mixed_batch", refuse)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert talk(QUESTIONS, compare=True).out == printable(expected)


def test_a_person_may_err(talk, monkeypatch):
    lines = iter(["/rest", "/help", "x" * 600, KeyboardInterrupt(), "hi", EOFError()])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    said = talk([], terminal=True)
    assert "an adapter on" in said.err and "/help lists the commands." in said.err
    assert "error: unknown command /rest: wanted /reset, /system, /exit or /help" in said.err
    assert chat.HELP in said.err
    assert "error: this message has 6" in said.err
    assert "/exit or Ctrl-D leaves" in said.err
    assert len(said.out.strip()) > 1  # the answer to hi


def test_a_terminal_is_given_no_orders_and_a_pipe_the_text_as_it_is(monkeypatch, capsys):
    for is_terminal, expected in ((False, "a\x1b[2J b"), (True, "a[2J b")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda on=is_terminal: on, raising=False)
        running = chat.Running()
        for text in ("a\x1b[2J", "a\x1b[2J ", "a\x1b[2J b\n"):
            running([text], [False])
        assert capsys.readouterr().out == expected


def test_old_turns_are_forgotten_aloud(talk):
    said = talk(["x" * 300, "y" * 300])
    assert said.err == ("The oldest turn no longer fits into the model's context: forgotten.\n")


def test_ctrl_c_ends_a_script_and_not_a_chat(talk, monkeypatch):
    calls = []

    def interrupt(text):
        calls.append(text)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk([], prompt="hi")
    calls.clear()
    lines = iter(["hi", "what is it?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk([], terminal=True)
    assert next(lines, None) is None  # it went on to the end
    assert len(calls) > 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_new_tokens": 512},
            r"--max-new-tokens 512 leaves no space for a question: the model takes 512 tokens",
        ),
        ({"adapter": "nowhere"}, "adapter nowhere does not exist: give the folder"),
        ({"model": "nowhere/to/be"}, "model nowhere/to/be does not exist"),
    ],
)
def test_what_cannot_chat(talk, settings, message):
    with pytest.raises(UserError, match=message):
        talk(["hi"], **settings)


def test_a_classifier_cannot_chat(talk, adapters, tmp_path, checkpoints):
    base = load_base(str(checkpoints("llama")), FP32, task="seq-cls", labels=("a", "b"))
    base.save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="classifier is for seq-cls: only a causal language model"):
        talk(["hi"], model=str(tmp_path / "classifier"))


def test_a_base_without_a_template_says_so(talk, checkpoints, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints("llama"))
    tokenizer.chat_template = None
    folder = tmp_path / "base"
    folder.mkdir()
    for file in checkpoints("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    assert (
        "no chat template: turns are written as `### User:`" in talk(["hi"], model=str(folder)).err
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "give either --adapter, a folder that train.py wrote, or --model, a whole model; "
             "got neither"),
        (["--model", "a", "--compare"],
         "compare shows the base beside its adapter: give --adapter, not --model"),
    ],
)  # fmt: skip
def test_as_a_command(words, line):
    done = subprocess.run(
        [sys.executable, "-m", "qlora.chat", *words], capture_output=True, text=True, input=""
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")
