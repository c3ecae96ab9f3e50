"""`train(config)`: a whole run. `prepare_for_training(model)`: for your own training loop.
`AdapterTrainer`: transformers' Trainer for such a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.training.optimizers import keep_updates as keep_updates
    from qlora.training.prepare import prepare_for_training as prepare_for_training
    from qlora.training.run import train as train
    from qlora.training.trainer import AdapterTrainer as AdapterTrainer

__all__ = ["AdapterTrainer", "keep_updates", "prepare_for_training", "train"]
MODULES = {
    "AdapterTrainer": "trainer", "keep_updates": "optimizers",
    "prepare_for_training": "prepare", "train": "run",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imported on first use: a plan needs neither Trainer nor the data (qlora.plan)."""
    if name not in MODULES:
        raise AttributeError(f"module 'qlora.training' has no attribute {name!r}")
    return getattr(import_module(f"qlora.training.{MODULES[name]}"), name)
