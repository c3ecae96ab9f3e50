"""Every language model family of the installed transformers: trained, saved, loaded, merged.

    python benchmarks/families.py [TYPE ...] [--workers 1] [--limit 60]
    python benchmarks/families.py --page     rewrites the table in docs/measured.md

For each model type of AutoModelForCausalLM a tiny random checkpoint (benchmarks/family_sizes.py)
is loaded in 4 bits, gets an adapter of random values, computes gradients, is saved, loaded onto a
fresh base, and merged in fp32 and bf16; encoder-decoders do so with each of `ADAPTERS`. A case
fails unless

- an adapter has a gradient wherever transformers' own weight has one; loss and gradients of the
  fast path are those of the plain model
- the saved adapter, loaded, gives the same logits, bit for bit
- transformers finds no tensor missing or unexpected in the merged folder
- the merged model in fp32 gives the live adapter's logits, to 1e-5 of their norm, and generates
  its tokens up to the base's end token; its tensors in bf16 are those in fp32, rounded once

or it is refused in one line before training. The exit code is 1 if a case fails.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from family_sizes import ENCODER_DECODERS, decoders, tiny_config
from results import RESULTS, record
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from qlora import UserError, apply_lora, load_adapter, load_base, save_adapter
from qlora.adapters.wrappers import adapted
from qlora.base.checkpoint import linear_layers
from qlora.base.modules import heads, is_in
from qlora.config import LoraConfig, MergeConfig, QuantConfig
from qlora.merge import merge
from qlora.training import prepare_for_training

PAGE = Path(__file__).parents[1] / "docs" / "measured.md"
BEGIN, END = "<!-- benchmarks/families.py -->", "<!-- end of families -->"
HEAD = ["type", "adapter", "trains", "error of fp32", "of bf16", "note"]
CLOSE = 1e-5  # fp32 sums in another order
GRADIENTS_CLOSE = 1e-4  # of small gradients, which are sums of large ones
ALL = "every linear layer but the head"
ADAPTERS: dict[str, dict[str, Any]] = {  # of encoder-decoders
    "default": {},
    "trained head": {"modules_to_save": ("lm_head",)},
    "adapted head": {"target_modules": (ALL, "lm_head")},
    "adapted shared": {"target_modules": (ALL, "shared")},
    "trained shared": {"modules_to_save": ("shared",)},
    "token rows": {"trainable_token_indices": (5, 7, 11)},
}


class Fault(Exception):
    """A check that failed."""


class OutOfTime(BaseException):
    """A case took too long; no `except Exception` of a library holds it."""


def require(holds: bool, fault: str) -> None:
    """Raise the fault unless the check holds."""
    if not holds:
        raise Fault(fault)


# ---- one case ----


class Case:
    """A model type with an adapter, in a folder of its own."""

    def __init__(self, kind: str, adapter: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.settings = ADAPTERS[adapter]
        self.notes: list[str] = []
        self.unquantized = False  # whether matrices may stay in 16 bits, which is a note
        self.seq2seq = kind in ENCODER_DECODERS
        self.task = "seq2seq" if self.seq2seq else "causal-lm"
        auto = "AutoModelForSeq2SeqLM" if self.seq2seq else "AutoModelForCausalLM"
        self.auto = getattr(transformers, auto)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(20, 250, (4, 32), generator=generator)
        self.inputs = {"input_ids": ids, "labels": ids.flip(1) if self.seq2seq else ids}

    def run(self) -> dict[str, Any]:
        """The case's row of the table. Raises Fault at the first check that fails."""
        self.save_base()
        own = self.load(self.folder / "base")[0]
        try:
            self.backward(own.train())
        except Exception as error:
            return {"trains": "no", "note": f"transformers: {first_line(error)}"}
        idle = {
            n.rpartition(".")[0]
            for n, p in own.named_parameters()
            if p.grad is None or not p.grad.any()
        }
        try:
            model = self.adapted()
        except UserError as refusal:
            return {"trains": "refused", "note": str(refusal).replace(f"{self.folder}/", "")}
        self.require_gradients(model, idle)
        live = self.logits(model.eval())
        require(bool(live.isfinite().all()), "logits are not finite")
        save_adapter(model, self.folder / "adapter")
        again = load_adapter(self.base(), self.folder / "adapter", trainable=True).eval()
        require(torch.equal(self.logits(again), live), "the loaded adapter gives other logits")
        can_generate = self.end_at_a_token_of(model)
        errors = {name: self.merged_error(name, live) for name in ("fp32", "bf16")}
        require(errors["fp32"] <= CLOSE, f"merged in fp32 is {errors['fp32']:.1e} off")
        self.require_one_rounding()
        if can_generate:
            made = self.generate(self.load(self.folder / "fp32")[0])
            require(made == self.wanted, f"generated {made}, wanted {self.wanted}")
        return {"trains": "yes", **errors, "note": "; ".join(self.notes)}

    def save_base(self) -> None:
        """A random checkpoint, norms and biases included, so that every term matters."""
        torch.manual_seed(0)
        auto = self.auto
        if self.kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:  # as these are published
            auto = transformers.AutoModelForImageTextToText
        model = auto.from_config(tiny_config(self.kind), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(self.folder / "base")

    def base(self) -> Any:
        """The base in 4 bits, or with experts and the like beside it."""
        skipped = self.settings.get("modules_to_save", ())  # a copy to train is no code
        quant = QuantConfig(compute_dtype="fp32", skip_modules=skipped)
        quant = replace(quant, allow_unquantized=self.unquantized)
        try:
            return load_base(str(self.folder / "base"), quant, task=self.task)
        except UserError as refusal:
            if self.unquantized or "--allow-unquantized" not in str(refusal):
                raise
            self.unquantized = True
            names = re.findall(r"([\w.]+) \([\d,]+ values\)", str(refusal))
            leaves = sorted({name.rpartition(".")[2] for name in names})
            self.notes.append(f"16-bit: {', '.join(leaves)}")
            return self.base()

    def adapted(self) -> Any:
        """The base with an adapter, every value random."""
        model, settings = self.base(), dict(self.settings)
        if ALL in settings.get("target_modules", ()):
            left_out = heads(model)
            leaves = {n.rpartition(".")[2] for n in linear_layers(model) if not is_in(n, left_out)}
            settings["target_modules"] = (*sorted(leaves), settings["target_modules"][1])
        apply_lora(model, LoraConfig(r=4, lora_alpha=8, **settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model

    def require_gradients(self, model: Any, idle: set[str]) -> None:
        """Forward and backward, plain and as `train` does them: the same, and for every adapter."""
        layers = {
            name: [*layer.parameters_of("default").values()] for name, layer in adapted(model)
        }
        loss = self.backward(model.train())
        require(bool(loss.isfinite()), f"the loss is {loss}")
        lacks = [
            n for n, own in layers.items() if any(p.grad is None or not p.grad.any() for p in own)
        ]
        if new := [name for name in lacks if name not in idle]:
            raise Fault(f"{len(new)} of {len(layers)} layers have no gradient, such as {new[0]}")
        if lacks:
            leaves = sorted({outermost(name, layers.keys() - {*lacks}) for name in lacks})
            self.notes.append(f"no gradient reaches {', '.join(leaves)}, as in transformers")
        used = [p for name, own in layers.items() if name not in lacks for p in own]
        one = torch.cat([p.grad.flatten() for p in used])
        require(bool(one.isfinite().all()), "gradients are not finite")

        fast_loss = self.backward(prepare_for_training(model, self.checkpointing(model)))
        other = torch.cat([p.grad.flatten() for p in used])
        apart = max(
            float((loss - fast_loss).abs() / loss), float((one - other).norm() / one.norm())
        )
        require(apart < GRADIENTS_CLOSE, f"the fast path's loss and gradients are {apart:.1e} off")
        prepare_for_training(model, gradient_checkpointing=False, fast_path=False)

    def checkpointing(self, model: Any) -> bool:
        """Whether the family has gradient checkpointing."""
        if not model.supports_gradient_checkpointing:
            self.notes.append("needs --no-gradient-checkpointing")
        return bool(model.supports_gradient_checkpointing)

    def backward(self, model: Any) -> Tensor:
        """Compute gradients anew; the loss."""
        model.config.use_cache = False  # as in training: xLSTM writes its cache in place
        model.zero_grad()
        torch.manual_seed(0)  # of routers with noise
        loss: Tensor = model(**self.inputs).loss
        loss.backward()
        return loss.detach()

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(**self.inputs).logits).float()

    # ---- the merge ----

    def merged_error(self, name: str, live: Tensor) -> float:
        """Merge, and the norm of the change of logits over theirs."""
        output = self.folder / name
        merge(MergeConfig(str(self.folder / "adapter"), str(output), format=name))
        model, lacks = self.load(output)
        _, known = self.load(self.folder / "base")
        for what in ("missing_keys", "unexpected_keys"):
            new = sorted({*lacks[what]} - {*known[what]})
            require(not new, f"{len(new)} {what} in the merged folder, such as {new[:1]}")
        return float((self.logits(model) - live).norm() / live.norm())

    def load(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """transformers' model of a folder, and what it misses."""
        model, lacks = self.auto.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        return model.eval(), lacks

    def require_one_rounding(self) -> None:
        """The tensors of the bf16 merge are those of the fp32 merge, cast."""
        fp32, bf16 = (
            load_file(self.folder / name / "model.safetensors") for name in ("fp32", "bf16")
        )
        require(fp32.keys() == bf16.keys(), "the merges in fp32 and bf16 hold other tensors")
        differ = [n for n, t in fp32.items() if not torch.equal(t.to(bf16[n].dtype), bf16[n])]
        require(not differ, f"{len(differ)} tensors of bf16 are not rounded once: {differ[:1]}")

    # ---- generation ----

    def generate(self, model: Any, **settings: Any) -> list[int]:
        """Greedy tokens after the first row's prompt."""
        ids = self.inputs["input_ids"][:1, :8]
        made = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8, **settings)
        return made[0].tolist()[0 if self.seq2seq else 8 :]

    def end_at_a_token_of(self, model: Any) -> bool:
        """Make a token that the live adapter generates the base's end token; False without any."""
        try:
            tokens = self.generate(model, eos_token_id=None)
        except Exception as error:  # it does not generate from token ids alone
            self.notes.append(f"generate: {first_line(error)}")
            return False
        self.wanted = tokens[: tokens.index(tokens[3], self.seq2seq) + 1]
        file = self.folder / "base" / "generation_config.json"
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(values | {"eos_token_id": tokens[3]}))
        return True


def outermost(name: str, others: set[str]) -> str:
    """The last word of the largest module around `name` that holds none of `others`."""
    words = name.split(".")
    around = [".".join(words[:i]) for i in range(1, len(words) + 1)]
    return next(a for a in around if not any(is_in(n, [a]) for n in others)).rpartition(".")[2]


def first_line(error: BaseException) -> str:
    """Its type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def attempt(kind: str, adapter: str, limit: float) -> dict[str, Any]:
    """The row of a case, with a traceback if it fails."""
    row: dict[str, Any] = {"type": kind, "adapter": adapter}
    start, said = time.perf_counter(), StringIO()
    try:
        with (
            tempfile.TemporaryDirectory() as folder, time_limit(limit),
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(said), redirect_stderr(said),
        ):  # fmt: skip
            row |= Case(kind, adapter, Path(folder)).run()
    except (Exception, OutOfTime) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, Fault | UserError) else f" ({Path(last.filename).name})"
        row |= {"trains": "FAILS", "note": first_line(error) + place}
        row["traceback"] = traceback.format_exc()
    return row | {"seconds": round(time.perf_counter() - start, 2)}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- all of them ----


def cases(types: Sequence[str]) -> list[tuple[str, str]]:
    """(type, adapter) of the given types, or of all."""
    both = [kind for kind in (*decoders(), *ENCODER_DECODERS) if not types or kind in types]
    return [
        (kind, adapter)
        for kind in both
        for adapter in (ADAPTERS if kind in ENCODER_DECODERS else ["default"])
    ]


def be_quiet() -> None:
    """Set up a process of the pool."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def sweep(types: Sequence[str], workers: int, limit: float) -> list[dict[str, Any]]:
    """The rows of all cases, in their order."""
    rows = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), be_quiet) as pool:
        futures = {pool.submit(attempt, *case, limit): case for case in cases(types)}
        for future in tqdm(as_completed(futures), total=len(futures), desc="Families"):
            rows[futures[future]] = row = future.result()
            if row["trains"] == "FAILS":
                tqdm.write(f"{row['type']}, {row['adapter']}: {row['note']}")
    return [rows[case] for case in futures.values()]


