"""One side of benchmarks/step.py: takes steps and measures their time and memory.

A step is forward, backward, clipping, optimizer and zero_grad, on the same batch of random ids each
time. The optimizer is paged 8-bit AdamW on a GPU and torch's AdamW on a CPU. (fp16 goes without
loss scaling, which costs next to nothing.)

Memory is counted from the model as it is loaded, with adapters, before the first step:

    GPU       the peak of torch's allocator, in total and above that. The CUDA context (about half a
              GiB) and a paged optimizer's states are not included.
    CPU       exactly, what a step allocates and frees as the profiler sees it, with the optimizer's
              states; and as the system sees it, the peak of the resident size (VmHWM) above the
              resident size at the start, in which malloc keeps what it may need again.
"""

import gc
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from loss import changes, peak
from saved import saved_tensors, summary
from step_sides import Setup, make_side
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from qlora.base.load import compute_dtype
from qlora.config import TrainConfig
from qlora.ops.lora import linear
from qlora.training import keep_updates

MAX_GRAD_NORM = TrainConfig.max_grad_norm
LEARNING_RATE = 1e-3
WARM_UP = 2  # the second one has the optimizer's states from the start


class Runner:
    """One side, loaded and prepared."""

    def __init__(self, name: str, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        logging.disable_progress_bar()
        self.setup = setup
        self.is_gpu = setup.device == "cuda"
        if setup.allocator_bytes:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(setup.allocator_bytes / total)
        self.model, self.forward = make_side(name, setup)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.trained, on_gpu=self.is_gpu) if self.trained else None
        if self.optimizer is not None and name.startswith("ours"):
            self.optimizer = keep_updates(self.optimizer)  # as Trainer does with bf16 adapters
        self.ids = self._batch(setup.seq)
        self.loaded = self._settle()

    def _batch(self, seq: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.setup.seed)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (self.setup.batch, seq), generator=generator)
        return ids.to(self.setup.device)

    # ---- steps ----

    def step(self) -> tuple[float, float]:
        """One step: (seconds, loss)."""
        start = time.perf_counter()
        loss = self._step()
        self._wait()
        return time.perf_counter() - start, float(loss)

    def _step(self) -> Tensor:
        loss = self.forward(self.ids)
        loss.backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def fits(self, seq: int) -> bool:
        """Whether steps on rows of that length fit; the Runner is unusable after a False."""
        try:
            self.ids = self._batch(seq)
            for _ in range(WARM_UP):
                self._step()
            self._wait()
        except torch.OutOfMemoryError:
            return False
        self._settle()
        return True

    # ---- memory ----

    def _settle(self) -> int:
        """Free unused memory, reset the peaks, and return the bytes in use."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
        return _resident("VmRSS")

    def warm_up(self) -> dict[str, Any]:
        """Take the first steps; their memory above the loaded model, and the adapters' dtype."""
        for _ in range(WARM_UP):
            self._step()
        self._wait()
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.trained})
        held = self._on_gpu() if self.is_gpu else self._on_cpu()
        return {**held, "adapter_dtype": ", ".join(dtypes) or None}

    def _on_gpu(self) -> dict[str, int]:
        most = torch.cuda.max_memory_allocated()
        return {
            "above_loaded_bytes": most - self.loaded,
            "loaded_bytes": self.loaded,
            "peak_bytes": most,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def _on_cpu(self) -> dict[str, int]:
        resident = _resident("VmHWM") - self.loaded
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        own = sum(t.nbytes for s in states for t in s.values() if isinstance(t, Tensor))
        counted = peak(self._step, "cpu") + own
        return {"above_loaded_bytes": counted, "above_loaded_resident_bytes": resident}

    def saved(self) -> dict[str, Any]:
        """Tensors saved for the backward pass (benchmarks/saved.py), and `held_bytes`, all bytes
        that the forward pass leaves allocated."""
        found = summary(saved_tensors(self.model, lambda: self.forward(self.ids)))
        return {**found, "held_bytes": self._held()}

    def _held(self) -> int:
        if self.is_gpu:
            before = torch.cuda.memory_allocated()
            loss = self.forward(self.ids)
            return torch.cuda.memory_allocated() - before if loss.requires_grad else 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loss = self.forward(self.ids)
        return sum(changes(seen.profiler)) if loss.requires_grad else 0


class Product:
    """A large square matrix product, the ceiling of a step."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.is_gpu = setup.device == "cuda"
        self.size = 8192 if self.is_gpu else 1536
        dtype = compute_dtype(setup.quant, torch.device(setup.device))
        shape = (2, self.size, self.size)
        self.matrices = torch.randn(shape, device=setup.device).to(dtype)
        self.rate()

    def rate(self, products: int = 4) -> float:
        """FLOP a second."""
        a, b = self.matrices
        if self.is_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(products):
            linear(a, b)
        if self.is_gpu:
            torch.cuda.synchronize()
        return 2 * self.size**3 * products / (time.perf_counter() - start)


def _optimizer(parameters: list[nn.Parameter], *, on_gpu: bool) -> torch.optim.Optimizer:
    if on_gpu:
        from bitsandbytes.optim import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(parameters, lr=LEARNING_RATE)
        return paged
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def _resident(key: str) -> int:
    """VmRSS or VmHWM of this process; Linux only."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
