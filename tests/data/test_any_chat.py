"""Of any chat with any template: what is learned, after which text, and that nothing else is.

Chats are random: system messages, tools, calls in several steps, reasoning, content in parts. Each
kind of text has an alphabet of its own, so that the letters of a learned text tell whose it is. The
prompts to compare with are those of transformers' apply_chat_template.
"""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import learned, loop, tokenizer_of

from qlora.data.chats import Reading
from qlora.data.objectives import encode_chat

END = "<|im_end|>"
CALLS = "{% for c in m.tool_calls or () %}<call>{{ c.function | tojson }}{% endfor %}"
TOOLS = "{{ bos_token }}{% if tools %}<|user|>{{ tools | tojson }}<|im_end|>{% endif %}"
LAST = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
HEAD, ASK = "<|im_start|>{{ m.role }}\n", "<|im_start|>assistant\n"
IS_NEW = "m.role == 'assistant' and loop.index0 > ns.last"
TEXTS = "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"


def thinking(shown: str, empty: bool) -> str:
    """A block of reasoning if `shown`, which may be an empty one."""
    own = "" if empty else " and m.reasoning_content"
    block = "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    return f"{{% if {shown}{own} %}}{block}{{% endif %}}"


TEMPLATES = {
    "reasoning is kept": TOOLS
    + loop(HEAD + thinking("true", empty=False) + TEXTS + CALLS + END + "\n", ASK),
    "earlier reasoning is dropped": LAST
    + TOOLS
    + loop(HEAD + thinking(IS_NEW, empty=True) + TEXTS + CALLS + END + "\n", ASK),
    "the prompt opens a thought": LAST
    + TOOLS
    + loop(HEAD + thinking(IS_NEW, empty=True) + TEXTS + CALLS + END + "\n", ASK + "<think>\n"),
    "earlier turns have an empty thought": LAST
    + TOOLS
    + loop(
        HEAD + "{% if m.role == 'assistant' and not loop.index0 > ns.last %}<think></think>"
        "{% endif %}" + thinking(IS_NEW, empty=True) + TEXTS + CALLS + END + "\n",
        ASK + "<think>\n",
    ),
    "the next turn ends one": TOOLS
    + loop(
        "<|{{ 'user' if m.role in ('system', 'tool') else m.role }}|>"
        + thinking("true", empty=False) + TEXTS + CALLS,
        "<|assistant|>",
    ),
    "another end inside a chat": TOOLS
    + loop(
        HEAD + thinking("true", empty=False) + TEXTS + CALLS
        + "{{ eos_token if loop.last and m.role == 'assistant' else '<|end|>' }}",
        ASK,
    ),
    "content in parts": TOOLS
    + loop(
        HEAD + thinking("true", empty=False) + "{{ m.content[0].text }}" + CALLS + END + "\n", ASK
    ),
}  # fmt: skip
STOPS = ("<|im_end|>", "</s>", "<|user|>")
LEARNED, OTHERS = "жшдлюя", "αβλμστ"


def words(letters: str) -> st.SearchStrategy[str]:
    """A text with a space or line break inside, whose ends are letters of its own."""
    return st.text(f"{letters} \n.😀", max_size=4).map(
        lambda text: f"{letters[0]}{text}{letters[1]}"
    )


def is_parts(text: str) -> Any:
    """A text as it is or as a list of one part."""
    return st.sampled_from([text, [{"type": "text", "text": text}]])


STEP = st.tuples(words("дл"), words("λμ"), st.none() | words("юя"))  # arguments, result, reasoning
ROUND = st.tuples(words("αβ"), st.lists(STEP, max_size=2), words("жш"), st.none() | words("юя"))


@st.composite
def chats(draw: Any) -> dict[str, Any]:
    """A record with messages, and tools."""
    messages = [{"role": "system", "content": "στ"}] if draw(st.booleans()) else []
    for asked, steps, told, thought in draw(st.lists(ROUND, min_size=1, max_size=3)):
        messages.append({"role": "user", "content": draw(is_parts(asked))})
        for arguments, result, meant in steps:
            call = {"function": {"name": "rain", "arguments": {"q": arguments}}}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            messages.append(turn | ({"reasoning_content": meant} if meant else {}))
            messages.append({"role": "tool", "content": result})
        turn = {"role": "assistant", "content": draw(is_parts(told))}
        messages.append(turn | ({"reasoning_content": thought} if thought else {}))
    tools = [{"type": "function", "function": {"name": "rain", "description": "στ"}}]
    return {"messages": messages} | ({"tools": tools} if draw(st.booleans()) else {})


def letters(text: str, alphabet: str = LEARNED) -> str:
    return re.sub(f"[^{alphabet}]", "", text)


def said(message: dict[str, Any]) -> str:
    """The letters of an assistant's message in their order."""
    content = message["content"] if isinstance(message["content"], str) else message["content"][0]
    calls = [call["function"]["arguments"]["q"] for call in message.get("tool_calls", ())]
    return letters(f"{message.get('reasoning_content', '')}{content}{calls}")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(chat=chats(), last=st.booleans())
def test_each_answer_is_learned_once_after_its_prompt(template, chat, last):
    tokenizer = tokenizer_of(template)
    rows = encode_chat(chat, tokenizer, 10_000, (), Reading("last" if last else "all"))
    messages = chat["messages"]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = []
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        starts = [i for i, v in enumerate(labels) if v != -100 and labels[i - 1] == -100]
        found += [
            (tokenizer.decode(ids[:start]), text)
            for start, text in zip(starts, learned(row, tokenizer), strict=True)
        ]
    assert len(found) == len(turns[-1:] if last else turns)
    for i, (before, text) in zip(turns[-len(found) :], found, strict=True):
        assert letters(text) == said(messages[i]) and not letters(text, OTHERS)
        assert text.rstrip().endswith(STOPS)
        history = messages[:i]
        if "m.content[0]" in template and "is string" not in template:
            history = [{**m, "content": [{"text": flat(m)}]} for m in history]
        else:
            history = [{**m, "content": flat(m)} for m in history]
        options = {"tools": chat.get("tools"), "tokenize": False, "add_generation_prompt": True}
        assert before == tokenizer.apply_chat_template(history, **options)


def flat(message: dict[str, Any]) -> str:
    """The content of a message as text."""
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]
