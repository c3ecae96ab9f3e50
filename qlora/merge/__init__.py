"""Fold an adapter into a checkpoint on disk: `merge(config)`. Plan, check, stream.

- `plan`: how each tensor is computed, from file headers alone
- `run`: read, fold, write
- `codes`: 4-bit codes that keep the adapter's change
- `gguf_file`: a GGUF file of the merged checkpoint; `modelfile` for Ollama
- `measure`: verification against the live adapter, and calibration
"""

from qlora.merge.run import merge

__all__ = ["merge"]
