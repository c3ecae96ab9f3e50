"""A Modelfile, with which Ollama makes a model of a GGUF file.

Ollama renders chats with a Go template of its own. Of the Jinja template in the file it knows some
by heart, and else passes the prompt as it is. `turns_of` finds the texts around the turns by
rendering a chat of marks. That holds for templates that write turns one after the other:

    start [system: before, its text, after] (user: before, text, after | answer: ...)... prompt

`Turns` is accepted only if it renders several chats as the tokenizer's template does. Left out:
tools, and templates that write a turn differently depending on others; of these no TEMPLATE is
written. Without trim marks ({{-), all that stands between actions is text as it is.

Source: https://docs.ollama.com/modelfile, and template/template.go of Ollama, which hands over the
messages, and the texts of all system messages as .System.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.base.load import load_tokenizer
from qlora.data.generation import taught_stop_ids
from qlora.data.templates import REJECTIONS, fallback_template, rendered
from qlora.errors import UserError
from qlora.files import MODELFILE, ids_in

SYSTEM, *MARKS = (f"QloraTurn{i}x7f3a" for i in range(5))  # no white space for templates to trim
USER, ANSWER = "user", "assistant"
Message = dict[str, str]


@dataclass(frozen=True)
class Turns:
    """The texts that a chat template writes before and after those of messages."""

    start: str  # of a chat without a system message
    system: tuple[str, str] | None  # of one with it; None: it takes none
    is_within: bool  # the system message is in the user's first turn, after what begins that
    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str  # where the answer is to come

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a chat, with the prompt."""
        given = [m["content"] for m in messages if m["role"] == "system"]
        system = given[0].join(self.system) if given and self.system else ""
        is_first, text = True, self.start
        if system and not self.is_within:
            text, system = system, ""
        for message in messages:
            if message["role"] == USER:
                text += self.user[0] + system * is_first + message["content"] + self.user[1]
                is_first = False
            elif message["role"] == ANSWER:
                text += message["content"].join(self.answer)
        return text + self.prompt

    def go(self, bos: str = "") -> str:
        """The same as a template of Go, without the `bos` that begins it, which Ollama adds. An
        answer at the end of a chat is to be continued."""
        begins = _literal(self.start.removeprefix(bos))
        before, after = map(_literal, self.user)
        variables, within = "{{ $system := .System }}" if self.system else "", ""
        if self.system:
            first, last = self.system
            first = first if self.is_within else first.removeprefix(bos)
            system = f"{_literal(first)}{{{{ $system }}}}{_literal(last)}"
            if self.is_within:
                once = '{{ $system = "" }}'
                within = f"{{{{ if $system }}}}{system}{once}{{{{ end }}}}"
            else:
                begins = f"{{{{ if $system }}}}{system}{{{{ else }}}}{begins}{{{{ end }}}}"
        if bos and not self.start and self.user[0].startswith(bos):  # Llama 2 begins each turn so
            variables += "{{ $again := false }}"
            rest = _literal(self.user[0].removeprefix(bos))
            before = f"{{{{ if $again }}}}{_literal(bos)}{{{{ end }}}}{{{{ $again = true }}}}{rest}"
        opens, closes = map(_literal, self.answer)
        return (
            f"{variables}{begins}{{{{ range $i, $_ := .Messages }}}}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "user" }}}}{before}{within}{{{{ .Content }}}}{after}'
            f"{{{{ if $last }}}}{_literal(self.prompt)}{{{{ end }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{opens}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{closes}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        )


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def turns_of(tokenizer: Tokenizer) -> Turns | None:
    """The turns of the tokenizer's chat template, or of the one for tokenizers without; None if it
    is no such concatenation."""
    template = fallback_template(tokenizer)

    def render(messages: Sequence[Message], prompt: bool = True) -> str:
        return rendered(tokenizer, template, list(messages), None, prompt)

    try:
        turns = _probe(render)
        same = turns and all(turns.render(chat) == render(chat) for chat in _chats(turns))
    except REJECTIONS:
        return None
    return turns if same else None


def added_bos(tokenizer: Tokenizer) -> str:
    """The text of BOS if the tokenizer adds it; then Ollama adds it too."""
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if adds else ""


def _probe(render: Any) -> Turns | None:
    roles = (USER, ANSWER, USER, ANSWER)
    chat = [{"role": r, "content": mark} for r, mark in zip(roles, MARKS, strict=True)]
    one, two, three = (_around(render(chat[:n], False), MARKS[:n]) for n in (1, 2, 3))
    if not (one and two and three):
        return None
    after_user, prompt = one[-1], render(chat[:1]).partition(MARKS[0])[2].removeprefix(one[-1])
    after_answer = two[-1]
    before_user = three[2].removeprefix(after_answer)
    before_answer = three[1].removeprefix(after_user)
    start = three[0].removesuffix(before_user)
    turns = Turns(
        start, None, False, (before_user, after_user), (before_answer, after_answer), prompt
    )
    try:
        text = render([{"role": "system", "content": SYSTEM}, *chat[:1]], False)
    except REJECTIONS:
        return turns
    found = _around(text, [SYSTEM, MARKS[0]])
    if not found:
        return turns
    before, between, _ = found
    if between.endswith(before_user):
        return replace(turns, system=(before, between.removesuffix(before_user)))
    system = before.removeprefix(start + before_user), between
    return replace(turns, system=system, is_within=True)


def _around(text: str, marks: Sequence[str]) -> list[str] | None:
    """What stands before, between and after the marks; None unless each is there once."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        parts.append(before)
    return [*parts, text]


def _chats(turns: Turns) -> Iterator[list[Message]]:
    """Chats of one to three questions, with and without a system message."""
    words = [f"{mark} of\nlines" for mark in MARKS]
    talk = [{"role": (USER, ANSWER)[i % 2], "content": words[i % 4]} for i in range(5)]
    for count in (1, 3, 5):
        yield talk[:count]
        if turns.system:
            yield [{"role": "system", "content": "Be\nbrief."}, *talk[:count]]


# ---- the files ----


def complete(folder: Path, base: Path, trust_remote_code: bool = False) -> None:
    """Add to a merged checkpoint what llama.cpp's converter reads and transformers does not write:
    the base's tokenizer.model, if training added no token, and the fallback chat template."""

    def load(place: Path) -> Any:
        return load_tokenizer(place, trust_remote_code=trust_remote_code)

    with suppress(UserError):  # the converter reads some that transformers does not
        tokenizer, pieces = load(folder), base / "tokenizer.model"
        is_lost = pieces.is_file() and not (folder / pieces.name).exists()
        if is_lost and len(load(base)) == len(tokenizer):
            shutil.copyfile(pieces, folder / pieces.name)
        if template := fallback_template(tokenizer):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def file_name(folder: str, form: str) -> str:
    """The name of a GGUF file in a folder, with its format's as llama.cpp writes it."""
    mix = form.removeprefix("gguf-").upper()
    stem = folder[: -len(mix)].rstrip("-_.") if folder.upper().endswith(mix) else folder
    return f"{stem}-{mix}.gguf" if stem else f"{mix}.gguf"


def stop_texts(
    tokenizer: Tokenizer, generation: dict[str, Any], taught: frozenset[int]
) -> list[str]:
    """The tokens that end an answer, as text."""
    ids = ids_in(generation.get("eos_token_id")) | taught | taught_stop_ids(tokenizer)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids)) if token]


