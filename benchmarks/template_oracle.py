"""What transformers alone tells of a chat template: its renderings, prompts and stop tokens.

Nothing here uses this library. The tokenizer encodes bytes, and has the special tokens of the
template; TOKENS, SOURCED and WITHIN say of models what their templates do not.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

# beginning of a template's name: bos, eos, and other special tokens that it does not write
TOKENS = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseekv3": ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
    "diffusion_gemma": ("<bos>", "<eos>"),
    "gemma": ("<bos>", "<eos>"),
    "glm": ("", "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics": ("<|begin_of_text|>", "<|end_of_text|>", "<end_of_utterance>"),
    "lfm": ("<|startoftext|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava": ("<s>", "</s>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi": ("<s>", "<|endoftext|>"),
    "qwen": ("", "<|im_end|>"),
}
LLAMA = (
    ("<|eot_id|>", "<|eom_id|>"),
    "transformers' convert_llama_weights_to_hf.py (01cc9cd): eos_token_id [128001, 128008, 128009]",
)
SOURCED = {  # stop tokens that no oracle marks
    "diffusion_gemma": (
        ("<|tool_response>",),
        "eos_token_id [1, 106, 50] of Gemma 4's generation_config; the template writes it after a "
        "call without a result",
    ),
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
}
WITHIN = {  # ends of marked parts at which generation goes on
    "diffusion_gemma": ("<tool_call|>", "<|tool_response> follows"),
    "gptoss": (
        "<|end|>",
        "of a message within a turn: openai-harmony's stop_tokens_for_assistant_actions are "
        "<|return|> and <|call|>",
    ),
}
SPECIAL = r"<\|[^<>|\s'\"]+\|>|<\uff5c[^<>\s]+?\uff5c>|<\|[a-z_]+>|<[a-z_]+\|>"
SPECIAL += r"|<(?:start|end)_of_\w+>|\[/?INST\]|\[gMASK\]|<sop>"
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added, but not special
TOOL = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "toolword",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = [{"role": "user", "content": f"userword{i} asks"} for i in range(2)]
ANSWER = [{"role": "assistant", "content": f"answerword{i} is said"} for i in range(2)]
THOUGHT = [{**a, "reasoning_content": f"thoughtword{i} is meant"} for i, a in enumerate(ANSWER)]
CALL = {"type": "function", "id": "call00001"}
CALL |= {"function": {"name": "rain", "arguments": {"city": "callword"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "resultword", "name": "rain", "tool_call_id": "call00001"}
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER[0], ANSWER[0]]},
    "two turns": {"messages": [USER[0], ANSWER[0], USER[1], ANSWER[1]]},
    "system": {"messages": [{"role": "system", "content": "systemword"}, USER[0], ANSWER[0]]},
    "thinking": {"messages": [USER[0], THOUGHT[0]]},
    "thinking twice": {"messages": [USER[0], THOUGHT[0], USER[1], THOUGHT[1]]},
    "tools": {"messages": [USER[0], CALLS, RESULT, ANSWER[0]], "tools": [TOOL]},
    "tools with thinking": {
        "messages": [
            USER[0], {**CALLS, "reasoning_content": "callthought is meant"}, RESULT, THOUGHT[0],
        ],
        "tools": [TOOL],
    },
}  # fmt: skip
LEARNED = r"(?:answer|thought|call)word\d?|callthought"
OTHERS = r"(?:user|system|tool|result)word\d?"


def names_of(name: str) -> tuple[str, ...]:
    """bos, eos and other special tokens of the models with the template `name`."""
    keys = [key for key in TOKENS if name.startswith(key)]
    return TOKENS[max(keys, key=len)] if keys else ("<s>", "</s>")


def tokenizer_for(name: str, template: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and each special token of the template as one token."""
    bos, eos, *stops = names_of(name)
    specials = dict.fromkeys([eos, *stops, *([bos] if bos else []), *re.findall(SPECIAL, template)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in WORDS])
    named = {"bos_token": bos or None, "eos_token": eos, "pad_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def forms(chat: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """A chat's messages in the forms that templates read."""
    blank = ("", None, [{"type": "text", "text": ""}])
    for parts, text, missing in product((False, True), (False, True), blank):
        messages = []
        for message in chat["messages"]:
            message = dict(message)
            if not message.get("content"):
                message["content"] = missing
            elif parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
            if "tool_calls" in message:
                message["tool_calls"] = [written(call, text) for call in message["tool_calls"]]
            messages.append(message)
        yield messages


def written(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """A tool call with its arguments as JSON or as an object."""
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def shown(template: str, tokenizer: Any, chat: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The chat with most of its words, as a template renders it, and its marked parts.

    None if every form is rejected or lacks a word of a message other than reasoning.
    """
    wanted = set(re.findall(rf"{LEARNED}|{OTHERS}", json.dumps(chat["messages"])))
    needed = {word for word in wanted if not word.startswith(("thought", "callthought"))}
    best: tuple[int, str, list[str]] | None = None
    for messages in forms(chat):
        try:
            texts, indices = render_jinja_template(
                [messages], tools=chat.get("tools"), chat_template=template,
                return_assistant_tokens_mask="generation" in template,
                **tokenizer.special_tokens_map,
            )  # fmt: skip
        except (TemplateError, TypeError, AttributeError):
            continue
        found = {word for word in wanted if word in texts[0]}
        spans: list[tuple[int, int]] = []
        for start, end in indices[0] if indices else ():
            if spans and start == spans[-1][1]:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        marked = [texts[0][start:end] for start, end in spans if texts[0][start:end]]
        if needed <= found and (best is None or len(found) > best[0]):
            best = len(found), texts[0], marked
    return best and (best[1], best[2])


def cannot(template: str, tokenizer: Any, chat: dict[str, Any]) -> str:
    """Why no form of a chat can be shown whole: the template's own sentence, or what it never
    reads; "" if there is no such reason."""
    raised: dict[str, None] = {}
    for messages in forms(chat):
        try:
            text = render_jinja_template(
                [messages], tools=chat.get("tools"), chat_template=template,
                **tokenizer.special_tokens_map,
            )[0][0]  # fmt: skip
        except TemplateError as error:
            raised |= {str(error): None} if str(error)[:20] in template else {}
        except (TypeError, AttributeError):
            pass
        else:
            no_call = "callword" in str(messages) and "callword" not in text
            unread = no_call and "tool_calls" not in template
            return "it has no `tool_calls`" if unread else ""
    return f"it raises {next(iter(raised))!r}" if raised else ""


def prompts(
    template: str, chat: dict[str, Any], i: int, tokenizer: Any, **more: Any
) -> Iterator[str]:
    """What transformers prompts with for message i, of each form of the messages before it, and of
    tools with and without `function` around each."""
    given = chat.get("tools") or []
    whole = [t if "function" in t else {"type": "function", "function": t} for t in given]
    all_forms = product(forms({"messages": chat["messages"][:i]}), (given, whole))
    for messages, tools in all_forms:
        with suppress(TemplateError, TypeError, AttributeError):
            yield render_jinja_template(
                [messages], tools=tools or None, chat_template=template,
                add_generation_prompt=True, **tokenizer.special_tokens_map, **more,
            )[0][0]  # fmt: skip


def stops_of(name: str, template: str, oracle: str | None) -> tuple[list[str], str]:
    """The tokens at which generation has to stop, and where that is known from."""
    tokenizer, sourced, within = tokenizer_for(name, template), SOURCED.get(name), WITHIN.get(name)
    special = [re.escape(token) for token in tokenizer.all_special_tokens]
    special += [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    found: dict[str, None] = {}
    for chat in CHATS.values() if oracle else ():
        for text in (shown(str(oracle), tokenizer, chat) or ("", []))[1]:
            end = re.search(rf"(?:{'|'.join(special)})$", text.rstrip())
            found |= {end[0]: None} if end else {}
    sources = ["ends of the oracle's marked parts"] if found else []
    if within and found.pop(within[0], "") is None:
        sources.append(f"but {within[0]}, {within[1]}")
    for token in sourced[0] if sourced else ():
        found[token] = None
    return list(found), "; ".join([*sources, *([sourced[1]] if sourced else [])])
