"""A training run: `train(config)`; or `prepare_for_training(model)` for a loop of your own."""

from qlora.training.optimizers import keep_updates as keep_updates
from qlora.training.run import prepare_for_training as prepare_for_training
from qlora.training.run import train as train
