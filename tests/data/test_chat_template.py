"""Which tokens of a chat have loss: texts by hand, ids from transformers' apply_chat_template."""

import json
import re
from functools import cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import axis, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qlora.data.chats import Reading
from qlora.data.objectives import encode_chat
from qlora.data.rows import describe, prepare_data, prepare_tokenizer
from qlora.data.templates import apply_settings
from qlora.errors import UserError


def loop(turn: str, prompt: str = "") -> str:
    """A template that renders each message `m` by `turn`, and the generation prompt."""
    turns = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    return f"{turns}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


CHATML = loop(
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|im_start|>assistant\n",
)
LLAMA3 = "{{ bos_token }}" + loop(
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
LLAMA2 = loop(
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}"
)
MISTRAL = "{{ bos_token }}" + loop(  # v3: tools precede the last user turn, so early turns move
    "{% if m.role == 'user' %}"
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list | last) == m %}"
    "{{ '[TOOLS]' + (tools | tojson) if tools and last else '' }}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim + eos_token }}{% endif %}"
)
GEMMA = "{{ bos_token }}" + loop(
    "{{ raise_exception('System role not supported') if m.role == 'system' else '' }}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
) + loop(
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set text = m.content.split('</think>')[-1] %}"
    "{% set think = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + think + '\n</think>\n\n' if loop.index0 > ns.last else '' }}"
    "{{ text.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
    "<|im_start|>assistant\n",
)
THINKER = loop(  # DeepSeek-R1: its prompt opens a thought that the rendered turn does not have
    "{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}",
    "<|assistant|><think>\n",
)
OPENED = loop(
    "<|{{ m.role }}|>{{ '#thought\n' + m.reasoning + '\n##' if m.reasoning }}{{ m.content }}</s>",
    "<|assistant|>#thought\n",
)
PHI3 = loop(
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n{% else %}{{ eos_token }}"
)
MARKED = "{{ messages | length }}" + loop(  # changes with its length: only the marks tell a turn
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | length }}"
    "{{ m.content | upper | reverse + eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ m.content }}{% endif %}"
)
ALWAYS = {  # templates that open an assistant's turn at their end, asked or not
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "command-r7b": "{{ bos_token }}<|im_start|>Be kind<|eot_id|>{% for m in messages %}<|im_start|>"
    "<|{{ m.role }}|>{{ m.content }}{{ '<|end|>' if m.role == 'assistant' }}<|eot_id|>{% endfor %}"
    "<|im_start|><|assistant|>",
    "phi3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{{ '<|assistant|>\n' }}",
    "words": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
}
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or () %}{{ '<call>' + call.function.name + ' ' + ARGUMENTS }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWQ = loop(  # as of R1-Distill: the reasoning of every turn is cut off
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n",
    "<|im_start|>assistant\n<think>\n",
)
BARE = loop("{{ m.role }}: {{ m.content }}\n", "assistant:")
GLM = loop("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>")  # the next turn ends one
GPT_OSS = loop(  # another end inside a chat, at which generation does not stop
    "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "{{ eos_token if loop.last and m.role == 'assistant' else '<|end|>' }}",
    "<|start_header_id|>assistant",
)
PARTS = CHATML.replace("m.content }}", "m.content | map(attribute='text') | join }}")
NO_THINK = QWEN3.replace("if '</think>'", "if enable_thinking and '</think>'").replace(
    "assistant\n{%", "assistant\n<think>\n{{ '' if enable_thinking else '\n</think>\n\n' }}{%"
)
SPECIAL = [
    *["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"],
    *["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"],
]
TURNS = ("one plus one?", "two 😀", "and  one?", "three, not  two")
TALK = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TURNS)]
CHAT = {"messages": TALK}


