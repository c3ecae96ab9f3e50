"""The dense weight of a frozen layer, for the length of one matrix product.

A product of thousands of tokens takes ten times as long as decoding its 4-bit weight, so the weight
is decoded whole, in the dtype of the product.
"""

from typing import Any

import torch
from torch import Tensor

from qlora.nf4 import Quantized, dequantize_to


def decoded(layer: Any, dtype: torch.dtype, slot: int = 0) -> Tensor:
    """The weight (out, in) of a Linear4bit or an nn.Linear in `dtype`, not to be written to.

    It may lie in memory that the next call with the same slot, on the same thread, uses again.
    """
    weight: Tensor = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().to(dtype)
    return dequantize_to(Quantized(weight.detach(), state), dtype)
