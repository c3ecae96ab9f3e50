"""The same model, leaner: each part is optional and has a plain equivalent.

`layers`: LoRA layers, gated MLPs and norms by the functions of `qlora.ops`. `head`: the loss
without logits. `attention`: rows of a batch one after the other, without padding. `offload`:
activations and the embedding in host memory.
"""