def byte_level(template: str | None = CHATML, *, trim: bool = True, added: str = ""):
    """A byte-level BPE like Llama-3's: it encodes any text without loss; `added` are the special
    tokens around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = "assistant user model one two three plus and [INST] [/INST] \n\n ### Assistant:\n"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = trained(tokenizer, words, SPECIAL, template, initial_alphabet=alphabet)
    fast.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    if added:
        specials = [("<s>", fast.bos_token_id), ("</s>", fast.eos_token_id)]
        processor = processors.TemplateProcessing(single=added, special_tokens=specials)
        fast.backend_tokenizer.post_processor = processor
    return fast


def metaspace(template: str):
    """A BPE like Llama-2's: the space belongs to the token after it, and offsets cover it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    words = "[INST] one plus one? [/INST] two and one? three, not two [TOOLS]"
    return trained(tokenizer, words, ["<s>", "</s>", "<unk>"], template)


def trained(tokenizer, words, specials, template, **options):
    options |= {"vocab_size": 400, "special_tokens": specials, "show_progress": False}
    tokenizer.train_from_iterator([words] * 5, trainers.BpeTrainer(**options))
    names = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": specials[2:]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def prepare(path: Path, rows: list[dict], tokenizer):
    source = str(write_rows(path / "rows.jsonl", rows))
    return prepare_data(source, tokenizer, max_length=4096)


