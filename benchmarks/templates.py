"""Loss masks over a folder of chat templates, against copies of them with generation marks.

    python benchmarks/templates.py FOLDER                   a table; exit code 1 if a mask is wrong
    python benchmarks/templates.py FOLDER --chats DATA …    also each row of these data sets
    python benchmarks/templates.py FOLDER --output FILE.md  write the table to a file, too

`NAME.jinja` is a template; `NAME_training.jinja`, where there is one, is the same with generation
marks around what is learned: the oracle. Each template is combined with small chats. A mask is
right if, for every assistant turn,

- the learned text equals the oracle's, but for differences with a reason (REASONS);
- all words of the answers are in it, and none of the user, of the system, or of a tool;
- it ends in a stop token: one with which the oracle ends a marked part, or one of SOURCED; and
  chat and evaluation stop there;
- it follows the text with which transformers prompts at that turn, and so do `prompt_ids`.

A combination may be refused if no form of the chat is shown whole by the template itself, which is
tested here with transformers alone. No network, no weights: the tokenizer encodes bytes, and has
the special tokens of the template.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from template_oracle import (
    CHATS,
    LEARNED,
    OTHERS,
    cannot,
    prompts,
    shown,
    stops_of,
    tokenizer_for,
)

from qlora.data.chat_template import learned_turns
from qlora.data.chats import chat_of
from qlora.data.generation import prompt_ids, taught_stop_ids
from qlora.data.objectives import encode_chat
from qlora.data.records import load_records
from qlora.data.rows import prepare_data
from qlora.data.templates import common_length, set_switches
from qlora.errors import UserError

REASONS = {
    "header": "the oracle also learns what the generation prompt has already",
    "break": "the oracle also learns the line break after the end token",
    "empty": "an empty <think> block, which the template writes at other turns than the oracle",
    "end": "another end token: the one at which generation stops",
    "own header": "after a tool's result, the prompt lacks the header that the template writes",
    "thought": "reasoning is learned, where the turn is the last; the oracle's template drops it",
    "own rows": "no difference: a turn that the rest of the chat changes is learned in its own row",
    "unread": "the template reads no reasoning; the count of such rows is printed",
}
OF_CHATS = ("llama3_1", "qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "gptoss", "deepseekv3",
            "nemotron_3_nano", "diffusion_gemma", "gemma3")  # fmt: skip
OF_ROWS = {  # why templates cannot show some rows of the data sets, in their own words
    "deepseekv3": "`ns.is_first` is never set back: a call after a chat's first one has no header",
    "gemma3": "it raises 'Conversation roles must alternate', and has no `tool_calls`",
    "gptoss": "it shows `message.tool_calls[0]` only, and rows have several calls in a message",
    "llama3_1": "it raises 'This model only supports single tool-calls at once!'",
}


@dataclass
class Mark:
    """The result for a template and a chat."""

    kind: str  # right, refused, WRONG
    notes: list[str] = field(default_factory=list)


# ---- the mask of this library


def prepared(chat: dict[str, Any], tokenizer: Any) -> Any:
    """The rows of a chat."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.jsonl"
        path.write_text(json.dumps(chat) + "\n")
        return prepare_data(str(path), tokenizer, max_length=100_000)


def difference(ours: str, oracle: str, prompt: str, stops: Sequence[str]) -> list[str] | None:
    """The names of the reasons why the two texts differ; None if there is another difference."""
    reasons = []
    if header := _header(oracle, prompt):
        oracle = oracle[header:]
        reasons.append("header")
    if (own := re.match(r"<\|turn>model\n", ours)) and not prompt.endswith(own[0]):
        ours = ours[own.end() :]
        reasons.append("own header")
    ends = [next((s for s in stops if t.rstrip().endswith(s)), "") for t in (ours, oracle)]
    if ends[0] and ends[0] != ends[1]:
        oracle = re.sub(r"<\|end\|>\s*$", "", oracle).rstrip() + ends[0]
        reasons.append("end")
    if ours.rstrip() == oracle.rstrip():
        return reasons + (["break"] if ours != oracle else [])
    block = re.compile(r"^\s*(?:<think>)?\s*</think>\s*")
    bare = [" ".join(block.sub("", text).split()) for text in (ours, oracle)]
    if bare[0] == bare[1]:
        return [*reasons, "empty"]
    meant = r"(?:<think>|<\|channel\|?>\w+\s*(?:<\|message\|>)?)?\s*\w*thought\w* is meant\s*"
    thought = re.sub(rf"^\s*{meant}(?:</think>|<channel\|>|<\|end\|><\|start\|>\w+)\s*", "", ours)
    if thought != ours and " ".join(thought.split()) == bare[1]:
        return [*reasons, "thought"]
    return None


