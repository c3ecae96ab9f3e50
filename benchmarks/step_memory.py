"""Memory of a training step of a large model on a GPU, counted without a GPU.

    python benchmarks/step_memory.py llama2-7b --seq 2048 [--batch 1] [--r 16] [--offload]

Prints {"loaded": bytes, "peak": bytes} as JSON: the memory of all tensors, without the kernels' own
memory, the CUDA context and fragmentation.

Two steps run on the meta device (benchmarks/meta_gpu.py). Buffers for decoded weights count once
per thread, of which a GPU's steps have two: forward passes run on the main thread, recomputation
and backward passes on autograd's. So do cuBLAS' workspaces, in Hopper's size.
"""

import argparse
import json
import sys
import tempfile
import threading
import weakref
from typing import Any

import torch
from meta_gpu import backward, empty, stand_ins, widen, write_narrow
from shapes import on_meta, shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.adapters.apply import apply_lora
from qlora.base.load import load_base
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.fast.offload import offload_activations
from qlora.training import prepare_for_training

# torch gives each thread a handle of cuBLAS with a workspace: 32 MiB on Hopper, 8 on other cards
WORKSPACE = 32 << 20
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


class Counter(TorchDispatchMode):
    """Bytes of all storages that operators allocate, while they are alive, and of workspaces."""

    def __init__(self, *, without: int) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.without = without  # values of the logits, which have a shape only
        self.is_host = False
        self.threads: set[int] = set()  # those that have a workspace
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._schema.name in PRODUCTS and threading.get_ident() not in self.threads:
            self.threads.add(threading.get_ident())
            self.now += WORKSPACE
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, 0 if self.is_host else storage.nbytes()
        if key in self._known or tensor.numel() == self.without:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class HostMemory:
    """Copies to host memory, which is not counted."""

    def __init__(self, counter: Counter) -> None:
        self.device = torch.device("meta")
        self.counter = counter

    def allocate(self, size: int) -> Tensor:
        self.counter.is_host = True
        made = empty((size,), torch.uint8)
        self.counter.is_host = False
        return made

    def start(self, target: Tensor, source: Tensor) -> None:
        pass

    def finish(self, started: Any) -> None:
        pass


# ---- the count ----


def count(name: str, *, seq: int, batch: int, r: int, offload: bool) -> dict[str, int]:
    """Bytes of the model with adapters, and the peak of the second step."""
    config = shape(name)
    with tempfile.TemporaryDirectory() as folder:
        write_narrow(config, folder)
        model = load_base(folder, QuantConfig(compute_dtype="bf16"), device="cpu")
    apply_lora(model, LoraConfig(r=r, lora_alpha=2 * r))
    prepare_for_training(model)
    large = on_meta(config)
    stand_ins()
    counter = Counter(without=batch * seq * config.vocab_size)
    context = offload_activations(copies=HostMemory(counter)) if offload else torch.enable_grad()
    with counter:
        widen(model, large, r)
        loaded = counter.now
        ids = empty((batch, seq), torch.int64)
        for _ in range(2):
            with context:
                of_batch = model(input_ids=ids, labels=ids).loss
            backward(of_batch, counter)
            del of_batch
            model.zero_grad(set_to_none=True)
    return {"loaded": loaded, "peak": counter.peak}


def main() -> None:
    """The command; a user's error is one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", metavar="shape", help="llama2-7b, llama3.1-8b, …")
    parser.add_argument("--offload", action="store_true", help="as --offload-activations does")
    for flag, default in (("seq", 2048), ("batch", 1), ("r", 16)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    try:
        print(json.dumps(count(**vars(parser.parse_args()))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
