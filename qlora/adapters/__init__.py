"""What is added to the base: LoRA layers, where they go, their initial values, and their files.

- `apply_lora`, `set_adapter`, `disable_adapter`, `mixed_batch`: add adapters and choose among them
- `save_adapter`, `load_adapter`, `swap_adapter`: PEFT's files
- `merge_adapter`, `unmerge_adapter`, `merge_and_unload`, `unload`, `delete_adapter`: in memory
- `add_weighted_adapter`: one adapter made of several
"""

from qlora.adapters.apply import (
    apply_lora,
    disable_adapter,
    mixed_batch,
    print_trainable_parameters,
    set_adapter,
)
from qlora.adapters.files import load_adapter, save_adapter, swap_adapter
from qlora.adapters.fuse import (
    add_weighted_adapter,
    delete_adapter,
    merge_adapter,
    merge_and_unload,
    unload,
    unmerge_adapter,
)

__all__ = [
    "add_weighted_adapter",
    "apply_lora",
    "delete_adapter",
    "disable_adapter",
    "load_adapter",
    "merge_adapter",
    "merge_and_unload",
    "mixed_batch",
    "print_trainable_parameters",
    "save_adapter",
    "set_adapter",
    "swap_adapter",
    "unload",
    "unmerge_adapter",
]
