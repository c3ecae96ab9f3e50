"""QLoRA: fine-tune large language models on one small GPU, and merge without losing it.

What is named below comes with `import qlora`; it is loaded when first used, so that
`import qlora.config` does not import torch. More is in the rooms that are meant to be called:

- `qlora.config`, `qlora.lora_config`: every setting of a run and of an adapter
- `qlora.base`: a checkpoint becomes a frozen 4-bit model
- `qlora.adapters`: put adapters on it, and choose among them
- `qlora.adapter_files`, `qlora.portable`: save and load them, here and for other programs
- `qlora.merging`, `qlora.weighted`: fold adapters in, take them off, make one of several
- `qlora.training`: train, or make a model ready for a loop of your own
- `qlora.optimizers`: so that rounding eats no update of a bf16 adapter
- `qlora.offload`, `qlora.host_embedding`: what can wait in host memory
- `qlora.loss`: cross-entropy without logits
- `qlora.data`: records become tokens
- `qlora.merge`: an adapter becomes part of a checkpoint
- `qlora.nf4`: the 4-bit codec
- `qlora.errors`: what goes wrong
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.adapter_files import load_adapter as load_adapter
    from qlora.adapter_files import save_adapter as save_adapter
    from qlora.adapter_files import swap_adapter as swap_adapter
    from qlora.adapters import apply_lora as apply_lora
    from qlora.adapters import disable_adapter as disable_adapter
    from qlora.adapters import mixed_batch as mixed_batch
    from qlora.adapters import print_trainable_parameters as print_trainable_parameters
    from qlora.adapters import set_adapter as set_adapter
    from qlora.base import load_base as load_base
    from qlora.config import DataConfig as DataConfig
    from qlora.config import LoraConfig as LoraConfig
    from qlora.config import MergeConfig as MergeConfig
    from qlora.config import QuantConfig as QuantConfig
    from qlora.config import TrainConfig as TrainConfig
    from qlora.errors import UserError as UserError
    from qlora.merging import delete_adapter as delete_adapter
    from qlora.merging import merge_adapter as merge_adapter
    from qlora.merging import merge_and_unload as merge_and_unload
    from qlora.merging import unload as unload
    from qlora.merging import unmerge_adapter as unmerge_adapter
    from qlora.weighted import add_weighted_adapter as add_weighted_adapter

_ROOMS = {
    "qlora.adapter_files": ("load_adapter", "save_adapter", "swap_adapter"),
    "qlora.adapters": (
        "apply_lora",
        "disable_adapter",
        "mixed_batch",
        "print_trainable_parameters",
        "set_adapter",
    ),
    "qlora.base": ("load_base",),
    "qlora.config": ("DataConfig", "LoraConfig", "MergeConfig", "QuantConfig", "TrainConfig"),
    "qlora.errors": ("UserError",),
    "qlora.merging": (
        "delete_adapter",
        "merge_adapter",
        "merge_and_unload",
        "unload",
        "unmerge_adapter",
    ),
    "qlora.weighted": ("add_weighted_adapter",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


# On a CPU with bf16 units bitsandbytes warns at import that an inference kernel is not there. It is
# never called here, and an error message should stand alone on standard error.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
