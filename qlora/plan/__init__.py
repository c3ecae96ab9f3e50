"""What a run will need, before it starts: `plan(config)`, from config.json, without weights or GPU.

`estimate`: the plan. `step`: a counted training step. `meta`: the model without memory. `meter`:
the bytes by kind. `shrink`: small configs. `source`: what is known of a model. `optimizer`: its
state. `command`: `train.py --plan`. `fit`: what would make it fit.
"""

from qlora.plan.estimate import Plan, Planner, plan

__all__ = ["Plan", "Planner", "plan"]
