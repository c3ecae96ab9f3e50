"""The 4-bit formats of a merged checkpoint: NF4 of bitsandbytes and int4 of compressed-tensors.

A codec tells which tensors a weight is written as, chooses their values, and describes itself in
config.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qlora.config import QuantConfig
from qlora.merge import int4
from qlora.merge.codes import AdaptedWeight, Facts, fold_to_codes, fold_to_grid
from qlora.merge.grids import Int4
from qlora.merge.moments import Moments
from qlora.ops import nf4
from qlora.ops.nf4 import Layout


class Encoded(NamedTuple):
    """A weight in the format."""

    record: dict[str, Tensor]  # its tensors, by what follows its name
    facts: Facts  # for the report
    chosen: Tensor | None = None  # its values (out, in), where calibration asks for them


class Codec(Protocol):
    """A 4-bit format."""

    @property
    def dtype(self) -> torch.dtype:
        """Of all that is not written as codes."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """dtype and shape of each tensor of a weight (out, in), by what follows its name."""

    def encode(self, adapted: AdaptedWeight, moments: Moments | None) -> Encoded:
        """For base + adapter; `moments` as for `fold_to_codes`."""

    def settings(self, dense: Sequence[str], on_disk: Sequence[str]) -> dict[str, Any]:
        """quantization_config; `dense`: the linear layers without codes, by their names in the
        model, `on_disk`: all such matrices, by their names on disk."""


@dataclass(frozen=True)
class NF4Codec:
    """Records of bitsandbytes."""

    quant: QuantConfig
    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> Layout:
        record = nf4.record_layout(shape, self.quant)
        return {f".{suffix}" if suffix else "": entry for suffix, entry in record.items()}

    def encode(self, adapted: AdaptedWeight, moments: Moments | None) -> Encoded:
        wanted = self.quant.quant_type, self.quant.blocksize, self.quant.double_quant
        if adapted.codes:
            state = adapted.codes.state
            if (state.quant_type, state.blocksize, state.nested) != wanted:
                dense = nf4.dequantize(adapted.codes)
                adapted = replace(adapted, weight=dense, codes=None)
        chosen, facts = fold_to_codes(adapted, self.quant, moments)
        chosen.state.dtype = self.dtype
        record = nf4.to_record(chosen)
        named = {f".{suffix}" if suffix else "": tensor for suffix, tensor in record.items()}
        return Encoded(named, facts)

    def settings(self, dense: Sequence[str], on_disk: Sequence[str]) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        from qlora.base.load import bnb_settings

        config = BitsAndBytesConfig(**bnb_settings(self.quant, self.dtype, dense))
        return dict(config.to_dict())


@dataclass(frozen=True)
class Int4Codec:
    """Tensors of compressed-tensors (qlora.merge.int4)."""

    grid: type[Int4]
    dtype: torch.dtype = torch.bfloat16  # that of the grid's scales

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return int4.layout(shape, self.grid, self.dtype)

    def encode(self, adapted: AdaptedWeight, moments: Moments | None) -> Encoded:
        grid, facts = fold_to_grid(adapted, self.grid, moments)
        assert isinstance(grid, Int4)
        return Encoded(int4.to_record(grid, self.dtype), facts, grid.weight.T)

    def settings(self, dense: Sequence[str], on_disk: Sequence[str]) -> dict[str, Any]:
        return int4.settings(self.grid, dict.fromkeys([*dense, *on_disk]))
