"""Fold an adapter into a checkpoint on disk: `merge(config)`. Plan, check, stream.

- `plan`: what happens to each tensor, from file headers alone
- `run`: read, fold, write
- `codes`: 4-bit codes that keep what was trained
- `measure`: how much of it the merged model kept
"""

from qlora.merge.run import merge

__all__ = ["merge"]