def learned(row: dict, tokenizer) -> list[str]:
    """The spans that have loss, decoded."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    groups = groupby(row["labels"], key=lambda label: label != -100)
    return [tokenizer.decode(list(ids)) for has_loss, ids in groups if has_loss]


def asked(answer: str) -> dict:
    return {"prompt": "one?", "completion": answer}


THOUGHTS = ("<think>\none and\n</think>\n\ntwo", "<think>\ntwo and\n</think>\n\nthree")
ROWS = {  # template, record, what is learned
    "chatml": (CHATML, CHAT, ["two 😀<|im_end|>", "three, not  two<|im_end|>"]),
    "llama3": (LLAMA3, CHAT, ["two 😀<|eot_id|>", "three, not  two<|eot_id|>"]),
    "llama2": (LLAMA2, CHAT, [" two 😀 </s>", " three, not  two </s>"]),
    "mistral": (MISTRAL, CHAT, [" two 😀</s>", " three, not  two</s>"]),
    "gemma": (GEMMA, CHAT, ["two 😀<end_of_turn>", "three, not  two<end_of_turn>"]),
    "qwen3": (
        QWEN3, CHAT, ["two 😀<|im_end|>", "<think>\n\n</think>\n\nthree, not  two<|im_end|>"],
    ),
    "thinker": (
        THINKER, CHAT, ["\n</think>\n\ntwo 😀</s>", "\n</think>\n\nthree, not  two</s>"],
    ),
    "a thought that the prompt opens in other words": (
        OPENED, CHAT, ["\n##two 😀</s>", "\n##three, not  two</s>"],
    ),
    "phi3": (PHI3, CHAT, ["two 😀<|end|>", "three, not  two<|end|>\n</s>"]),
    "bare": (BARE, CHAT, [" two 😀</s>", " three, not  two</s>"]),  # an end token is inserted
    "thoughts, each where the template shows it": (
        QWEN3,
        {"messages": [TALK[0], {**TALK[1], "content": THOUGHTS[0]}, TALK[2],
                      {**TALK[3], "content": THOUGHTS[1]}]},
        [THOUGHTS[0] + "<|im_end|>", THOUGHTS[1] + "<|im_end|>"],
    ),
    "an answer that begins like <think>": (
        THINKER, asked("<the answer>"), ["\n</think>\n\n<the answer></s>"]
    ),
    "not the space that ends the prompt": (
        BARE.replace("assistant:", "assistant: "), asked("😀"), ["😀</s>"]
    ),
    "an answer first and a question last": (
        CHATML,
        {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "bye"}]},
        ["hi<|im_end|>"],
    ),
    "an answer with its own eos": (BARE, asked("two</s>"), [" two</s>"]),
    "an answer with its own eos after a space": (BARE, asked("two </s>"), [" two </s>"]),
    "an answer with the end token that the template writes": (
        LLAMA2, asked("two</s>\n"), [" two </s>"],
    ),
    "an answer with eos where a turn ends in another token": (
        CHATML, asked("two<|im_end|></s>"), ["two<|im_end|>"],
    ),
    **{
        f"a turn opened unasked, {name}": (
            ALWAYS[name], CHAT, [f"{space}two 😀{end}", f"{space}three, not  two{end}"],
        )
        for name, space, end in (
            ("chatml", "", "<|im_end|>"), ("llama3", "", "<|eot_id|>"), ("phi3", "", "<|end|>"),
            ("command-r7b", "", "<|end|><|eot_id|>"), ("words", " ", "</s>"),
        )
    },
    "reasoning that the template cuts off": (
        QWQ, {"messages": [*TALK[:3], {**TALK[3], "content": THOUGHTS[1]}]},
        ["\n</think>\n\ntwo 😀<|im_end|>", "two and\n</think>\n\nthree<|im_end|>"],
    ),
    "reasoning under a key that the template does not read": (
        QWQ, {"messages": [TALK[0], {**TALK[1], "reasoning_content": "one and"}]},
        ["one and\n</think>\n\ntwo 😀<|im_end|>"],
    ),
    "reasoning under another name": (
        CHATML.replace("{{ m.content", "{{ m.thinking }}{{ m.content"),
        {"messages": [TALK[0], {**TALK[1], "reasoning_content": "one and"}]},
        ["one andtwo 😀<|im_end|>"],
    ),
    "no answers inside a prompt": (
        CHATML, {"prompt": TALK[:3], "completion": TALK[3:], "system": "s"},
        ["three, not  two<|im_end|>"],
    ),
    "an answer that the next turn ends": (
        GLM, CHAT, ["\ntwo 😀<|user|>", "\nthree, not  two<|user|>"],
    ),
    "another end inside a chat": (
        GPT_OSS, CHAT, ["<|end_header_id|>two 😀</s>", "<|end_header_id|>three, not  two</s>"],
    ),
    "content in parts": (PARTS, CHAT, ["two 😀<|im_end|>", "three, not  two<|im_end|>"]),
    "reasoning after a prompt that forbids it": (
        NO_THINK, asked(THOUGHTS[1]), ["two and\n</think>\n\nthree<|im_end|>"],
    ),
    "by generation marks, where nothing else tells": (MARKED, asked("two"), ["3OWT</s>"]),
}  # fmt: skip


@pytest.mark.parametrize(("template", "record", "expected"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("trim", axis(True, False))
def test_only_answers_and_their_end_have_loss(tmp_path, template, record, expected, trim):
    tokenizer = byte_level(template, trim=trim)
    rows, stats = prepare(tmp_path, [record], tokenizer)
    assert [text for row in rows for text in learned(row, tokenizer)] == expected
    if record is CHAT and template not in (
        BARE,
        THINKER,
        OPENED,
        GLM,
        GPT_OSS,
        PARTS,
        *ALWAYS.values(),
    ):
        reference = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)
        assert rows[0]["input_ids"] == reference["input_ids"]
    assert stats.tokens == sum(rows["length"]) == sum(map(len, rows["input_ids"]))
    assert stats.supervised_tokens == sum(i != -100 for row in rows for i in row["labels"])


@pytest.mark.parametrize("template", [LLAMA2, MISTRAL], ids=["llama2", "mistral"])
def test_token_with_the_space_before_the_answer_has_loss(tmp_path, template):
    tokenizer = metaspace(template)
    talk = [{**turn, "content": turn["content"].replace(" 😀", "")} for turn in TALK]
    tools = [{"type": "function", "function": {"name": "one"}}]
    rows, _ = prepare(tmp_path, [{"messages": talk, "tools": tools}], tokenizer)
    labels = [i for row in rows for i in row["labels"] if i != -100]
    space = "▁" if template is LLAMA2 else ""
    answers = f"▁two{space}</s>▁three,▁not▁▁two{space}</s>"
    assert "".join(tokenizer.convert_ids_to_tokens(labels)) == answers
    assert len(rows) == (1 if template is LLAMA2 else 2)  # MISTRAL's first turn loses the tools
    for row, turns in zip(reversed(rows), (talk, talk[:2]), strict=False):
        reference = tokenizer.apply_chat_template(turns, tools=tools, return_dict=True)
        assert row["input_ids"] == reference["input_ids"]


def test_tokenizer_without_offsets_gives_the_same_mask(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = BARE
    rows, _ = prepare(tmp_path, [CHAT], tokenizer)
    assert not tokenizer.is_fast
    texts = [*learned(rows[0], tokenizer), *learned(rows[1], tokenizer)]
    assert texts == [" two 😀</s>", " three, not  two</s>"]


def test_tool_calls_have_loss_and_answers_without_text_do_not(tmp_path):
    template = CHATML.replace("m.content", "m.content or (m.get('tool_calls') | tojson)")
    functions = {"name": "add", "arguments": {"a": 1}}, {"name": "len", "arguments": {"of": "x"}}
    calls = [[{"type": "function", "function": function}] for function in functions]
    turns = [{"role": "assistant", "content": None, "tool_calls": call} for call in calls]
    after = [{"role": "tool", "content": "2"}, {"role": "assistant", "content": ""}]
    rows = [{"messages": [TALK[0], turns[0], *after]}, {"messages": [TALK[0], turns[1]]}]
    tokenizer = byte_level(template)
    data, _ = prepare(tmp_path, rows, tokenizer)
    for row, call in zip(data, calls, strict=True):
        assert learned(row, tokenizer) == [json.dumps(call) + "<|im_end|>"]
    # a template that does not show the calls would teach the model to say nothing
    tokenizer.chat_template = CHATML.replace("m.content", "m.content or ''")
    with pytest.raises(UserError, match=r"row 1: .* template leaves out an answer \('add'\)"):
        prepare(tmp_path, rows, tokenizer)


@pytest.mark.parametrize("text", ["", "let me see", None])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("given", [{"city": "Rome", "n": [1]}, {}])
@pytest.mark.parametrize(
    "arguments",
    [
        "call.function.arguments | tojson",
        "call.function.arguments",
        "call.function.arguments.items() | map('tojson') | join",
        "call.function.arguments if call.function.arguments is string else '{}'",
    ],
)
def test_arguments_are_learned_once_whatever_form_the_template_reads(
    tmp_path, text, as_json, given, arguments
):
    """Where the template has `tojson`, an object; where it prints them, JSON of it."""
    call = {"name": "rain", "arguments": json.dumps(given) if as_json else given}
    turn = {"role": "assistant", "content": text, "tool_calls": [{"function": call}]}
    tokenizer = byte_level(CALLS.replace("ARGUMENTS", f"({arguments}) | string"))
    rows, _ = prepare(tmp_path, [{"messages": [TALK[0], turn]}], tokenizer)
    pairs = "".join(json.dumps(pair) for pair in given.items())
    shown = pairs if "items" in arguments else json.dumps(given)
    assert learned(rows[0], tokenizer) == [f"{text or ''}<call>rain {shown}<|im_end|>"]


@pytest.mark.parametrize("role", ["assistant", "tool"])
def test_missing_text_is_empty_where_the_template_reads_a_text(tmp_path, role):
    """As Qwen3's and Devstral's: `message.content.split`, `'</think>' in message.content`."""
    text = "{{ m.content.split('x')[0] }}{{ m.tool_calls[0].function.name if m.tool_calls }}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rain"}}]}
    turns = {"assistant": [call], "tool": [call, {"role": "tool", "content": None}, TALK[1]]}
    tokenizer = byte_level(CHATML.replace("{{ m.content }}", text))
    rows, _ = prepare(tmp_path, [{"messages": [TALK[0], *turns[role]]}], tokenizer)
    assert learned(rows[0], tokenizer)[0] == "rain<|im_end|>"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_null_text_where_the_template_tests_for_it(tmp_path, content):
    """As R1-Distill's: calls only where `content is none`, which apply_chat_template drops."""
    calls = "{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}"
    text = "{% if m.content is none %}" + calls + "{% else %}{{ m.content }}{% endif %}</s>"
    call = {"name": "rain", "arguments": {"n": 1}}
    turns = [{"role": "assistant", "tool_calls": [call], **content}, {"role": "tool"}]
    tokenizer = byte_level(loop("<|{{ m.role }}|>" + text, "<|assistant|>"))
    rows, _ = prepare(tmp_path, [{"messages": [TALK[0], *turns, TALK[1]]}], tokenizer)
    assert learned(rows[0], tokenizer) == [json.dumps(call) + "</s>", "two 😀</s>"]


