"""Peak memory of merging: does it grow with the model, or with its largest tensor?

    python benchmarks/merge_memory.py

Random Llama-shaped checkpoints, first of more and more layers with the same tensors, then of one
size with larger and larger tensors, each merged in a process of its own. Reported is the peak
resident memory above that of the same process with everything imported and nothing merged. Memory
that the system lends to file pages counts as resident, so this is an upper bound.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from results import record
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.config import LoraConfig

CHILD = """
import sys, time
from qlora.config import MergeConfig
from qlora.training.outputs import peak_resident_bytes
from qlora.merge import merge
import torch, transformers.models.llama.modeling_llama
torch.zeros(1)
before = peak_resident_bytes()
started = time.perf_counter()
merge(MergeConfig(adapter=sys.argv[1], output_dir=sys.argv[2], base_model=sys.argv[3]))
print(f"\\n{before} {peak_resident_bytes()} {time.perf_counter() - started}")
"""


def make(folder: Path, *, hidden: int, layers: int) -> tuple[int, int]:
    """A random bf16 checkpoint and adapter; (bytes of the checkpoint, of its largest tensor)."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=4 * hidden,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    sizes = [p.numel() * 2 for p in model.parameters()]
    apply_lora(model, LoraConfig(r=8))
    save_adapter(model, folder / "adapter")
    return sum(sizes), max(sizes)


def measure(hidden: int, layers: int) -> dict[str, float]:
    """One checkpoint made, and merged in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, largest = make(folder, hidden=hidden, layers=layers)
        words = [str(folder / part) for part in ("adapter", "merged", "base")]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True
        )
    before, peak, seconds = (float(word) for word in done.stdout.split("\n")[-2].split())
    return {
        "hidden_size": hidden,
        "layers": layers,
        "checkpoint_bytes": checkpoint,
        "largest_tensor_bytes": largest,
        "imported_bytes": int(before),
        "peak_above_bytes": int(peak - before),
        "merge_seconds": round(seconds, 2),
    }


def main() -> None:
    """A line and a record per checkpoint."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print(
        f"{'hidden':>7}{'layers':>7}{'checkpoint':>13}{'largest':>10}{'peak above':>12}{'time':>8}"
    )
    shapes = [(1024, layers) for layers in (4, 8, 16, 32)] + [(512, 64), (1024, 16), (2048, 4)]
    for hidden, layers in shapes:
        row = measure(hidden, layers)
        print(
            f"{hidden:7}{layers:7}{row['checkpoint_bytes'] / 1e6:10.0f} MB"
            f"{row['largest_tensor_bytes'] / 1e6:7.0f} MB{row['peak_above_bytes'] / 1e6:9.0f} MB"
            f"{row['merge_seconds']:6.1f} s",
            flush=True,
        )
        record("merge_memory", row)


if __name__ == "__main__":
    main()
