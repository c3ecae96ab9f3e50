"""What a step computes and moves, by the operators that run on meta tensors.

`work_of` is the work of an operator of torch: the FLOPs of a product or of an attention, and for
all others the bytes read and written. `kernels_counted` adds the kernels that are no operators.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._pytree import tree_leaves

from qlora.ops import gated, nf4, rotary
from qlora.plan import meta

FLOPS_A_BYTE = 100  # a product with fewer waits for the memory, and counts as bytes
PRODUCTS, ATTENTION, TRAFFIC = "FLOPs of products", "FLOPs of attention", "bytes"
DECODED, LOOKED_UP, LAUNCHES = "bytes of decoding", "bytes of embeddings", "launches"
Work = Counter[str]
FIRST = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
"""the first factor among a product's arguments"""
FREE = ("empty", "new_empty", "_unsafe_view", "detach")  # names of operators that launch nothing


def work_of(func: Any, args: Any, made: Any) -> Work:
    """What an operator of torch computes and moves."""
    name = func._schema.name.partition("::")[2]
    if func.is_view or name.startswith(FREE):
        return Work()
    tensors = [t for t in tree_leaves((args, made)) if isinstance(t, Tensor)]
    moved = sum(t.nbytes for t in tensors)
    if name in FIRST:
        flops = 2 * made.numel() * args[FIRST[name]].shape[-1]
        kind, size = (PRODUCTS, flops) if flops > FLOPS_A_BYTE * moved else (TRAFFIC, moved)
    elif "attention" in name or "attn" in name:
        kind, size = ATTENTION, _attention(name, tensors, args)
    elif name == "embedding":
        kind, size = LOOKED_UP, made.nbytes
    else:
        kind, size = TRAFFIC, moved
    return Work({kind: size, LAUNCHES: 1})


def _attention(name: str, tensors: list[Tensor], args: Any) -> int:
    """FLOPs of the scores below the diagonal and of their sums over values."""
    numbers = [n for n in args if type(n) is int and n > 1]  # of flat rows: their longest
    is_backward = "backward" in name
    q = tensors[1 if is_backward else 0]
    keys = numbers[0] if q.ndim == 3 and numbers else q.shape[-2]
    return (5 if is_backward else 2) * q.numel() * keys


@contextmanager
def kernels_counted(add: Callable[[Work], None]) -> Iterator[None]:
    """Within the block, `add` is called for what runs on a GPU as one kernel that torch's operators
    do not show: decoding, gated MLPs, rotary embeddings and norms."""

    def seen(function: Any, kind: str = TRAFFIC) -> Any:
        def run(*args: Any, **settings: Any) -> Any:
            made = function(*args, **settings)
            add(Work({kind: _moved((*args, made)), LAUNCHES: 1}))
            return made

        return run

    pairs = (seen(gated._without_values),) * 2
    rotation = seen(rotary._without_values)
    with ExitStack() as stack:
        for owner, name, made in (
            (nf4, "_without_values", seen(nf4._without_values, DECODED)),
            (gated, "implementation", lambda *_: pairs),
            (rotary, "implementation", lambda *_: rotation),
            (meta.Norm, "forward", staticmethod(seen(meta.Norm.forward))),
            (meta.Norm, "backward", staticmethod(seen(meta.Norm.backward))),
        ):
            stack.enter_context(patch.object(owner, name, made))
        yield


def _moved(values: Iterable[Any]) -> int:
    return sum(t.nbytes for t in tree_leaves(tuple(values)) if isinstance(t, Tensor))
