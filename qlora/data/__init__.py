"""Records -> token ids with a loss mask -> batches; prompts -> answers. Independent of the model.

- `readers`: files -> rows as they are written
- `records`: a file, folder or hub name -> records
- `chats`: records -> chat messages
- `templates`: what chat templates read and how they end turns; their switches
- `chat_template`: chat messages -> token ids, with loss on the answers
- `objectives`: for each task, how a record becomes a row, the loss and the scores
- `encoding`: records -> rows, cut, dropped and counted
- `rows`: `prepare_data` and `prepare_tokenizer`
- `batches`: padded batches and packs
- `inspection`: what is learned of a row, token by token
- `generation`: prompts -> answers
"""

from typing import TYPE_CHECKING, Any

from qlora.data.batches import collator

if TYPE_CHECKING:
    from qlora.data.rows import prepare_data as prepare_data
    from qlora.data.rows import prepare_tokenizer as prepare_tokenizer

__all__ = ["collator", "prepare_data", "prepare_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qlora.data' has no attribute {name!r}")
    from qlora.data import rows  # which imports `datasets`: half a second that a plan does without

    return getattr(rows, name)
