"""A training run: `train(config)`; or `prepare_for_training(model)` for a loop of your own."""

from qlora.training.optimizers import keep_updates
from qlora.training.run import prepare_for_training, train

__all__ = ["keep_updates", "prepare_for_training", "train"]
