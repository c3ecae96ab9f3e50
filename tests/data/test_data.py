"""Records, chats and rows: texts by hand, ids from transformers."""

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora.data.records import chat_of, load_records, prompt_messages
from qlora.data.rows import (
    DataStats,
    collator,
    describe,
    prepare_data,
    prepare_tokenizer,
    show_example,
)
from qlora.errors import UserError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # as in v3: the tools come before the last user turn, so early turns move
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list | last) == m %}"
    "{{ ('[TOOLS]' + (tools | tojson) if tools and last else '') + '[INST] ' + m['content'] }}"
    "{{ '[/INST]' }}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{% set text = m['content'].split('</think>')[-1] %}"
    "{% set think = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m['content'] else '' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}"
    "{{ text.lstrip('\n') + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek-R1: the generation prompt opens a thought that the rendered turn does not have
THINKER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
MARKED = (  # the whole changes with its length, so only the marks tell where a turn is
    "{{ messages | length }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | length }}{{ m['content'] | upper | reverse + eos_token }}"
    "{% endgeneration %}{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SPECIAL = [
    *["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"],
    *["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"],
]
TALK = [
    {"role": "user", "content": "one plus one?"},
    {"role": "assistant", "content": "two 😀"},
    {"role": "user", "content": "and  one?"},
    {"role": "assistant", "content": "three, not  two"},
]
CHAT = {"messages": TALK}
SHORT = {"prompt": "a", "completion": "b"}


def chat_messages(record: dict):
    chat = chat_of(record)
    return chat and chat.messages


def byte_level(template: str | None = CHATML, *, eos: str = "</s>", trim: bool = True):
    """A byte-level BPE like Llama-3's: any text goes through it and comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = (
        "assistant user system model one two three plus and [INST] [/INST] \n\n ### Assistant:\n"
    )
    tokenizer.train_from_iterator([words] * 5, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        extra_special_tokens=SPECIAL[2:],
        chat_template=template,
    )


def metaspace(template: str):
    """A BPE like Llama-2's: the space belongs to the token after it, and offsets cover it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    text = ["[INST] one plus one? [/INST] two and one? three, not two [TOOLS]"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(path: Path, rows: list[dict], tokenizer, max_length: int = 4096):
    return prepare_data(write(path / "rows.jsonl", rows), tokenizer, max_length=max_length)


