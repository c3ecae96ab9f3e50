"""First values of A and B from a layer's weight W (out, in), or from its inputs x.

    pissa  scaling B A = the best rank-r approximation of W            arXiv:2404.02948
    olora  B, A = the first r columns of Q and rows of R, W = Q R      arXiv:2406.01775
    loftq  scaling B A = the best rank-r approximation of W - Q,       arXiv:2310.08659
           Q the 4-bit base
    eva    A = the first r eigenvectors of the covariance of x, B = 0  arXiv:2410.07170

PiSSA and OLoRA subtract scaling B A from the weight, and W - scaling B A is quantized. LoftQ
alternates: Q_t = q(W - scaling B_t-1 A_t-1), then B_t, A_t from W - Q_t. Its first Q is q(W), so
one iteration leaves the base unchanged and compensates its error.

A full SVD of 4096 x 11008 takes seconds on a GPU. Here the singular vectors of one side are the
eigenvectors of the smaller of W W' and W' W, and the other side is their product with W. Squaring
loses digits of the small singular values only: on SmolLM2's matrices the approximation equals the
full SVD's to 1e-12. With `niter`, subspace iteration from a random start (arXiv:0909.4061) takes a
fiftieth of the time. Of the error that the exact rank 16 removes there, 4 iterations remove 95 %,
8 over 99 % and 16 over 99.9 %.

EVA redistributes ranks: of all layers' directions it keeps the sum-of-r ones with the largest
shares of their own layer's variance, at most rho * r in one layer. A layer without any gets no
adapter; the scaling of the others stays. The covariance (in, in) is summed over all tokens, also of
prompts, so the order of batches does not matter. (PEFT updates a truncated SVD batch by batch.)

`SecondMoments` sums x x' (in, in) over runs of the model; the merge to 4 bits uses it as well. All
layers of a 7B model need 22 GB, so each run sums a group that fits into `moments_budget`. Layers
that read one input share its moments.

Left out: CorDA and LoRA-GA, which need gradients or inputs of fp32 weights; PiSSA's own loop over
quantizations, which is LoftQ with another start.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.adapters.lora import delta_weight
from qlora.adapters.wrappers import plain
from qlora.base.modules import matrix_shape
from qlora.cli import Progress
from qlora.config import LoraConfig
from qlora.errors import UserError, require

OVERSAMPLING = 16  # iterate r + 16 directions: the first r converge faster
EVA_NITER = 8
MAX_BYTES = 4 << 30  # of moments in host memory at once
Pair = tuple[Tensor, Tensor]  # A (r, in) and B (out, r)

# ---- from the weight ----


def pissa(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> Pair:
    """A (r, in) and B (out, r) whose scaling B A is the best rank-r approximation of `weight`.

    With W = U S V' (out, in) these are A = sqrt(S_r / scaling) V_r', B = U_r sqrt(S_r / scaling).
    `niter` is the number of subspace iterations; None computes the exact one.
    """
    return _unscaled(*best_rank(weight.float(), r, niter=niter, generator=generator), scaling)


def olora(weight: Tensor, r: int) -> Pair:
    """A = R_r (r, in) and B = Q_r (out, r) of `weight` = Q R (out, in), for any scaling.

    Q_r depends on the first r columns of W only, so the others are not decomposed. Q_r R_r projects
    W on Q_r: W - scaling Q_r R_r is smallest at a scaling of 1; a scaling of 2 reflects W, which
    quantizes no better, as in the paper and PEFT.
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
    """A and B that compensate the 4-bit base's error, and the pair subtracted from that base.

    `quantize` is a weight (out, in) -> the same quantized and dequantized. With 1 of `iterations`
    nothing is subtracted, and the second pair is None. PEFT leaves `scaling` out, which is correct
    for a scaling of 1 only.
    """
    weight = weight.float()
    subtracted, rest = None, weight
    for i in range(iterations):
        pair = _unscaled(*best_rank(weight - quantize(rest), r), scaling)
        if i + 1 < iterations:
            subtracted, rest = pair, weight - delta_weight(*pair, scaling)
    return pair, subtracted


