"""First values of A and B that are made of a layer's weight, as functions on tensors.

    pissa  scaling B A = the best rank r of W                        arXiv:2404.02948
    olora  B A = the first r of Q and R, W = Q R                     arXiv:2406.01775
    loftq  scaling B A = the best rank r of W - Q, Q the 4-bit base  arXiv:2310.08659

PiSSA and OLoRA take scaling B A out of the weight, and what is quantized is the rest,
W - scaling B A. LoftQ alternates: Q_t = q(W - scaling B_t-1 A_t-1), then B_t, A_t from W - Q_t. Its
first Q is the plain one, so one iteration leaves the base as it is. What it makes up for is the
error of that base: over the weights from before quantization its B A would be one error more.

A matrix of 7B models is 4096 x 11008, and a full SVD of one takes seconds on a GPU. The best rank r
needs none: the eigenvectors of the smaller of W W' and W' W, 4096 x 4096, are the singular vectors
of one side, and the other side is their product with W. Squaring costs digits of the small singular
values alone, and an error in a direction moves that of the approximation by its square: measured on
SmolLM2's matrices the approximation is the full SVD's to 1e-12. `niter` iterates from a random
subspace instead (arXiv:0909.4061), in a fiftieth of the time: of what the best rank 16 takes off
the error, 4 iterations lose up to 5 %, 8 under 1 % and 16 under 0.1 % there.

Left out: CorDA and LoRA-GA, which want the weights' gradients or inputs in fp32 before they are
quantized; PiSSA's own loop over quantizations, which is LoftQ with another start.

Second moments of layers' inputs, from a run of the model over data.

For each layer the sum of x x' over its input tokens, (in, in), and what centres it. For all layers
of a 7B model together these are 22 GB, so they are gathered for a group of layers at a time, as
many as `room` has space for, with one run for each group. Layers that read one input share them.

EVA: A is the main directions of a layer's inputs on the training data (arXiv:2410.07170).

    A = the first r eigenvectors of the covariance of x, B = 0

so that the model begins as its base, and the first steps of B see as much of the inputs as any A of
that rank lets through. Directions are chosen for all layers together: of as many as r gives them in
sum, the ones that explain the largest shares of their layer's variance. A layer gets up to rho * r,
or none, and then no adapter; its scaling stays.

The covariance is gathered whole (qlora.adapters.starts), where PEFT updates a truncated SVD batch
by batch: (in, in) a layer in place of (r, in), and exact whatever the order of the data. All
tokens count, prompt and answer (PEFT's use_label_mask=False). A few iterations from a random
subspace find the directions, as the values fall fast.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qlora.adapters.lora import delta_weight
from qlora.adapters.wrappers import plain
from qlora.base.modules import matrix_shape
from qlora.config import LoraConfig
from qlora.errors import UserError

OVERSAMPLING = 16  # directions beside the wanted ones, which iterate to get those right
Pair = tuple[Tensor, Tensor]


def pissa(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> Pair:
    """A (r, in) and B (out, r) whose scaling B A is the best rank r of `weight` (out, in).

    With W = U S V' these are A = sqrt(S_r / scaling) V_r' and B = U_r sqrt(S_r / scaling).

    Args:
        niter: iterations of a random subspace in place of the exact one.
    """
    left, right = best_rank(weight.float(), r, niter=niter, generator=generator)
    return _share(left, right, scaling)


def olora(weight: Tensor, r: int) -> Pair:
    """A = R_r (r, in) and B = Q_r (out, r) of `weight` = Q R (out, in); any scaling goes with them.

    The first columns of Q are those of the weight's first columns: nothing else is decomposed.
    Q_r R_r is W on r directions, so the rest, W - scaling Q_r R_r, is smallest for a scaling of 1;
    with 2 it is W mirrored, and 4 bits lose no less of it. Paper and PEFT leave that as it is.
    """
    weight = weight.float()
    basis = torch.linalg.qr(weight[:, :r])[0]
    return basis.T @ weight, basis


def loftq(
    weight: Tensor,
    r: int,
    scaling: float,
    quantize: Callable[[Tensor], Tensor],
    *,
    iterations: int = 1,
) -> tuple[Pair, Pair | None]:
    """A and B that make up for the 4-bit base's error, and the A and B taken out of that base.

    PEFT leaves `scaling` out, and so is right only where it is 1.

    Args:
        quantize: what is left of a weight after 4 bits, (out, in) -> (out, in).
        iterations: with 1 nothing is taken out of the base, and the second pair is None.
    """
    weight = weight.float()
    taken, rest = None, weight
    for i in range(iterations):
        left, right = best_rank(weight - quantize(rest), r)
        pair = _share(left, right, scaling)
        if i + 1 < iterations:
            taken, rest = pair, weight - delta_weight(*pair, scaling)
    return pair, taken


def best_rank(
    weight: Tensor, r: int, *, niter: int | None = None, generator: torch.Generator | None = None
) -> Pair:
    """(out, r) and (r, in) whose product is the best approximation of `weight` (out, in), fp32.

    The columns of the first and the rows of the second are orthogonal and of the same length each,
    the square root of a singular value, largest first.
    """
    if weight.shape[0] > weight.shape[1]:
        left, right = best_rank(weight.T, r, niter=niter, generator=generator)
        return right.T, left.T
    if niter is None:
        gram = weight @ weight.T  # (out, out)
        basis = torch.linalg.eigh(gram)[1].flip(1)[:, :r]
    else:
        basis = _subspace(weight, r, niter, generator)
    found = basis.T @ weight  # (r, in)
    root = found.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return basis * root, found / root[:, None]


def _subspace(weight: Tensor, r: int, niter: int, generator: torch.Generator | None) -> Tensor:
    """The first r left singular vectors (out, r) of `weight`, about."""
    draws = min(r + OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], draws, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ start)[0]
    for _ in range(niter):
        basis = torch.linalg.qr(weight @ (weight.T @ basis))[0]
    found = basis.T @ weight  # (draws, in)
    return torch.mm(basis, torch.linalg.eigh(found @ found.T)[1].flip(1)[:, :r])


def _share(left: Tensor, right: Tensor, scaling: float) -> Pair:
    """A and B with scaling B A = left right."""
    return right / scaling**0.5, left / scaling**0.5


MAX_BYTES = 4 << 30


class Moments(NamedTuple):
    """Of one layer's inputs, on the model's device, fp32."""

    second: Tensor
    """the sum of x x' (in, in)"""
    first: Tensor
    """the sum of x (in,)"""
    tokens: Tensor
    """how many there were ()"""

    def covariance(self) -> Tensor:
        """The sum of (x - mean) (x - mean)', (in, in)."""
        return torch.addr(self.second, self.first, self.first / self.tokens.clamp_min(1), alpha=-1)


