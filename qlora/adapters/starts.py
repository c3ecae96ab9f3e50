"""First values of A and B from a layer's weight W (out, in), or from its inputs x.

    pissa  scaling B A = the best rank r of W                          arXiv:2404.02948
    olora  B A = the first r of Q and R, W = Q R                       arXiv:2406.01775
    loftq  scaling B A = the best rank r of W - Q, Q the 4-bit base    arXiv:2310.08659
    eva    A = the first r eigenvectors of the covariance of x, B = 0  arXiv:2410.07170

PiSSA and OLoRA subtract scaling B A from the weight, and W - scaling B A is quantized. LoftQ
alternates: Q_t = q(W - scaling B_t-1 A_t-1), then B_t, A_t from W - Q_t. Its first Q is the plain
one, so one iteration leaves the base unchanged and makes up for its error.

A full SVD of 4096 x 11008 takes seconds on a GPU. The eigenvectors of the smaller of W W' and W' W
are the singular vectors of one side, and the other side is their product with W. Squaring costs
digits of the small singular values alone: on SmolLM2's matrices the approximation is the full SVD's
to 1e-12. `niter` iterates from a random subspace (arXiv:0909.4061) in a fiftieth of the time: of
what the best rank 16 takes off the error, 4 iterations lose up to 5 %, 8 under 1 % and 16 under
0.1 % there.

EVA chooses the directions with the largest shares of their layer's variance for all layers
together, as many as r gives them in sum: a layer gets up to rho * r of them, or none, and then no
adapter; its scaling stays. The covariance is gathered whole, (in, in) a layer, and exact whatever
the order of the data, where PEFT updates a truncated SVD batch by batch, (r, in). All tokens count,
prompt and answer (PEFT's use_label_mask=False).

`SecondMoments` sums x x' (in, in) in runs of the model over data, for the merge to 4 bits as well.
All layers of a 7B model take 22 GB together, so groups of them that fit into `moments_budget` are
gathered in one run each. Layers that read one input share its moments.

Left out: CorDA and LoRA-GA, which need gradients or inputs of fp32 weights; PiSSA's own loop over
quantizations, which is LoftQ with another start.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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

OVERSAMPLING = 16  # further directions that iterate, so that the first r are right
EVA_NITER = 8
MAX_BYTES = 4 << 30  # of moments that are held at once
Pair = tuple[Tensor, Tensor]

# ---- from the weight ----


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
    return _share(*best_rank(weight.float(), r, niter=niter, generator=generator), scaling)


def olora(weight: Tensor, r: int) -> Pair:
    """A = R_r (r, in) and B = Q_r (out, r) of `weight` = Q R (out, in), for any scaling.

    The first columns of Q are those of the weight's first columns: nothing else is decomposed.
    Q_r R_r is W on r directions, so the rest, W - scaling Q_r R_r, is smallest for a scaling of 1;
    with 2 it is W mirrored, and 4 bits lose no less of it. Paper and PEFT leave that as it is.
    """
    weight = weight.float()
    basis = torch.linalg.qr(weight[:, :r])[0]  # (out, r)
    return basis.T @ weight, basis


def loftq(
    weight: Tensor,
    r: int,
    scaling: float,
    quantize: Callable[[Tensor], Tensor],
    *,
    iterations: int = 1,
) -> tuple[Pair, Pair | None]:
    """A and B that make up for the 4-bit base's error, and the A and B subtracted from that base.

    PEFT leaves `scaling` out, and so is right only where it is 1.

    Args:
        quantize: what 4 bits keep of a weight, (out, in) -> (out, in).
        iterations: with 1 nothing is subtracted, and the second pair is None.
    """
    weight = weight.float()
    subtracted, rest = None, weight
    for i in range(iterations):
        pair = _share(*best_rank(weight - quantize(rest), r), scaling)
        if i + 1 < iterations:
            subtracted, rest = pair, weight - delta_weight(*pair, scaling)
    return pair, subtracted


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
        basis = torch.linalg.eigh(weight @ weight.T)[1].flip(1)[:, :r]  # of (out, out)
    else:
        basis = _subspace(weight, r, niter, generator)
    right = basis.T @ weight  # (r, out) @ (out, in) -> (r, in)
    root = right.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return basis * root, right / root[:, None]


def _subspace(weight: Tensor, r: int, niter: int, generator: torch.Generator | None) -> Tensor:
    """The first r left singular vectors (out, r) of `weight`, approximately."""
    draws = min(r + OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], draws, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ start)[0]  # (out, draws)
    for _ in range(niter):
        basis = torch.linalg.qr(weight @ (weight.T @ basis))[0]
    rows = basis.T @ weight  # (draws, in)
    return torch.mm(basis, torch.linalg.eigh(rows @ rows.T)[1].flip(1)[:, :r])


def _share(left: Tensor, right: Tensor, scaling: float) -> Pair:
    """A and B with scaling B A = left right."""
    return right / scaling**0.5, left / scaling**0.5


# ---- moments of a layer's inputs ----


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
    """The moments of the inputs of some layers; cheap when asked for in the model's order."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Any],
        layers: Mapping[str, nn.Module],
        *,
        max_bytes: int | None = None,
    ):
        self.model, self.batches, self.layers = model.eval(), batches, layers
        self.widths = {name: matrix_shape(plain(layer))[1] for name, layer in layers.items()}
        self.groups = self._groups(max_bytes or moments_budget(model.device))
        self._gathered: dict[str, Moments] = {}

    def of(self, layer: str) -> Tensor:
        """The sum of x x' over the inputs of `layer`, fp32 (in, in), on the model's device."""
        return self.all_of(layer).second

    def all_of(self, layer: str) -> Moments:
        """The same with the first moments and the number of tokens."""
        if layer not in self._gathered:
            self._gathered = {}  # frees the last group's memory before the next is allocated
            self._gathered = self._gather(next(group for group in self.groups if layer in group))
        return self._gathered[layer]

    def _groups(self, max_bytes: int) -> list[dict[str, str]]:
        """Layers in the model's order, in groups whose moments fit; each with its leader, the
        first layer that reads the same input (q, k and v read one, gate and up another)."""
        leaders: dict[str, str] = {}
        last: list[tuple[Any, str]] = []

        def note(name: str, x: Tensor) -> None:
            leaders[name] = last[0][1] if last and last[0][0] is x else name
            last[:] = [(x, leaders[name])]

        self._run(self.batches[0], self.layers, note)
        groups: list[dict[str, str]] = [{}]
        used = 0
        for name, width in self.widths.items():
            leader = leaders.get(name, name)
            size = 4 * width**2 if leader not in groups[-1].values() else 0
            if groups[-1] and used + size > max_bytes:
                groups.append({})
                leader, used, size = name, 0, 4 * width**2
            groups[-1][name] = leader
            used += size
        return groups

    def _gather(self, group: Mapping[str, str]) -> dict[str, Moments]:
        device = self.model.device
        leaders = {name: self.layers[name] for name in dict.fromkeys(group.values())}
        sums = {}
        for name in leaders:
            shapes: tuple[Any, ...] = ((self.widths[name],) * 2, (self.widths[name],), ())
            sums[name] = Moments(*(torch.zeros(shape, device=device) for shape in shapes))
        for batch in tqdm(self.batches, desc="Calibrating", leave=False):
            mask = batch["attention_mask"].bool().to(device)  # (rows, length)

            def add(name: str, x: Tensor, mask: Tensor = mask) -> None:
                x = x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)  # (tokens, in)
                x = x.float()
                sums[name].second.addmm_(x.T, x)
                sums[name].first.add_(x.sum(0))
                sums[name].tokens.add_(len(x))

            self._run(batch, leaders, add)
        return {name: sums[leader] for name, leader in group.items()}

    @torch.no_grad()
    def _run(
        self, batch: Any, layers: Mapping[str, Any], see: Callable[[str, Tensor], None]
    ) -> None:
        """The model over `batch`, without its output head; `see(name, x)` gets layers' inputs."""
        inputs = {
            name: ids.to(self.model.device) for name, ids in batch.items() if name != "labels"
        }
        with ExitStack() as stack:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(
                    lambda _, args, name=name: see(name, args[0])
                )
                stack.callback(hook.remove)
            self.model.base_model(**inputs, use_cache=False)


