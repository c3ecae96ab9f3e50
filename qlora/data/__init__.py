"""Records -> token ids with a loss mask -> batches; prompts -> answers. Independent of the model.

- `records`: a file, folder or hub name -> records
- `chats`: records -> chat messages
- `templates`: what chat templates read and how they end turns; their switches
- `chat_template`: chat messages -> token ids, with loss on the answers
- `objectives`: for each task, how a record becomes a row, the loss and the scores
- `rows`: `prepare_data` and `prepare_tokenizer`; padded batches and packs
- `generation`: prompts -> answers
"""

from qlora.data.rows import collator, prepare_data, prepare_tokenizer

__all__ = ["collator", "prepare_data", "prepare_tokenizer"]
