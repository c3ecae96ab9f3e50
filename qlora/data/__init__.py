"""Records -> token ids with a loss mask -> batches; prompts -> answers. Independent of the model.

- `prepare_data`: a file, folder or hub name becomes rows of ids and labels
- `prepare_tokenizer`: sets a missing pad token and chat template
- `records`: the formats that are read
- `chat_template`: which tokens of a rendered chat are learned
- `objectives`: what each task does with a record
- `rows`: rows, packs and batches
- `generation`: prompts become answers
"""

from qlora.data.rows import prepare_data, prepare_tokenizer

__all__ = ["prepare_data", "prepare_tokenizer"]
