"""The same model, leaner: each part is optional and has a plain equivalent.

`layers`: LoRA layers, gated MLPs, norms. `head`: the loss without logits. `attention`: rows of a
batch without padding. `offload`: activations and the embedding in host memory.
"""