def best_rank(
    weight: Tensor, r: int, *, niter: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """U_r sqrt(S_r) (out, r) and sqrt(S_r) V_r' (r, in) of `weight` = U S V' (out, in), fp32.

    Their product is the best approximation of that rank; singular values are largest first.
    """
    if weight.shape[0] > weight.shape[1]:
        left, right = best_rank(weight.T, r, niter=niter, generator=generator)
        return right.T, left.T
    if niter is None:
        basis = torch.linalg.eigh(weight @ weight.T)[1].flip(1)[:, :r]  # of (out, out) -> (out, r)
    else:
        draws = min(r + OVERSAMPLING, *weight.shape)
        start = torch.randn(weight.shape[1], draws, generator=generator).to(weight.device)
        basis = torch.linalg.qr(weight @ start)[0]  # (out, draws)
        for _ in range(niter):
            basis = torch.linalg.qr(weight @ (weight.T @ basis))[0]
        rows = basis.T @ weight  # (draws, in)
        basis = torch.mm(basis, torch.linalg.eigh(rows @ rows.T)[1].flip(1)[:, :r])
    right = basis.T @ weight  # (r, out) @ (out, in) -> (r, in)
    root = right.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return basis * root, right / root[:, None]


def _unscaled(left: Tensor, right: Tensor, scaling: float) -> Pair:
    """A (r, in) and B (out, r) with scaling B A = left right."""
    return right / scaling**0.5, left / scaling**0.5


# ---- moments of a layer's inputs ----


class Moments(NamedTuple):
    """Sums over a layer's inputs x, fp32, on the model's device."""

    second: Tensor  # of x x' (in, in)
    first: Tensor  # of x (in,)
    tokens: Tensor  # their number ()

    def covariance(self) -> Tensor:
        """The sum of (x - mean) (x - mean)', (in, in)."""
        return torch.addr(self.second, self.first, self.first / self.tokens.clamp_min(1), alpha=-1)


class SecondMoments:
    """Moments of layers' inputs, summed group by group on demand.

    Ask for the layers in the model's order: each group then runs once.
    """

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
        return self.moments_of(layer).second

    def moments_of(self, layer: str) -> Moments:
        """All moments of the inputs of `layer`."""
        if layer in self._gathered:
            return self._gathered[layer]
        self._gathered = {}  # frees the last group's memory before the next is allocated
        group, device = next(g for g in self.groups if layer in g), self.model.device
        leaders = {name: self.layers[name] for name in dict.fromkeys(group.values())}
        sums = {}
        for name in leaders:
            zeros = torch.zeros(self.widths[name], device=device)
            sums[name] = Moments(torch.outer(zeros, zeros), zeros, torch.zeros((), device=device))
        for batch in Progress(self.batches, desc="Calibrating"):
            mask = batch["attention_mask"].bool().to(device)  # (rows, length)

            def add(name: str, _: nn.Module, args: Any, mask: Tensor = mask) -> None:
                x = args[0].float()
                x = x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)  # (tokens, in)
                sums[name].second.addmm_(x.T, x)  # (in, tokens) @ (tokens, in)
                sums[name].first.add_(x.sum(0))
                sums[name].tokens.add_(len(x))

            self._run(batch, leaders, add)
        self._gathered = {name: sums[leader] for name, leader in group.items()}
        return self._gathered[layer]

    def _groups(self, max_bytes: int) -> list[dict[str, str]]:
        """The layers in groups whose moments fit, {layer: leader} each. The leader is the first
        layer that reads the same input."""
        leaders: dict[str, str] = {}
        last: list[tuple[Any, str]] = []

        def record(name: str, _: nn.Module, args: Any) -> None:
            same = last and last[0][0] is args[0]
            leaders[name] = last[0][1] if same else name
            last[:] = [(args[0], leaders[name])]

        self._run(self.batches[0], self.layers, record)
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

    @torch.no_grad()
    def _run(
        self, batch: Any, layers: Mapping[str, Any], visit: Callable[[str, nn.Module, Any], None]
    ) -> None:
        """Run the model on `batch`, without its output head; `visit(name, layer, args)` is called
        before each layer."""
        inputs = {k: ids.to(self.model.device) for k, ids in batch.items() if k != "labels"}
        with ExitStack() as stack:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(partial(visit, name))
                stack.callback(hook.remove)
            self.model.base_model(**inputs, use_cache=False)


