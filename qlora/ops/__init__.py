"""Pure tensor functions and Triton kernels: no model, no module tree.

- `nf4`: the 4-bit codec, and its decoding inside a forward pass
- `lora`: forward and backward of W x + scaling * B A x, and of a gated MLP of such layers
- `gated`: the elementwise part of a gated MLP, act(gate) * up
- `loss`: cross-entropy from hidden states, without logits
- `kernels`: the Triton kernels; imported only where one is used
- `agree`: the check that a fast version computes what the plain one does
"""