def write(
    folder: Path,
    file: Path,
    tokenizer_folder: Path,
    generation: dict[str, Any],
    taught: frozenset[int],
    trust_remote_code: bool = False,
) -> None:
    """Write the Modelfile of the GGUF `file` beside it; prints what it lacks.

    Args:
        generation: generation_config.json, perhaps empty.
        taught: ids of the tokens with which training ended answers.
    """
    lines = [f"FROM ./{file.name}"]
    try:
        tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code)
    except UserError:  # a base may have none that transformers reads
        tokenizer = None
    turns = turns_of(tokenizer) if tokenizer else None
    template = turns.go(added_bos(tokenizer)) if tokenizer and turns else ""
    # the parser ends the text at three quotes, and drops what is not printable
    is_plain = '"""' not in template and template.replace("\n", "").isprintable()
    if template and is_plain:
        lines.append(f'TEMPLATE """{template}"""')
        if turns and not turns.system:
            lines.append("# The chat template takes no system message.")
    else:
        note = "the chat template is not one turn after the other, so TEMPLATE is left out"
        lines.append(f"# {note[0].upper()}{note[1:]}:")
        lines.append("# Ollama uses one of its own if it knows the one in the file.")
        print(f"{MODELFILE}: {note}; give Ollama one, or run the file in llama.cpp")
    stops = stop_texts(tokenizer, generation, taught) if tokenizer else []
    lines += [f"PARAMETER stop {json.dumps(s, ensure_ascii=False)}" for s in stops if '"' not in s]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
