"""Records -> token ids with a loss mask -> batches; prompts -> answers. Independent of the model.

- `records`: a file, folder or hub name -> records -> chat messages
- `chat_template`: chat messages -> token ids, with loss on the answers
- `objectives`: for each task, how a record becomes a row, the loss and the scores
- `encoding`: records -> rows, cut, dropped and counted
- `rows`: `prepare_data` and `prepare_tokenizer`
- `batches`: padded batches and packs
- `inspection`: what is learned of a row, token by token
- `generation`: prompts -> answers
"""

from qlora.data.batches import collator
from qlora.data.rows import prepare_data, prepare_tokenizer

__all__ = ["collator", "prepare_data", "prepare_tokenizer"]
