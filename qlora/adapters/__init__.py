"""What is added to the base: LoRA layers, where they go, their initial values, and their files.

- `apply_lora`, `set_adapter`, `disable_adapter`, `mixed_batch`: add adapters and choose among them
- `save_adapter`, `load_adapter`, `swap_adapter`: PEFT's files
- `merge_adapter`, `unmerge_adapter`, `merge_and_unload`, `unload`, `delete_adapter`: in memory
- `add_weighted_adapter`: one adapter made of several
"""

from qlora.adapters.apply import apply_lora as apply_lora
from qlora.adapters.apply import disable_adapter as disable_adapter
from qlora.adapters.apply import mixed_batch as mixed_batch
from qlora.adapters.apply import print_trainable_parameters as print_trainable_parameters
from qlora.adapters.apply import set_adapter as set_adapter
from qlora.adapters.files import load_adapter as load_adapter
from qlora.adapters.files import save_adapter as save_adapter
from qlora.adapters.files import swap_adapter as swap_adapter
from qlora.adapters.fuse import add_weighted_adapter as add_weighted_adapter
from qlora.adapters.fuse import delete_adapter as delete_adapter
from qlora.adapters.fuse import merge_adapter as merge_adapter
from qlora.adapters.fuse import merge_and_unload as merge_and_unload
from qlora.adapters.fuse import unload as unload
from qlora.adapters.fuse import unmerge_adapter as unmerge_adapter
