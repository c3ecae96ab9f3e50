"""Encoded rows on disk, memory-mapped, and found again by the contents of what they were made of.

A data set of MIN_BYTES or more is encoded into `rows/KEY` in the cache folder ($QLORA_CACHE,
~/.cache/qlora): rows.arrow, an Arrow stream, and facts.json, their counts and fingerprint. KEY
hashes the bytes of the files (of a hub data set, its fingerprint), the tokenizer with its template,
all settings that shape a row, and the code of this package. Entries unused for MAX_DAYS days are
removed.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.errors import UserError
from qlora.files import end_hashing, files_in, hash_of, publishing

MIN_BYTES = 1 << 20  # smaller data are encoded in seconds, and stay in memory
MAX_DAYS = 30
ROWS, FACTS = "rows.arrow", "facts.json"


def cache_folder() -> Path:
    """The folder of all entries."""
    return Path(os.environ.get("QLORA_CACHE", "~/.cache/qlora")).expanduser() / "rows"


def contents_of(source: str) -> str | None:
    """A hash of the bytes of a local file or folder; None for a small one, or one that is none."""
    end_hashing()
    path, files = Path(source).expanduser(), files_in(source)
    if not path.exists() or sum(file.stat().st_size for file in files) < MIN_BYTES:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path.parent)} {hash_of(file)}\n".encode())
    return digest.hexdigest()


def key_of(contents: str, tokenizer: Tokenizer, settings: Any) -> str:
    """The name of the entry for rows of these contents."""
    digest = hashlib.sha256()
    code = sorted(Path(__file__).parent.glob("*.py"))
    for part in (contents, repr(settings), transformers.__version__, tokenizers.__version__):
        digest.update(part.encode() + b"\0")
    for file in (*code, Path(__file__).parents[1] / "files.py"):
        digest.update(file.read_bytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    template = json.dumps(tokenizer.chat_template, default=str)
    named = repr((type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.init_kwargs))
    for part in (vocabulary, template, named):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def cached(key: str) -> tuple[Dataset, dict[str, Any]] | None:
    """The rows of an entry, memory-mapped, and its facts; None if there is none that is whole."""
    folder = cache_folder() / key
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        os.utime(folder / FACTS)
        rows = Dataset.from_file(str(folder / ROWS))
        return (rows, facts) if len(rows) == facts["tally"]["rows"] else None
    except (OSError, ValueError, KeyError):  # Arrow's errors are these
        return None


def store(
    key: str,
    features: Features,
    tables: Iterable[pa.Table],
    facts: Callable[[Dataset], dict[str, Any]],
) -> tuple[Dataset, dict[str, Any]]:
    """Write the tables as they come, and then the facts of all rows; returns what `cached` does."""
    folder = cache_folder() / key
    with _disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(folder.parent)
        with publishing(folder, shared=True) as partial:
            with (
                pa.OSFile(str(partial / ROWS), "wb") as file,
                pa.ipc.new_stream(file, features.arrow_schema) as stream,
            ):
                for table in tables:
                    stream.write_table(table)
            made = facts(Dataset.from_file(str(partial / ROWS)))
            (partial / FACTS).write_text(json.dumps(made), encoding="utf-8")
    return Dataset.from_file(str(folder / ROWS)), made


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fault = f"{folder} cannot be written: {error.strerror or error}"
        raise UserError(f"{fault}. Set QLORA_CACHE to a folder with space") from error


def _remove_old(root: Path) -> None:
    for facts in root.glob(f"*/{FACTS}"):
        if time.time() - facts.stat().st_mtime > MAX_DAYS * 86400:
            shutil.rmtree(facts.parent, ignore_errors=True)
