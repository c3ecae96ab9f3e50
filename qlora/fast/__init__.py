"""Faster equivalents of parts of a model: each is optional and falls back to the model's own.

`layers`: LoRA layers, gated MLPs, norms. `head`: the loss without logits. `attention`: rows of a
batch without padding. `offload`: activations and the embedding in host memory.
"""

from qlora.fast.offload import offload_activations, offload_embedding

__all__ = ["offload_activations", "offload_embedding"]
