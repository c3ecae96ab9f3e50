"""A checkpoint on disk becomes a model with frozen `Linear4bit` layers.

- `load_base(name, quant)`: load, quantize, freeze
- `Checkpoint`, `resolve`: what a folder, hub name or .gguf file holds, read from headers
- `tasks`: the kinds of model, their Auto classes and heads
- `shards`: write safetensors files as a stream
"""

from qlora.base.checkpoint import Checkpoint as Checkpoint
from qlora.base.checkpoint import resolve as resolve
from qlora.base.load import load_base as load_base
