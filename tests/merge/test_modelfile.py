"""The Modelfile's template of Go, against what transformers renders."""

import re

import pytest
from conftest import CHATML, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from qlora.data.templates import fallback_template, rendered
from qlora.merge import modelfile

TURN = "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<end>' }}"
LOOP = f"{{% for message in messages %}}{TURN}{{% endfor %}}"
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
WITHIN = (  # Llama 2: BOS at each question, the system message within the first
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{% if m.role == 'user' %}"
    "{{ '<bos>[INST] ' }}{% if system and loop.first %}{{ '<<SYS>>' + system + '<</SYS>> ' }}"
    "{% endif %}{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|system|>Be kind.<end>' }}{% endif %}"
LAST = (  # Mistral: the system message within the last question
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role "
    "== 'system' %}{{ messages[0].content }}{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
SYSTEM = [{"role": "system", "content": "Be {{ brief }}.\nOK?"}]
TALK = [
    {"role": ("user", "assistant")[i % 2], "content": text}
    for i, text in enumerate(("One {{\n1?", "two", "Three?", "four", "Five?"))
]


def tokenizer_with(template, adds_bos=False):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        post = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def go(template, messages):
    """What Go's text/template makes of it, of the actions that are used here."""
    parts = re.split(r"{{ (.*?) }}", template)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    values = {".System": system}

    def block(at, stop=("end",)):
        """Index of the next end or else of this block."""
        depth = 0
        for i in range(at, len(parts), 2):
            word = parts[i].split()[0]
            if not depth and word in stop:
                return i
            depth += (word in ("if", "range")) - (word == "end")
        raise AssertionError(template)

    def holds(condition, message, last):
        if found := re.fullmatch(r'eq .Role "(\w+)"', condition):
            return message["role"] == found[1]
        return not last if condition == "not $last" else last if condition == "$last" else bool(
            values[condition])  # fmt: skip

    def run(first, end, message=None, last=False):
        out, i = "", first
        while i < end:
            out += parts[i]
            i += 1
            if i >= end:
                break
            action = parts[i]
            word = action.split()[0]
            if word == "range":
                close = block(i + 2)
                for n, each in enumerate(messages):
                    out += run(i + 1, close, each, n == len(messages) - 1)
                i = close
            elif word == "if":
                close, at, condition = block(i + 2), i, action.removeprefix("if ")
                while True:
                    other = block(at + 2, ("else", "end"))
                    if condition is None or holds(condition, message, last):
                        out += run(at + 1, other, message, last)
                        break
                    if other == close:
                        break
                    at = other
                    rest = parts[other].removeprefix("else").strip()
                    condition = rest.removeprefix("if ") if rest else None
                i = close
            elif found := re.fullmatch(r"(\$\w+) :?= (.*)", action):
                value = {'""': "", "true": True, "false": False}.get(found[2], found[2])
                values[found[1]] = values.get(value, value)
            elif action == '"{{"':
                out += "{{"
            else:
                out += message["content"] if action == ".Content" else str(values[action])
            i += 1
        return out

    return run(0, len(parts))


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("template", "has_system"),
    [
        (CHATML, True),
        (DEFAULT + LOOP + PROMPT, True),
        ("{{ bos_token }}" + NO_SYSTEM + LOOP + PROMPT, False),
        (WITHIN, True),
        ("{% for m in messages %}<{{ '{{' }}{{ m.role }}>{{ m.content }}{% endfor %}", True),
        (None, True),  # the fallback template
    ],
    ids=["chatml", "default system", "no system", "within", "braces", "fallback"],
)
def test_gos_template_renders_chats_as_transformers_does(template, has_system, adds_bos):
    tokenizer = tokenizer_with(template, adds_bos)
    turns = modelfile.turns_of(tokenizer)
    assert turns and bool(turns.system) == has_system
    text = turns.go(modelfile.added_bos(tokenizer))
    for chat in [TALK[:n] for n in (1, 3, 5)] + [SYSTEM + TALK[:n] for n in (1, 3) if has_system]:
        wanted = rendered(tokenizer, fallback_template(tokenizer), chat, None, True)
        assert go(text, chat) == (wanted.removeprefix("<bos>") if adds_bos else wanted)


def test_a_template_that_is_no_sequence_of_turns_is_left_out(tmp_path, capsys):
    tokenizer_with(LAST).save_pretrained(tmp_path)
    modelfile.write(tmp_path, tmp_path / "a b.gguf", tmp_path, {"eos_token_id": 3}, frozenset())
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith("FROM ./a b.gguf\n# ") and "\nTEMPLATE" not in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>"\n')
    assert "TEMPLATE is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "form", "wanted"),
    [
        ("mine", "gguf-q4_k_m", "mine-Q4_K_M.gguf"),
        ("mine-q4_0", "gguf-q4_0", "mine-Q4_0.gguf"),
        ("bf16", "gguf-bf16", "BF16.gguf"),
    ],
)
def test_the_files_name(folder, form, wanted):
    assert modelfile.file_name(folder, form) == wanted