def test_tool_calls_beside_text_are_not_left_out(tmp_path):
    turn = {**TALK[1], "tool_calls": [{"function": {"name": "rain", "arguments": {}}}]}
    with pytest.raises(
        UserError, match=r"row 1: .* leaves out an answer \('rain'\), the call of a"
    ):
        prepare(tmp_path, [{"messages": [TALK[0], turn]}], byte_level(CHATML))


def test_tools_and_reasoning_that_are_left_out_are_counted(tmp_path):
    tools = [{"type": "function", "function": {"name": "rain"}}]
    thought = {"messages": [TALK[0], {**TALK[1], "reasoning_content": "one and"}]}
    records = [CHAT, CHAT | {"tools": tools}, thought, thought | {"tools": tools}, CHAT]
    stats = prepare(tmp_path, records, byte_level(CHATML))[1]
    assert stats.lost == {"tools": 2, "reasoning": 2} and stats.special == 2
    said = "data: the model's chat template leaves out the reasoning of 2 rows and the tools of 2 "
    assert said in describe(stats, name="data")
    reads = "{{ tools | tojson if tools }}" + CHATML.replace(
        "{{ m.content", "{{ m.reasoning_content }}{{ m.content"
    )
    assert prepare(tmp_path, records, byte_level(reads))[1].lost == {}