def learned(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The stretches that have loss, decoded."""
    stretches: list[list[int]] = []
    inside = False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            stretches = stretches if inside else [*stretches, []]
            stretches[-1].append(token)
        inside = label != -100
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in stretches]


# ---- the mask, template by template


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["two 😀<|im_end|>", "three, not  two<|im_end|>"]),
        (LLAMA3, ["two 😀<|eot_id|>", "three, not  two<|eot_id|>"]),
        (LLAMA2, [" two 😀 </s>", " three, not  two </s>"]),
        (MISTRAL, [" two 😀</s>", " three, not  two</s>"]),
        (GEMMA, ["two 😀<end_of_turn>", "three, not  two<end_of_turn>"]),
        (
            QWEN3,
            ["two 😀<|im_end|>", "<think>\n\n</think>\n\nthree, not  two<|im_end|>"],
        ),
        (THINKER, ["two 😀</s>", "three, not  two</s>"]),
        (PHI3, ["two 😀<|end|>", "three, not  two<|end|>\n</s>"]),
        (BARE, [" two 😀", " three, not  two</s>"]),
    ],
    ids=["chatml", "llama3", "llama2", "mistral", "gemma", "qwen3", "thinker", "phi3", "bare"],
)
@pytest.mark.parametrize("trim", [True, False], ids=["trimmed", "untrimmed"])
def test_only_the_answers_and_their_end_have_loss(tmp_path, template, expected, trim):
    tokenizer = byte_level(template, trim=trim)
    rows, stats = prepare(tmp_path, [CHAT], tokenizer)
    assert learned(rows[0], tokenizer) == expected
    if template != BARE:  # there an end token is put in
        reference = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)
        assert rows[0]["input_ids"] == reference["input_ids"]
    assert stats.tokens == rows[0]["length"] == len(rows[0]["input_ids"])
    assert stats.supervised_tokens == sum(label != -100 for label in rows[0]["labels"])


@pytest.mark.parametrize("template", [LLAMA2, MISTRAL], ids=["llama2", "mistral"])
def test_a_token_with_the_space_before_the_answer_has_loss(tmp_path, template):
    tokenizer = metaspace(template)
    talk = [{**turn, "content": turn["content"].replace(" 😀", "")} for turn in TALK]
    tools = [{"type": "function", "function": {"name": "one"}}]
    rows, _ = prepare(tmp_path, [{"messages": talk, "tools": tools}], tokenizer)
    ids = [token for token in rows[0]["labels"] if token != -100]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    space = "▁" if template is LLAMA2 else ""
    assert "".join(tokens) == f"▁two{space}</s>▁three,▁not▁▁two{space}</s>"
    reference = tokenizer.apply_chat_template(talk, tools=tools, return_dict=True)
    assert rows[0]["input_ids"] == reference["input_ids"]


def test_thoughts_are_learned_only_where_the_template_shows_them(tmp_path):
    tokenizer = byte_level(QWEN3)
    talk = [dict(turn) for turn in TALK]
    talk[1]["content"] = "<think>\none and\n</think>\n\ntwo"
    talk[3]["content"] = "<think>\ntwo and\n</think>\n\nthree"
    rows, _ = prepare(tmp_path, [{"messages": talk}], tokenizer)
    assert learned(rows[0], tokenizer) == [
        "two<|im_end|>",
        "<think>\ntwo and\n</think>\n\nthree<|im_end|>",
    ]


def test_an_answer_that_begins_like_the_generation_prompt_is_whole(tmp_path):
    tokenizer = byte_level(THINKER)
    answer = "<the answer>"  # shares its first characters with the prompt's <think>
    rows, _ = prepare(tmp_path, [{"prompt": "one?", "completion": answer}], tokenizer)
    assert learned(rows[0], tokenizer) == ["<the answer></s>"]


def test_a_space_that_ends_the_prompt_has_no_loss(tmp_path):
    tokenizer = byte_level(BARE.replace("'assistant:'", "'assistant: '"), trim=True)
    rows, _ = prepare(tmp_path, [{"prompt": "one?", "completion": "😀"}], tokenizer)
    assert learned(rows[0], tokenizer) == ["😀</s>"]


def test_generation_marks_serve_where_nothing_else_does(tmp_path):
    tokenizer = byte_level(MARKED)
    row = {"messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "two"}]}
    rows, _ = prepare(tmp_path, [row], tokenizer)
    assert learned(rows[0], tokenizer) == ["3OWT</s>"]
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match=r"row 1: the assistant's turns cannot be found .* marks"):
        prepare(tmp_path, [row], tokenizer)


def test_a_prompt_that_changes_with_its_answer_is_refused_not_learned(tmp_path):
    tokenizer = byte_level("{{ messages[-1]['content'] | length }}" + THINKER)
    with pytest.raises(UserError, match="turns cannot be found"):
        prepare(tmp_path, [{"prompt": "one?", "completion": "two"}], tokenizer)


def test_a_tokenizer_without_offsets_gives_the_same_mask(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = BARE
    rows, _ = prepare(tmp_path, [CHAT], tokenizer)
    assert not tokenizer.is_fast
    assert learned(rows[0], tokenizer) == [" two 😀", " three, not  two</s>"]


def test_an_answer_may_be_first_and_a_question_last(tmp_path):
    tokenizer = byte_level(CHATML)
    talk = [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "bye"}]
    rows, _ = prepare(tmp_path, [{"conversations": talk}], tokenizer)
    assert learned(rows[0], tokenizer) == ["hello<|im_end|>"]


def test_tool_calls_have_loss_and_answers_without_text_do_not(tmp_path):
    template = CHATML.replace(
        "message['content'] +", "(message['content'] or (message.get('tool_calls') | tojson)) +"
    )
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    other = [{"type": "function", "function": {"name": "len", "arguments": {"of": "x"}}}]
    talk = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": ""},
    ]
    rows = [{"messages": talk}, {"messages": [talk[0], {**talk[1], "tool_calls": other}]}]
    tokenizer = byte_level(template)
    data, _ = prepare(tmp_path, rows, tokenizer)
    assert learned(data[0], tokenizer) == [json.dumps(call) + "<|im_end|>"]
    assert learned(data[1], tokenizer) == [json.dumps(other) + "<|im_end|>"]
    # a template that does not show the calls would teach the model to say nothing
    tokenizer.chat_template = CHATML.replace("message['content'] +", "(message['content'] or '') +")
    message = r"row 1: the model's chat template leaves out an answer \('add'\): write it as text"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, rows, tokenizer)


@pytest.mark.parametrize("answer", ["two</s>", "two </s>"])
def test_an_answer_that_brings_its_own_eos_gets_no_second_end(tmp_path, answer):
    tokenizer = byte_level(BARE)
    rows, _ = prepare(tmp_path, [{"prompt": "one?", "completion": answer}], tokenizer)
    assert learned(rows[0], tokenizer) == [f" {answer}"]


# ---- records


def test_every_kind_of_record_becomes_messages():
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    system = {"role": "system", "content": "s"}
    extra = {"name": None, "tool_calls": None}
    assert chat_messages({"messages": [{**user, **extra}, answer]}) == [user, answer]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert chat_messages({"conversations": sharegpt}) == [user, answer]
    assert chat_messages({"conversations": [user, answer], "system": "s"}) == [system, user, answer]
    assert chat_messages({"prompt": "a", "completion": "b"}) == [user, answer]
    assert chat_messages({"prompt": [system, user], "completion": [answer]}) == [
        *(system, user, answer)
    ]
    alpaca = {"instruction": "a", "input": "", "output": "b"}
    assert chat_messages(alpaca) == [user, answer]
    assert chat_messages({**alpaca, "input": "c", "system": "s"}) == [
        *(system, {"role": "user", "content": "a\n\nc"}, answer)
    ]
    assert chat_messages({"instruction": "a", "output": 3})[1]["content"] == "3"
    assert chat_messages({"messages": json.dumps([user, answer]), "text": "t"}) == [user, answer]
    parts = [{"type": "text", "text": "a"}]
    assert chat_messages({"messages": [{"role": "user", "content": parts}]}) == [user]
    assert chat_messages({"text": "a"}) is None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *[("human", "user"), ("user", "user"), ("gpt", "assistant"), ("bing", "assistant")],
        *[("chatgpt", "assistant"), ("function_call", "assistant"), ("tool", "tool")],
        *[("observation", "tool"), ("function_response", "tool"), ("system", "system")],
    ],
)
def test_sharegpt_roles(name, role):
    assert chat_messages({"conversations": [{"from": name, "value": "a"}]}) == [
        {"role": role, "content": "a"}
    ]


def test_prompt_messages_end_before_the_last_answer():
    assert prompt_messages(CHAT) == TALK[:3]
    assert prompt_messages({"messages": TALK[:3]}) == TALK[:1]
    assert prompt_messages({"messages": TALK[:1]}) == TALK[:1]
    assert prompt_messages({"text": "a"}) == []


def test_answers_in_a_prompt_are_context(tmp_path):
    tokenizer = byte_level()
    row = {"prompt": TALK[:3], "completion": TALK[3:], "system": "s"}
    rows, _ = prepare(tmp_path, [row], tokenizer)
    assert learned(rows[0], tokenizer) == ["three, not  two<|im_end|>"]


def test_tools_reach_the_template(tmp_path):
    tokenizer = byte_level("{{ tools | tojson }}" + CHATML)
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows, _ = prepare(tmp_path, [{**CHAT, "tools": tools}], tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith(json.dumps(tools))


def test_text_is_learned_whole_and_ended(tmp_path):
    tokenizer = byte_level(None)
    (tmp_path / "a.txt").write_text("one two\n\n  \nthree\n", encoding="utf-8")
    rows, stats = prepare_data(str(tmp_path / "a.txt"), tokenizer, max_length=64)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["one two</s>", "three</s>"]
    assert rows["labels"][:] == rows["input_ids"][:]
    assert stats.supervised_tokens == stats.tokens
    assert tokenizer.chat_template is None  # none is needed


def test_the_fallback_template_is_plain(tmp_path):
    tokenizer = byte_level(None)
    rows, stats = prepare(tmp_path, [{"prompt": "one?", "completion": "two"}], tokenizer)
    text = "### User:\none?\n\n### Assistant:\ntwo</s>\n\n"
    assert tokenizer.decode(rows[0]["input_ids"]) == text
    assert learned(rows[0], tokenizer) == ["two</s>"]
    assert stats.chats and tokenizer.chat_template is None  # until the caller asks for it
    assert prepare_tokenizer(tokenizer, chats=stats.chats) == ("pad_token", "chat_template")
    assert prepare_tokenizer(tokenizer, chats=True) == ()
    assert prepare(tmp_path, [{"prompt": "one?", "completion": "two"}], tokenizer)[0][0] == rows[0]


def test_the_fallback_template_has_a_bos_where_the_tokenizer_adds_one(tmp_path):
    tokenizer = byte_level(None)
    bos = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = bos
    rows, _ = prepare(tmp_path, [{"prompt": "one?", "completion": "two"}], tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<s>### User:")


# ---- files


def test_all_file_kinds_give_the_same_rows(tmp_path):
    rows = [{"prompt": "a", "completion": "None"}, {"prompt": "é, b", "completion": "c\nd"}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert load_records(str(tmp_path / f"a.{kind}")).to_list() == rows


@pytest.mark.parametrize("name", ["dates.jsonl", "dates.json"])
def test_dates_are_text_as_they_are_in_the_file(tmp_path, name):
    rows = [
        {"prompt": "May 1, 2024", "completion": "2024-05-01", "label": "2024-05-01T07:30:00Z"},
        {"prompt": "4 July 1990", "completion": "1990-07-04"},
    ]
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows, indent=1)
    (tmp_path / name).write_text(lines)
    records = load_records(str(tmp_path / name))
    assert records["completion"][:] == ["2024-05-01", "1990-07-04"]
    assert records["label"][:] == ["2024-05-01T07:30:00Z", None]


def test_a_folder_of_one_kind_is_read_in_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("no data")
    assert load_records(str(tmp_path))["text"][:] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"one kind \(.*\), it has \.csv and \.jsonl: name one"):
        load_records(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it has none"):
        load_records(str(tmp_path / "empty"))


def test_an_edited_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [{"text": "old"}])
    stamp = path.stat()
    assert load_records(str(path))["text"][:] == ["old"]
    write(path, [{"text": "new"}])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # nothing but the content differs
    assert load_records(str(path))["text"][:] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


# ---- bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", "x", r"a\.xlsx is no \.jsonl .* file: convert it"),
        ("a.jsnl", "x", r"Did you mean \.jsonl\?"),
        ("a.jsonl", "", r"a\.jsonl has no rows: at least one record"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "text\n", "has no rows"),
        ("a.txt", "\n\n", "has no rows"),
        ("a.jsonl", '{"text": "a"}\n\n{"text" "b"}\n', r"a\.jsonl, line 3: .*: one JSON object a"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2: got a list, not an object"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', r"a\.json, line 3: Expecting ':' delimiter"),
        ("a.json", '{"text": "a"}\n{"text": \n', r"a\.json, line 2"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "cannot be read as csv: .*line 3.* Mend the file"),
        ("a.parquet", "x", "cannot be read as parquet: .* Mend the file"),
        ("a.csv", b"text\ncaf\xe9\n", r"a\.csv, line 2: UTF-8 is wanted"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"line 1: UTF-8 is wanted, .* save it as UTF-8"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_records(str(tmp_path / name))


def test_numbers_in_a_csv_are_text_as_they_stand_there(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,label\n1,007,3\n2,1.50,4\n3,1e5,5\n")
    records = load_records(str(tmp_path / "a.csv"))
    assert records["completion"][:] == ["007", "1.50", "1e5"]
    assert records["prompt"][:] == ["1", "2", "3"]
    assert records["label"][:] == [3, 4, 5]  # of a classifier, a number


@pytest.mark.parametrize("name", ["train.jsonl", "data/train.csv", "./train", "/no/such", "a/b/c"])
def test_a_missing_path_is_no_hub_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{name} does not exist: give a \.jsonl .* hub name"):
        load_records(name)


def test_a_missing_path_in_a_folder_suggests_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"does not exist: .* Did you mean train\.jsonl\?"):
        load_records("trian.jsonl")


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("someone/something", "train")
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub (LocalEntryNotFound)")

    monkeypatch.setattr("qlora.data.records.load_dataset", load_dataset)
    message = "'someone/something' is neither a file or folder here nor .* Couldn't reach .* Give a"
    with pytest.raises(UserError, match=message):
        load_records("someone/something")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            r"columns question, answer: wanted are messages; .* text",
        ),
        ({"conversation": []}, r"Did you mean conversations\?"),
        ({"prompt": "a", "completions": "b"}, r"Did you mean completion\?"),
        ({"messages": [{"role": "assistent", "content": "a"}]}, r"row 1: unknown role 'assistent'"),
        ({"messages": [{"role": "assistent", "content": "a"}]}, r"Did you mean assistant\?"),
        ({"messages": [{"content": "a"}]}, r"row 1: unknown role None"),
        (
            {"messages": [{"role": "assistant", "tool_calls": "f(1)"}]},
            r"row 1: tool_calls must be a list of calls, got 'f\(1\)'",
        ),
        ({"messages": ["a"]}, r"row 1: a message must be .* got 'a'"),
        ({"messages": "hello"}, r"row 1: messages must be a list, or one as JSON, got 'hello'"),
        ({"messages": {"role": "user"}}, r"row 1: messages must be a list of messages, got a dict"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "row 1: a message holds more than text",
        ),
    ],
)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, [row], byte_level())


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (SHORT, {"prompt": "a", "completion": " "}),
        (SHORT, {"prompt": "a", "completion": None}),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}),
        (CHAT, {"messages": TALK[:1]}),
        (CHAT, {"messages": None}),
        (CHAT, {"messages": [TALK[0], {"role": "assistant", "content": None}]}),
    ],
)
def test_rows_without_an_answer_are_named(tmp_path, good, bad):
    message = r"7 of 9 rows have no answer \(row 2, 3, 4, 5, 6, …\): each needs .* Fill or remove"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, [good, *[bad] * 7, good], byte_level())


def test_what_the_template_refuses_is_said(tmp_path):
    row = {"messages": [{"role": "system", "content": "s"}, *TALK]}
    message = (
        r"rows\.jsonl, row 2: the model's chat template refuses it: System role not supported\."
    )
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, [CHAT, row], byte_level(GEMMA))


def test_errors_are_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        prepare(tmp_path, [CHAT], byte_level("{{ raise_exception('a\nb') }}"))
    assert "\n" not in str(error.value)


# ---- cuts and counts


def test_rows_are_cut_and_counted(tmp_path):
    tokenizer = byte_level()
    long = {"prompt": "a", "completion": "b" * 50}
    hopeless = {"prompt": "a" * 200, "completion": "b"}
    whole, _ = prepare(tmp_path, [SHORT], tokenizer)
    length = whole[0]["length"] + 5
    rows, stats = prepare(tmp_path, [long, hopeless, SHORT], tokenizer, max_length=length)
    assert [row["length"] for row in rows] == [length, length - 5]
    assert learned(rows[0], tokenizer) == ["b" * 8]  # 5 more than b, <|im_end|>, \n
    assert stats == DataStats(
        rows=2,
        tokens=2 * length - 5,
        supervised_tokens=8 + 2,
        cut_rows=2,
        dropped_rows=1,
        chats=True,
    )
    line = f"train: 2 rows, {2 * length - 5} tokens, 10 of them supervised"
    assert describe(stats, name="train").startswith(line)
    assert describe(stats, name="train").endswith(
        "train: 2 rows cut at max_length, 1 rows dropped because no answer was left"
    )
    message = r"cut to 12 tokens, no row has an answer left .* 2\d\d tokens\): raise --max-length"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, [hopeless], tokenizer, max_length=12)


def test_a_row_of_one_token_has_nothing_to_predict(tmp_path):
    tokenizer = byte_level(None)
    tokenizer.eos_token = None
    rows, stats = prepare(tmp_path, [{"text": "one two"}, {"text": "a"}], tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["one two"]
    assert (stats.rows, stats.dropped_rows) == (1, 1)


def test_describe_is_one_line_when_nothing_was_lost():
    stats = DataStats(rows=1200, tokens=4000, supervised_tokens=1000, cut_rows=0, dropped_rows=0)
    assert describe(stats, name="eval") == (
        "eval: 1,200 rows, 4,000 tokens, 1,000 of them supervised (25%)"
    )


def test_show_example_marks_what_is_learned(tmp_path):
    tokenizer = byte_level(LLAMA3)
    rows, _ = prepare(tmp_path, [CHAT], tokenizer)
    legend, text = show_example(rows, tokenizer, colour=False).split("\n", 1)
    assert legend == "An example row; the model learns what is between ⟦ and ⟧:"
    assert text.count("⟦") == 2 and text.endswith("⟦three, not  two<|eot_id|>⟧")
    assert "\x1b[32mthree, not  two<|eot_id|>\x1b[0m" in show_example(rows, tokenizer, colour=True)


# ---- batches


def test_pads_have_no_loss_and_the_answers_eos_has(tmp_path):
    tokenizer = byte_level(eos="<|im_end|>")
    tokenizer.padding_side = "left"
    rows, _ = prepare(tmp_path, [{"messages": chat_messages(SHORT)}, CHAT], tokenizer)
    with pytest.raises(UserError, match="no pad token: call prepare_tokenizer"):
        collator(tokenizer)
    assert prepare_tokenizer(tokenizer) == ("pad_token",)
    batch = collator(tokenizer)([rows[0], rows[1]])
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.padding_side == "left"  # the tokenizer's own side is left alone
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape[1] % 8 == 0
    length = rows[0]["length"]
    assert length < rows[1]["length"]
    labels = torch.tensor(rows[0]["labels"])
    assert torch.equal(batch["labels"][0, :length], labels)
    assert (labels == tokenizer.eos_token_id).sum() == 1  # the answer's own end
    assert (batch["labels"][0, length:] == -100).all()
    assert (batch["input_ids"][0, length:] == tokenizer.pad_token_id).all()
    assert batch["attention_mask"].sum(dim=1).tolist() == [length, rows[1]["length"]]


def test_a_tokenizer_with_nothing_to_pad_with():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(UserError, match="no pad, eos or unk token: set one"):
        prepare_tokenizer(tokenizer)
    tokenizer.unk_token = "a"
    assert prepare_tokenizer(tokenizer) == ("pad_token",)
    assert tokenizer.pad_token == "a"