class SecondMoments:
    """The moments of the inputs of some layers. Ask in the model's order: it is cheap."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Any],
        layers: Mapping[str, nn.Module],
        *,
        max_bytes: int | None = None,
    ):
        self.model = model.eval()
        self.batches, self.layers = batches, layers
        self.groups = _groups(model, batches[0], layers, max_bytes or room(model.device))
        self._gathered: dict[str, Moments] = {}

    def of(self, layer: str) -> Tensor:
        """The sum of x x' over the inputs of `layer`, fp32 (in, in), on the model's device."""
        return self.all_of(layer).second

    def all_of(self, layer: str) -> Moments:
        """The same with what centres it."""
        if layer not in self._gathered:
            group = next(group for group in self.groups if layer in group)
            self._gathered = {}  # the last group's memory goes before the next is taken
            self._gathered = _gather(self.model, self.batches, self.layers, group)
        return self._gathered[layer]


def room(device: torch.device) -> int:
    """Bytes for moments: MAX_BYTES, and on a small GPU half of what the model leaves free."""
    if device.type != "cuda":
        return MAX_BYTES
    return min(MAX_BYTES, torch.cuda.mem_get_info(device)[0] // 2)


def _groups(
    model: PreTrainedModel, batch: Any, layers: Mapping[str, Any], max_bytes: int
) -> list[dict[str, str]]:
    """Layers in the model's order, in groups whose moments fit; each with the first layer that
    reads the same input, which stands for it (q, k and v read one input, gate and up another).
    """
    leaders: dict[str, str] = {}
    last: list[tuple[Any, str]] = []

    def note(name: str, x: Tensor) -> None:
        leaders[name] = last[0][1] if last and last[0][0] is x else name
        last[:] = [(x, leaders[name])]

    with _watching(layers, note):
        _run(model, batch)
    groups: list[dict[str, str]] = [{}]
    used = 0
    for name, layer in layers.items():
        leader = leaders.get(name, name)
        size = 4 * _inputs(layer) ** 2 if leader not in groups[-1].values() else 0
        if groups[-1] and used + size > max_bytes:
            groups.append({})
            leader, used, size = name, 0, 4 * _inputs(layer) ** 2
        groups[-1][name] = leader
        used += size
    return groups


def _gather(
    model: PreTrainedModel,
    batches: Sequence[Any],
    layers: Mapping[str, Any],
    group: Mapping[str, str],
) -> dict[str, Moments]:
    leaders = {name: layers[name] for name in dict.fromkeys(group.values())}
    made = {name: _no_moments(_inputs(layer), model.device) for name, layer in leaders.items()}
    real = torch.empty(0)

    def add(name: str, x: Tensor) -> None:
        tokens = x[real] if x.shape[:-1] == real.shape else x.flatten(0, -2)
        tokens = tokens.float()
        second, first, count = made[name]
        second.addmm_(tokens.T, tokens)
        first.add_(tokens.sum(0))
        count.add_(len(tokens))

    with _watching(leaders, add):
        for batch in tqdm(batches, desc="Calibrating", leave=False):
            real = batch["attention_mask"].bool().to(model.device)
            _run(model, batch)
    return {name: made[leader] for name, leader in group.items()}


def _inputs(layer: nn.Module) -> int:
    return matrix_shape(plain(layer))[1]


def _no_moments(in_features: int, device: torch.device) -> Moments:
    shapes: tuple[tuple[int, ...], ...] = ((in_features, in_features), (in_features,), ())
    return Moments(*(torch.zeros(shape, device=device) for shape in shapes))


@contextmanager
def _watching(layers: Mapping[str, Any], see: Any) -> Iterator[None]:
    """Inside the block, `see(name, x)` is called with each input of `layers`."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def _run(model: PreTrainedModel, batch: Any) -> None:
    """The model without its output head: nobody needs the logits."""
    inputs = {name: ids.to(model.device) for name, ids in batch.items() if name != "labels"}
    model.base_model(**inputs, use_cache=False)


