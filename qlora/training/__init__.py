"""`train(config)`: a whole run. `prepare_for_training(model)`: for your own training loop."""

from qlora.training.optimizers import keep_updates
from qlora.training.run import prepare_for_training, train

__all__ = ["keep_updates", "prepare_for_training", "train"]
