"""The tokens that end an answer, in the settings of a merged checkpoint."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from qlora.adapters.format import AdapterFile
from qlora.base.checkpoint import Checkpoint, model_config
from qlora.base.load import load_tokenizer
from qlora.config.tasks import task_named
from qlora.errors import UserError
from qlora.files import GENERATION, ids_in, read_json


def generation_settings(
    adapter: AdapterFile, checkpoint: Checkpoint, tokenizer_folder: Path, trusted: bool
) -> dict[str, Any]:
    """The base's generation settings with the tokens that training taught to end an answer with;
    empty if the base knows these. Adapters without a record were taught those of the tokenizer."""
    from qlora.data.generation import describe_stops, taught_stop_ids

    task = task_named(adapter.task)
    if task.trains_head:
        return {}
    if (checkpoint.folder / GENERATION).is_file():
        values = read_json(checkpoint.folder / GENERATION)
    else:  # as transformers derives them
        from transformers import GenerationConfig

        config = model_config(checkpoint.folder, trust_remote_code=trusted)
        values = json.loads(GenerationConfig.from_model_config(config).to_json_string())
        values.pop("_from_model_config", None)
    known, tokenizer = ids_in(values.get("eos_token_id")), None
    with suppress(UserError):  # a base may have no tokenizer
        tokenizer = load_tokenizer(tokenizer_folder, task=task.name, trust_remote_code=trusted)
    taught = adapter.stop_ids or (taught_stop_ids(tokenizer) if tokenizer else frozenset())
    if taught <= known:
        return {}
    print(describe_stops(tokenizer, known, taught))
    return {**values, "eos_token_id": sorted(known | taught)}


def allows_stops(checkpoint: Checkpoint, stops: Any, trust_remote_code: bool = False) -> bool:
    """Whether config.json may have this eos_token_id; some model types allow one int only."""
    config = model_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    try:
        config.get_text_config().eos_token_id = stops
    except StrictDataclassError:
        return False
    return True
