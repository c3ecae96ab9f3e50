"""QLoRA: fine-tune large language models on one small GPU, and merge without losing the gain.

    from qlora import LoraConfig, MergeConfig, QuantConfig
    from qlora import apply_lora, load_adapter, load_base, save_adapter
    from qlora.merge import merge
    from qlora.training import prepare_for_training

    model = load_base("path-or-hub-name", QuantConfig())      # frozen 4-bit Linear4bit layers
    apply_lora(model, LoraConfig(r=16, lora_alpha=32))        # in place; the model keeps its class
    prepare_for_training(model, gradient_checkpointing=True)  # the fast path, checkpointing

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    for batch in batches:                                     # or transformers' Trainer
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    save_adapter(model, "out")                                # PEFT's files
    load_adapter(model, "out", adapter_name="other")
    merge(MergeConfig(adapter="out", output_dir="merged"))    # a checkpoint for from_pretrained

A package imports only from the packages to its left:

    ops -> base -> adapters -> fast -> training | merge | apps -> plan

`data` imports none of these; all may import `errors`, `config`, `files`, `pictures` and `cli`. The
names below are imported on first use, so that `import qlora.config` does not import torch.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; Python imports a name from _NAMES on first use
    from qlora.adapters import *  # noqa: F403
    from qlora.base import load_base as load_base
    from qlora.config import DataConfig as DataConfig
    from qlora.config import LoraConfig as LoraConfig
    from qlora.config import MergeConfig as MergeConfig
    from qlora.config import QuantConfig as QuantConfig
    from qlora.config import TrainConfig as TrainConfig
    from qlora.errors import UserError as UserError

_NAMES = {
    "qlora.adapters": "add_weighted_adapter apply_lora delete_adapter disable_adapter load_adapter "
    "merge_adapter merge_and_unload mixed_batch print_trainable_parameters save_adapter "
    "set_adapter swap_adapter unload unmerge_adapter",
    "qlora.base": "load_base",
    "qlora.config": "DataConfig LoraConfig MergeConfig QuantConfig TrainConfig",
    "qlora.errors": "UserError",
}
_PACKAGE_OF = {name: package for package, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_PACKAGE_OF)
__version__ = "0.1.0"

# On a CPU with bf16 units, bitsandbytes warns at import about a missing inference kernel, which is
# not used here. The warning would precede the one-line errors.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(import_module(_PACKAGE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