def _header(oracle: str, prompt: str) -> int:
    """How many characters of the oracle's text end the prompt, apart from a block of reasoning."""
    for start in range(max(0, len(prompt) - 60), len(prompt)):
        length = common_length(oracle, prompt[start:])
        length -= oracle[:length].endswith("<")
        rest = prompt[start + length :]
        if length and re.fullmatch(r"\s*(<think>\s*(</think>\s*)?)?", rest):
            return length
    return 0


def judged(
    name: str, template: str, oracle: str | None, chat: dict[str, Any], stops: Sequence[str]
) -> Mark:
    """Whether the mask of a chat is right."""
    tokenizer = tokenizer_for(name, template)
    whole = shown(template, tokenizer, chat)
    try:
        rows, stats = prepared(chat, tokenizer)
    except UserError as error:
        reason = cannot(template, tokenizer, chat) if whole is None else ""
        told = f"{reason}; the message: {str(error).partition('row 1: ')[2]}"
        return Mark("refused" if reason else "WRONG", [told])
    if whole is None:
        return Mark("WRONG", ["trained, though the template leaves out a part of the chat"])
    switches = {"enable_thinking": True} if stats.thinks else {}
    set_switches(tokenizer, switches)  # as training does with the tokenizer that it saves
    turns = [turn for row in rows for turn in turns_of(row, tokenizer)]
    faults = list(_faults(chat, turns, tokenizer, stops, stats.lost))
    answers = [i for i, m in enumerate(chat["messages"]) if m["role"] == "assistant"]
    for i, (before, _) in zip(answers, turns, strict=False):
        told = tokenizer.decode(prompt_ids(tokenizer, chat["messages"][:i], chat.get("tools")))
        if told != before:
            faults.append(f"trained after {before[-40:]!r}, chat prompts with {told[-40:]!r}")
        if before not in prompts(template, chat, i, tokenizer, **switches):
            faults.append(f"trained after {before[-40:]!r}, transformers prompts otherwise")
    marked = (shown(oracle, tokenizer, chat) or ("", []))[1] if oracle else []
    notes = ["unread"] if "reasoning" in stats.lost else []
    notes += ["own rows"] if len(rows) > 1 else []
    if marked and len(marked) != len(turns):
        faults.append(f"{len(turns)} learned parts, the oracle has {len(marked)}")
    elif marked:
        for (prompt, ours), theirs in zip(turns, marked, strict=True):
            found = difference(ours, theirs, prompt, stops)
            if found is None:
                faults.append(f"learned {ours!r}, the oracle {theirs!r}")
            notes += found or []
    return Mark("WRONG" if faults else "right", faults or list(dict.fromkeys(notes)))


def turns_of(row: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """Of each learned part of a row, the text before it and its own."""
    found, ids, labels = [], row["input_ids"], row["labels"]
    starts = [i for i, v in enumerate(labels) if v != -100 and (i == 0 or labels[i - 1] == -100)]
    for start in starts:
        end = next((i for i in range(start, len(ids)) if labels[i] == -100), len(ids))
        found.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])))
    return found


def _faults(
    chat: Any, turns: Any, tokenizer: Any, stops: Sequence[str], lost: Any
) -> Iterator[str]:
    texts = [text for _, text in turns]
    learned = "".join(texts)
    if inside := set(re.findall(OTHERS, learned)):
        yield f"learns {', '.join(sorted(inside))}"
    wanted = re.findall(LEARNED, json.dumps(chat["messages"]))
    if "reasoning" in lost:
        wanted = [word for word in wanted if "thought" not in word]
    if missing := [word for word in wanted if word not in learned]:
        yield f"does not learn {', '.join(missing)}"
    if twice := [word for word in wanted if learned.count(word) > 1]:
        yield f"learns {', '.join(twice)} twice"
    taught = {tokenizer.convert_ids_to_tokens(i) for i in taught_stop_ids(tokenizer)}
    for text in texts:
        end = next((token for token in stops if text.rstrip().endswith(token)), None)
        if end is None:
            yield f"a turn's end is not learned: {text[-30:]!r}"
        elif end not in taught:
            yield f"generation would not stop at {end}"


# ---- data sets