# ---- the table ----


def show(row: Mapping[str, Any]) -> str:
    """The line of a case on the terminal."""
    errors = [f"{row[name]:.0e}" if name in row else "" for name in ("fp32", "bf16")]
    cells = [row["type"], row["adapter"], row["trains"], *errors, row["note"]]
    return "{:25}{:16}{:9}{:>8}{:>8}  {}".format(*cells)


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """The markdown of a sweep: a row for all types of one outcome, with their largest errors."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in cases:
        alike.setdefault((row["adapter"], row["trains"], row["note"]), []).append(row)
    lines = ["| " + " | ".join(head) + " |" for head in (HEAD, ["---"] * len(HEAD))]
    for (adapter, trains, note), rows in alike.items():
        names = f"{', '.join(row['type'] for row in rows)}" + f" ({len(rows)})" * (len(rows) > 1)
        errors = [
            f"{max(row[name] for row in rows):.0e}" if name in rows[0] else ""
            for name in ("fp32", "bf16")
        ]
        lines.append("| " + " | ".join([names, adapter, trains, *errors, note]) + " |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The page's `text` with the table of the last record between the markers."""
    last = (RESULTS / "families.jsonl").read_text("utf-8").splitlines()[-1]
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table(json.loads(last)['cases'])}\n{END}{after}"


def main() -> None:
    """Print the table and record a whole sweep; exit with 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="by default all")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--limit", type=float, default=60, help="seconds of a case")
    parser.add_argument("--traceback", action="store_true", help="show those of failures")
    parser.add_argument("--page", action="store_true", help="only write docs/measured.md anew")
    given = parser.parse_args()
    if given.page:
        PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
        return
    start = time.perf_counter()
    rows = sweep(given.types, given.workers, given.limit)
    seconds = time.perf_counter() - start
    for row in rows:
        stack = row.pop("traceback", "")
        print(show(row) + f"\n{stack}" * given.traceback)
    count = Counter(row["trains"] for row in rows)
    print(f"\n{len(rows)} cases in {seconds:.0f} s: {dict(count)}")
    if not given.types:
        record("families", {"seconds": round(seconds), "cases": rows})
    sys.exit(count["FAILS"] > 0)


if __name__ == "__main__":
    main()