def moments_budget(device: torch.device) -> int:
    """Bytes for moments: MAX_BYTES, on a GPU half of its free memory."""
    if device.type != "cuda":
        return MAX_BYTES
    return torch.cuda.mem_get_info(device)[0] // 2


# ---- from the inputs ----


@torch.no_grad()
def eva_start(
    model: Any,
    config: LoraConfig,
    layers: Mapping[str, LoraConfig],
    data: Sequence[Any] | None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """`config` with redistributed ranks, and A (rank, in) of each layer that gets an adapter.

    `layers` has the config of each layer before that, `data` batches of input_ids and
    attention_mask, (rows, length) each. Raises UserError if there is no data, or a layer reads no
    more than r of its tokens.
    """
    needs = "init_lora_weights='eva' needs inputs of the layers: give apply_lora `data`"
    if not data:
        raise UserError(f"{needs}, batches of input_ids and attention_mask")
    was_training = model.training
    directions: dict[str, tuple[Tensor, Tensor]] = {}  # (n, in) and shares (n,), on the CPU
    too_few: list[str] = []
    last: Moments | None = None
    rows = shares = torch.empty(0)
    try:
        moments = SecondMoments(model, data, {name: model.get_submodule(name) for name in layers})
        for name, layer in layers.items():
            inputs = moments.moments_of(name)
            count = min(round(layer.r * layer.rho), len(inputs.first))
            if inputs.tokens <= layer.r:
                too_few.append(name)
                continue
            if inputs is not last or len(shares) < count:  # q, k and v read one input
                rows, shares = (t.cpu() for t in main_directions(inputs.covariance(), count))
                last = inputs
            directions[name] = rows[:count], shares[:count]
    finally:
        model.train(was_training)
    why = f"{', '.join(too_few)} read too few tokens of EVA's data, no more than r"
    require(not too_few, f"{why}: give more data, or name these layers in exclude_modules")
    shares_of = {name: share for name, (_, share) in directions.items()}
    ranks = redistribute(shares_of, sum(layer.r for layer in layers.values()))
    lora_A = {name: directions[name][0][:rank] for name, rank in ranks.items() if rank}
    config = config.with_ranks_of({name: len(rows) for name, rows in lora_A.items()})
    if len(lora_A) < len(layers):
        config = replace(config, target_modules=tuple(lora_A))
    return config, lora_A


def main_directions(covariance: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r eigenvectors (r, in) of `covariance` (in, in), and their shares of variance (r,).

    Orthonormal, fp32. Eigenvalues fall fast, so a few subspace iterations are enough.
    """
    generator = torch.Generator().manual_seed(0)
    scaled = best_rank(covariance, r, niter=EVA_NITER, generator=generator)[1]
    lengths = scaled.norm(dim=1)  # square roots of the eigenvalues
    tiny = torch.finfo(torch.float32).tiny
    shares = lengths**2 / covariance.diagonal().sum().clamp_min(tiny)
    return scaled / lengths.clamp_min(tiny)[:, None], shares


def redistribute(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """The rank of each layer: how many of the `budget` largest shares of all layers are its own;
    `shares` are of each layer's directions, as many as it may keep, largest first."""
    layers = [name for name, share in shares.items() for _ in range(len(share))]
    order = torch.cat([*shares.values()]).argsort(descending=True, stable=True)
    chosen = Counter(layers[i] for i in order[:budget].tolist())
    return {name: chosen[name] for name in shares}
