"""What a run will need, before it starts: `plan(config)`, from config.json, without weights or GPU.

`estimate`: the plan. `step`: a counted training step. `meta`: the model without memory. `meter`:
the bytes by kind. `shrink`: small configs. `source`: what is known of a model. `optimizer`: its
state. `shards`: of a sharded base. `fit`: what would make it fit; `time`: of a step; `work`: what
it computes. `command`: `train.py --plan`; `start`: its imports. `run`: a run with its plan.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.plan.estimate import Plan as Plan
    from qlora.plan.estimate import Planner as Planner
    from qlora.plan.estimate import plan as plan

__all__ = ["Plan", "Planner", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qlora.plan' has no attribute {name!r}")
    from qlora.plan import estimate

    return getattr(estimate, name)