def moments_budget(device: torch.device) -> int:
    """Bytes for moments: MAX_BYTES, and on a small GPU half of what the model leaves free."""
    if device.type != "cuda":
        return MAX_BYTES
    return min(MAX_BYTES, torch.cuda.mem_get_info(device)[0] // 2)


# ---- from the inputs ----


@torch.no_grad()
def eva_start(
    model: Any,
    config: LoraConfig,
    layers: Mapping[str, LoraConfig],
    data: Sequence[Any] | None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """`config` with the rank of each of `layers`, and A (rank, in) of those that get one.

    Args:
        layers: what each would get if the ranks were not redistributed.
        data: batches of input_ids and attention_mask, (rows, length) each.

    Raises:
        UserError: there is no data, or a layer sees too little of it.
    """
    if not data:
        raise UserError(
            "init_lora_weights='eva' looks at what the layers read: give apply_lora `data`, "
            "batches of input_ids and attention_mask"
        )
    was_training = model.training
    try:
        directions = _directions(model, layers, data)
    finally:
        model.train(was_training)
    shares = {name: share for name, (_, share) in directions.items()}
    ranks = share_out(shares, sum(layer.r for layer in layers.values()))
    lora_A = {name: directions[name][0][:rank] for name, rank in ranks.items() if rank}
    config = config.with_ranks_of({name: len(rows) for name, rows in lora_A.items()})
    if len(lora_A) < len(layers):
        config = replace(config, target_modules=tuple(lora_A))
    return config, lora_A


def _directions(
    model: Any, layers: Mapping[str, LoraConfig], data: Sequence[Any]
) -> dict[str, Pair]:
    """Of each layer up to rho * r directions, on the CPU, and their shares of variance."""
    moments = SecondMoments(model, data, {name: model.get_submodule(name) for name in layers})
    directions: dict[str, Pair] = {}
    idle: list[str] = []
    last: Moments | None = None
    rows = shares = torch.empty(0)
    for name, layer in layers.items():
        own = moments.all_of(name)
        most = min(round(layer.r * layer.rho), len(own.first))
        if own.tokens <= layer.r:
            idle.append(name)
            continue
        if own is not last or len(shares) < most:  # q, k and v read one input
            rows, shares = (t.cpu() for t in main_directions(own.covariance(), most))
            last = own
        directions[name] = rows[:most], shares[:most]
    if idle:
        raise UserError(
            f"{', '.join(idle)} read too little of EVA's data, no more than r tokens: give more of "
            "it, or name these layers in exclude_modules"
        )
    return directions


def main_directions(covariance: Tensor, r: int) -> Pair:
    """The first r eigenvectors (r, in) of `covariance` (in, in), and their shares of variance (r,).

    Orthonormal, fp32. A few iterations from a random subspace do, as the values fall fast.
    """
    generator = torch.Generator().manual_seed(0)
    roots = best_rank(covariance, r, niter=EVA_NITER, generator=generator)[1]
    lengths = roots.norm(dim=1)  # the square roots of the values
    tiny = torch.finfo(torch.float32).tiny
    shares = lengths**2 / covariance.diagonal().sum().clamp_min(tiny)
    return roots / lengths.clamp_min(tiny)[:, None], shares


def share_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each layer's directions are among the `budget` largest of all layers.

    Args:
        shares: of each layer, those of as many directions as it may have, largest first.
    """
    layers = [name for name, share in shares.items() for _ in range(len(share))]
    order = torch.cat([*shares.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for i in order[:budget].tolist():
        ranks[layers[i]] += 1
    return ranks