def rows_of(path: Path, name: str, template: str) -> tuple[Counter[str], list[str]]:
    """Of a data set's rows, how many are trained and refused, and why; and what is wrong."""
    tokenizer, counts, faults = tokenizer_for(name, template), Counter[str](), []
    first = ""  # the number of the first row that is refused
    for number, record in load_records(str(path)).numbered():
        try:
            rows = encode_chat(record, tokenizer, 1 << 40)
        except UserError as error:
            first = first or number
            counts["refused"] += 1
            counts[re.sub(r" \('.*?'\)", "", str(error))[:100]] += 1
            continue
        counts["trained"] += 1
        chat = chat_of(record)
        assert chat is not None
        turns = [turn for row in rows for turn in turns_of(row, tokenizer)]
        learned = "".join(text for _, text in turns)
        given: Any = {"messages": chat.messages, "tools": chat.tools}
        switches = {"enable_thinking": True} if any(row["thinks"] for row in rows) else {}
        for i, (before, _) in zip(learned_turns(chat), turns, strict=True):
            if before not in prompts(template, given, i, tokenizer, **switches):
                faults.append(f"{path.name} x {name}, row {number}: message {i + 1}, its prompt")
        for message in chat.messages:
            text, is_answer = str(message.get("content") or ""), message["role"] == "assistant"
            text = text.rpartition("</think>")[2].strip()[:200] if is_answer else text.strip()[:200]
            calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
            if is_answer and not all(part in learned for part in (text, *calls)):
                faults.append(f"{path.name} x {name}, row {number}: {text or calls} is not learned")
            elif not is_answer and len(text) > 60 and text in learned:
                faults.append(f"{path.name} x {name}, row {number}: {text} is learned")
    try:
        prepare_data(str(path), tokenizer, max_length=100_000)
        told = ""
    except UserError as error:
        told = (re.findall(r", row (\d+): ", str(error)) or ["none"])[0]
    if told != first:
        faults.append(f"{path.name} x {name}: row {first} is refused, {told or 'none'} is named")
    return counts, faults


# ---- the tables


def table(results: dict[str, dict[str, Mark]]) -> str:
    """Templates by chats, and what differs from the oracle."""
    lines = [f"| template | {' | '.join(CHATS)} |", "|---" * (len(CHATS) + 1) + "|"]
    for name, marks in results.items():
        cells = [" ".join([m.kind, *(n for n in m.notes if n in REASONS)]) for m in marks.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    kinds = Counter(mark.kind for marks in results.values() for mark in marks.values())
    total = sum(kinds.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    lines += ["", f"{total} combinations: {counts}.", "", "Differences from the oracle:", ""]
    lines += [f"- {name}: {reason}" for name, reason in REASONS.items()]
    told = [
        f"- {name}, {chat}: {note}"
        for name, marks in results.items()
        for chat, mark in marks.items()
        for note in mark.notes
        if note not in REASONS
    ]
    return "\n".join(
        [
            *lines,
            "",
            "Refused, since the template itself cannot show the chat, and wrong:",
            "",
            *told,
        ]
    )


def main() -> int:
    """Print the tables; 1 if a mask is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chats", type=Path, nargs="*", default=[], help="data sets")
    parser.add_argument("--only", default="", help="templates whose name contains it")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    files = {path.stem: path for path in sorted(given.folder.glob("*.jinja"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    results: dict[str, dict[str, Mark]] = {}
    stops: dict[str, tuple[list[str], str]] = {}
    for name, text in texts.items():
        if name.endswith("_training") or given.only not in name:
            continue
        own = text if re.search(r"\{%-?\s*generation", text) else None
        oracle = texts.get(f"{name}_training", own)
        stops[name] = stops_of(name, text, oracle)
        judge = partial(judged, name, text, oracle, stops=stops[name][0])
        results[name] = {c: judge(chat) for c, chat in CHATS.items()}
    page = f"# Loss masks\n\nMade by `benchmarks/templates.py`.\n\n{table(results)}\n"
    page += "\n| template | generation has to stop at | known from |\n|---|---|---|\n"
    for name, (tokens, source) in stops.items():
        cells = (name, " ".join(f"`{token}`" for token in tokens), source)
        page += "".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in cells) + "|\n"
    faults = []
    if given.chats:
        page += "\n| data | template | trained | refused | of them |\n|---|---|---|---|---|\n"
        for path, name in product(given.chats, [n for n in OF_CHATS if n in results]):
            counts, more = rows_of(path, name, texts[name])
            faults += more
            why = "; ".join(
                f"{v} {k}" for k, v in counts.items() if k not in ("trained", "refused")
            )
            page += (
                f"| {path.name} | {name} | {counts['trained']} | {counts['refused']} | {why} |\n"
            )
        page += "\nRows are refused since the template itself cannot show them:\n\n"
        page += "".join(f"- {name}: {reason}\n" for name, reason in OF_ROWS.items())
        page += "".join(f"\n- {fault}" for fault in faults)
    print(page)
    if given.output:
        given.output.write_text(page, encoding="utf-8")
    wrong = any(mark.kind == "WRONG" for marks in results.values() for mark in marks.values())
    return int(wrong or bool(faults))


if __name__ == "__main__":
    sys.exit(main())
