"""`train(config)`: a whole run. `prepare_for_training(model)`: for your own training loop.
`AdapterTrainer`: transformers' Trainer for such a model."""

from qlora.training.optimizers import keep_updates
from qlora.training.run import prepare_for_training, train
from qlora.training.trainer import AdapterTrainer

__all__ = ["AdapterTrainer", "keep_updates", "prepare_for_training", "train"]
