"""Pure tensor functions and Triton kernels: no model, no module tree.

- `nf4`: the 4-bit codec, and its decoding inside a forward pass
- `lora`: forward and backward of W x + scaling * B A x
- `gated`: the activation of a gated MLP, down(act(gate(x)) * up(x))
- `loss`: cross-entropy from hidden states, without logits
- `kernels`: the Triton kernels; imported only where one is used
"""
