"""Load a checkpoint from disk as a model with frozen `Linear4bit` layers.

- `load_base(name, quant)`: load, quantize, freeze
- `Checkpoint`, `resolve`: what a folder, hub name or .gguf file holds, read from headers
- `modules`: what qlora knows of a model and its modules: state, task, heads, dense weights
- `shards`: write safetensors files as a stream
"""

from qlora.base.checkpoint import Checkpoint, resolve
from qlora.base.load import load_base

__all__ = ["Checkpoint", "load_base", "resolve"]
