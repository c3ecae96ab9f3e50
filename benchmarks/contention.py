"""Training on a CPU beside other work: how the threads of OpenMP wait for each other.

    python benchmarks/contention.py
    python benchmarks/contention.py --repeats 5 --seconds 10

Trains a small random llama in 4 bits, in a new process per row, because OpenMP reads its variables
when torch is loaded: alone, and beside `--busy` processes that compute without end. The settings
take turns, so that other load meets all of them; the median of the tokens per second is printed.
The load average at the start is printed too: it must be near 0 for the rows "alone".

    default      threads spin at barriers before they sleep (GOMP_SPINCOUNT 300,000 in libgomp)
    passive      OMP_WAIT_POLICY=PASSIVE: they sleep at once
    one fewer    OMP_NUM_THREADS one below the number of cores
    as train     passive if others are busy at the start; in training, as many threads as they leave
                 cores free
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from qlora.__main__ import _wait_passively_beside_others

CORES = len(os.sched_getaffinity(0))
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one fewer": {"OMP_NUM_THREADS": str(max(1, CORES - 1))},
    "as train": {"AS_TRAIN": "1"},
}
ROWS, TOKENS = 2, 128  # of a batch


def make_base(folder: Path) -> None:
    """A random llama of 7 million parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def tokens_per_second(base: str, seconds: float) -> float:
    """Of training steps in this process, after two to warm up."""
    if "AS_TRAIN" in os.environ:
        _wait_passively_beside_others()
    import torch

    from qlora import LoraConfig, QuantConfig, apply_lora, load_base
    from qlora.training import prepare_for_training
    from qlora.training.callbacks import FreeCores

    model = apply_lora(load_base(base, QuantConfig(compute_dtype="fp32")), LoraConfig())
    prepare_for_training(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(4096, (ROWS, TOKENS))
    callback, args = FreeCores(), SimpleNamespace(device=model.device)
    callback.on_train_begin(args, None, None)
    steps, started = -2, 0.0
    while steps < 1 or time.perf_counter() - started < seconds:
        if steps == 0:
            started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if "AS_TRAIN" in os.environ:
            callback.on_step_end(args, None, None)
    return ROWS * TOKENS * steps / (time.perf_counter() - started)


def measure(base: str, setting: str, busy: int, seconds: float) -> float:
    """`tokens_per_second` in a process with this setting, beside `busy` others."""
    names = {name for values in SETTINGS.values() for name in values}
    own = {name: value for name, value in os.environ.items() if name not in names}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [sys.executable, __file__, "--base", base, "--seconds", str(seconds)]
        done = subprocess.run(
            command, env=own | SETTINGS[setting], stdout=subprocess.PIPE, text=True, check=True
        )
    finally:
        for other in others:
            other.kill()
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print a table with a row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5, help="of steps in each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes per row")
    parser.add_argument("--busy", type=int, default=1, help="processes beside it")
    parser.add_argument("--base", help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args()
    if args.base:
        print(tokens_per_second(args.base, args.seconds))
        return
    print(f"{CORES} cores, load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        rows = [(setting, busy) for busy in (0, args.busy) for setting in SETTINGS]
        speeds: dict[tuple[str, int], list[float]] = {row: [] for row in rows}
        for _ in range(args.repeats):
            for row in rows:
                speeds[row].append(measure(folder, *row, args.seconds))
                print(f"{row[0]}, {row[1]} busy: {speeds[row][-1]:,.0f} tokens/s", flush=True)
    print(f"{'tokens/s':12}{'alone':>10}{f'{args.busy} busy':>10}")
    for setting in SETTINGS:
        alone, beside = (statistics.median(speeds[setting, busy]) for busy in (0, args.busy))
        print(f"{setting:12}{alone:10,.0f}{beside:10,.0f}")


if __name__ == "__main__":
    main()
