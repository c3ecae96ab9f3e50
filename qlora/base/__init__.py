"""Load a checkpoint from disk as a model with frozen `Linear4bit` layers.

- `load_base(name, quant)`: load, quantize, freeze
- `Checkpoint`, `resolve`: config, headers and tensors of a folder, hub name or .gguf file
- `modules`: a model's state, task, heads and vocabulary; a layer's kind, shape and dense weight
- `shards`: write safetensors files as a stream
"""

from qlora.base.checkpoint import Checkpoint, resolve
from qlora.base.load import load_base

__all__ = ["Checkpoint", "load_base", "resolve"]