NITER = 8


@torch.no_grad()
def eva_start(
    model: Any,
    config: LoraConfig,
    layers: Mapping[str, LoraConfig],
    data: Sequence[Any] | None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """`config` with the rank of each of `layers`, and A (rank, in) of those that get one.

    Args:
        layers: what each would get if the ranks were not shared out.
        data: batches of input_ids and attention_mask, (rows, length) each.

    Raises:
        UserError: there is no data, or a layer sees too little of it.
    """
    if not data:
        raise UserError(
            "init_lora_weights='eva' looks at what the layers read: give apply_lora `data`, "
            "batches of input_ids and attention_mask"
        )
    modules = {name: model.get_submodule(name) for name in layers}
    was_training = model.training
    try:
        found = _directions(model, layers, modules, data)
    finally:
        model.train(was_training)
    shares = {name: share for name, (_, share) in found.items()}
    ranks = share_out(shares, sum(own.r for own in layers.values()))
    chosen = {name: found[name][0][:rank] for name, rank in ranks.items() if rank}
    config = config.with_ranks_of({name: len(lora_A) for name, lora_A in chosen.items()})
    if len(chosen) < len(layers):
        config = replace(config, target_modules=tuple(chosen))
    return config, chosen


def _directions(
    model: Any,
    layers: Mapping[str, LoraConfig],
    modules: Mapping[str, nn.Module],
    data: Sequence[Any],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer up to rho * r directions, on the CPU, and their shares of variance."""
    moments = SecondMoments(model, data, modules)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    idle: list[str] = []
    last: Moments | None = None
    directions = shares = torch.empty(0)
    for name, own in layers.items():
        seen = moments.all_of(name)
        most = min(round(own.r * own.rho), len(seen.first))
        if seen.tokens <= own.r:
            idle.append(name)
            continue
        if seen is not last or len(shares) < most:  # q, k and v read one input
            directions, shares = (t.cpu() for t in main_directions(seen.covariance(), most))
            last = seen
        found[name] = directions[:most], shares[:most]
    if idle:
        raise UserError(
            f"{', '.join(idle)} read too little of EVA's data, no more than r tokens: give more of "
            "it, or name these layers in exclude_modules"
        )
    return found


def main_directions(covariance: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r eigenvectors (r, in) of `covariance` (in, in), and each one's share of variance.

    Orthonormal, fp32; the shares are (r,).
    """
    generator = torch.Generator().manual_seed(0)
    _, roots = best_rank(covariance, r, niter=NITER, generator=generator)  # sqrt(value) * vector
    lengths = roots.norm(dim=1)
    tiny = torch.finfo(torch.float32).tiny
    shares = lengths**2 / covariance.diagonal().sum().clamp_min(tiny)
    return roots / lengths.clamp_min(tiny)[:, None], shares


def share_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each layer's directions are kept, if the `budget` largest of all of them are.

    Args:
        shares: of each layer, those of as many directions as it may have, largest first.
    """
    layers = [name for name, share in shares.items() for _ in range(len(share))]
    order = torch.cat([*shares.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for i in order[:budget].tolist():
        ranks[layers[i]] += 1
    return ranks