ENDED = {  # text -> ids decoded; BOS and eos are added by the tokenizer, or only BOS, or neither
    "one": "<s>one</s>",
    "<s>one": "<s>one</s>",
    "<s>one</s>": "<s>one</s>",
    "one</s>\n": "<s>one</s>\n",
    "<|im_start|>user\none<|im_end|>\n": "<s><|im_start|>user\none<|im_end|>\n",
}


@pytest.mark.parametrize("added", ["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
@pytest.mark.parametrize("text", ENDED)
def test_text_rows_have_no_special_token_twice(tmp_path, added, text):
    tokenizer = byte_level(CHATML, added=added)
    rows, _ = prepare(tmp_path, [{"text": text}], tokenizer)
    bos = "<s>" if added.startswith("<s>") or text.startswith("<s>") else ""
    assert tokenizer.decode(rows[0]["input_ids"]) == bos + ENDED[text].removeprefix("<s>")
    assert rows[0]["labels"] == rows[0]["input_ids"]


@pytest.mark.parametrize("template", [LLAMA3, ALWAYS["llama3"], ALWAYS["command-r7b"]])
def test_text_of_a_rendered_chat_is_the_chat(tmp_path, template):
    """Without the turn that a template opens at its end."""
    tokenizer = byte_level(template, added="<s> $A")
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    rows, _ = prepare(tmp_path, [{"text": text}], tokenizer)
    chats, _ = prepare(tmp_path, [CHAT], tokenizer)
    assert rows[0]["input_ids"] == chats[0]["input_ids"]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_fallback_template(tmp_path, adds_bos):
    """Rendered without a change to the tokenizer, which prepare_tokenizer makes and reports."""
    tokenizer = byte_level(None, added="<s> $A" * adds_bos)
    rows, stats = prepare(tmp_path, [asked("two")], tokenizer)
    text = "<s>" * adds_bos + "### User:\none?\n\n### Assistant:\ntwo</s>\n\n"
    assert tokenizer.decode(rows[0]["input_ids"]) == text
    assert learned(rows[0], tokenizer) == ["two</s>"]
    assert stats.chats and tokenizer.chat_template is None
    assert prepare_tokenizer(tokenizer, chats=stats.chats) == ("pad_token", "chat_template")
    assert prepare_tokenizer(tokenizer, chats=True) == ()
    assert prepare(tmp_path, [asked("two")], tokenizer)[0][0] == rows[0]


@pytest.mark.parametrize("added", ["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
@pytest.mark.parametrize("template", [MISTRAL, "{{ bos_token }}" + BARE, None])
def test_bos_and_eos_once(tmp_path, added, template):
    """Whatever the tokenizer adds, and whether a template writes BOS itself."""
    tokenizer = byte_level(template, added=added)
    for row in prepare(tmp_path, [CHAT, {"messages": TALK[:2]}], tokenizer)[0]:
        text = tokenizer.decode(row["input_ids"])
        assert text.count("<s>") == bool(template or added.startswith("<s>"))
        assert text.rstrip().endswith("</s>") and "</s></s>" not in text


tokenizer_of = cache(byte_level)
ANY = [CHATML, LLAMA3, LLAMA2, MISTRAL, GEMMA, QWEN3, PHI3, BARE, GLM, GPT_OSS, PARTS]
ASKS, TELLS = (st.text(letters, min_size=1).filter(str.strip) for letters in ("αβ γ\n.", "жш щ\n!"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(ASKS, TELLS), min_size=1, max_size=3), st.sampled_from(ANY), st.booleans()
)
def test_of_any_chat_the_answers_are_learned_and_nothing_else(pairs, template, last):
    roles, tokenizer = ("user", "assistant"), tokenizer_of(template)
    messages = [{"role": roles[i], "content": pair[i]} for pair in pairs for i in (0, 1)]
    reading = Reading("last" if last else "all")
    rows = encode_chat({"messages": messages}, tokenizer, 10_000, (), reading)
    texts = [text for row in rows for text in learned(row, tokenizer)]
    tells = [re.sub("[^жшщ!]", "", text) for text in texts]
    assert tells == [re.sub("[^жшщ!]", "", pair[1]) for pair in (pairs[-1:] if last else pairs)]
    assert not re.search("[αβγ]", "".join(texts))
    rendered = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert template is PARTS or tokenizer.decode(rows[-1]["input_ids"]).startswith(rendered)


def test_switches_are_the_template_s_defaults_and_must_be_in_it(tmp_path):
    tokenizer, unset = byte_level(NO_THINK), {"chat_template": None, "template": {}}
    apply_settings(tokenizer, SimpleNamespace(enable_thinking=True, **unset))
    talk = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(TALK[:1], **talk).endswith("assistant\n<think>\n")
    forbidden = tokenizer.apply_chat_template(TALK[:1], enable_thinking=False, **talk)
    assert forbidden.endswith("</think>\n\n")  # a caller's own wins
    rows, _ = prepare(tmp_path, [asked("two")], tokenizer)
    assert learned(rows[0], tokenizer) == ["\n</think>\n\ntwo<|im_end|>"]
    unset |= {"enable_thinking": None, "template": {"enable_thinkin": 1}}
    with pytest.raises(UserError, match=r"it has enable_thinking\. Did you"):
        apply_settings(tokenizer, SimpleNamespace(**unset))
    (tmp_path / "none.jinja").write_text("\n")
    both = unset | {"enable_thinking": True, "template": {"enable_thinking": False}}
    with pytest.raises(UserError, match="enable_thinking is given twice"):
        apply_settings(tokenizer, SimpleNamespace(**both))
    for name, fault in (("none", "is empty"), ("gone", "cannot be read: No such")):
        unset["chat_template"] = str(tmp_path / f"{name}.jinja")
        with pytest.raises(UserError, match=rf"{name}\.jinja {fault}"):
            apply_settings(tokenizer, SimpleNamespace(**unset))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}", r"row 1: the assistant's turns cannot be found .* marks"),
        ("{{ messages[-1].content | length }}" + THINKER, "turns cannot be found"),
        (GEMMA, r"row 2: the model's chat template rejects the chat: System role not supported\."),
        ("{{ raise_exception('a\nb') }}", "template rejects the chat: a"),
    ],
)
def test_templates_that_cannot_be_trained_with(tmp_path, template, message):
    rows = [CHAT, {"messages": [{"role": "system", "content": "s"}, *TALK]}]
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, rows, byte_level(template))
