"""Fold a trained adapter into its base: plan, check, stream.

    merged = dequantize(quantize(W)) + scaling * B A      in fp32, then one cast

is, to rounding, the function that was trained: every quantized layer goes through the same 4-bit
codes as in training, also those without an adapter. `onto="original"` folds into the weights as
they were before quantization; the adapter never saw those, so that is another function. For
`format="nf4"` qlora.merge.codes finds 4-bit codes for the sum.

`plan_merge` decides from file headers alone what happens to each tensor, and every shape is
checked before a byte is written. Then tensors go through one at a time, in fp32, into shards: no
model is built, and memory grows with the largest tensor, not with the model. (Two things do build
one, when asked for: calibration of the 4-bit output, and verification.)

The tensors of a merged checkpoint, one after the other, as a plan says.

Choosing 4-bit codes is slow and full of small steps, which a second core hardly helps along; so on
a CPU several weights are worked on at a time, each by one thread.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from qlora.adapters.format import AdapterFile, combine, raise_faults, read_adapter
from qlora.base.checkpoint import Checkpoint, disk_name, skeleton
from qlora.base.shards import Entry, parse_size, write_shards
from qlora.config import MergeConfig
from qlora.config.tasks import CAUSAL_LM, task_named
from qlora.errors import UserError
from qlora.files import RUN, publishing, require_new
from qlora.merge.plan import Plan, check_base, plan_merge
from qlora.merge.report import MergeReport

if TYPE_CHECKING:
    from qlora.merge.measure import Verification, Verifier
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from qlora.config import QuantConfig
from qlora.merge.codes import Facts, Folding, in_4_bits, in_full
from qlora.merge.plan import MergeOp
from qlora.ops import nf4

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def merge(config: MergeConfig) -> Path:
    """Write the merged checkpoint that `config` describes; returns its folder.

    Raises:
        UserError: adapter and base do not belong together, something is missing, the output
            folder is in use, or less is kept than `min_kept` asks for. Then nothing is written.
    """
    output = Path(config.output_dir).expanduser()
    require_new(output)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU: use --device cpu")
    job = _prepare(config)
    with publishing(output) as partial:
        report = _write_better(job, partial) if config.onto == "auto" else _write(job, partial)
        if config.min_kept is not None:
            report.verified = report.verified or job.measure(partial)
            _require_kept(report.verified, config.min_kept)
            report.write(partial)
    report.print_summary(output)
    if job.verifier and report.verified is None:  # published by now: failing costs no merge
        report.verified = job.measure(output)
        report.write(output)
    report.print_verification()
    return output


@dataclass(frozen=True)
class _Job:
    """What a merge works with, all of it checked."""

    config: MergeConfig
    adapter: AdapterFile
    base_model: str
    checkpoint: Checkpoint
    plan: Plan
    tokenizer_folder: Path
    verifier: "Verifier | None"
    moments: Callable[[str], Tensor] | None

    def measure(self, folder: Path) -> "Verification":
        assert self.verifier is not None
        return self.verifier.measure(folder)


def _prepare(config: MergeConfig) -> _Job:
    """Whatever the user can mend goes wrong here, before a byte is written."""
    adapter = combine([read_adapter(a) for a in config.adapters], [*config.adapters.values()])
    base_model = config.base_model or adapter.base_model
    if not base_model:
        raise UserError(f"adapter {adapter.folder} names no base model: give --base-model")
    revision = adapter.revision if base_model == adapter.base_model else None
    checkpoint = Checkpoint.open(base_model, revision=revision)
    if not adapter.knows_quantization:
        print("The adapter does not say how its base was quantized: taken as NF4, blocksize 64, ")
        print("double quantization, as transformers and PEFT load it for QLoRA.")
    check_base(checkpoint, adapter, config)
    _require_text_model(config, adapter)
    plan = plan_merge(checkpoint, adapter, config)
    _require_space(config, plan.entries)
    tokenizer_folder = _tokenizer_folder(checkpoint, adapter)
    running: Any = {"device": config.device, "trust_remote_code": config.trust_remote_code}
    verifier = None
    if config.verify:
        from qlora.merge.measure import Verifier, read_examples

        examples = read_examples(config.verify, tokenizer_folder)
        verifier = Verifier(adapter, str(checkpoint.folder), examples, **running)
    data = _calibration_data(config) if task_named(adapter.task) is CAUSAL_LM else []
    moments = None
    if data:
        from qlora.merge.measure import calibrate

        source = str(checkpoint.folder)
        moments = calibrate(adapter, source, data, tokenizer_folder, **running).of
    return _Job(config, adapter, base_model, checkpoint, plan, tokenizer_folder, verifier, moments)


def _write(job: _Job, folder: Path) -> MergeReport:
    """The merged checkpoint with everything that belongs to it, into the empty `folder`."""
    report = MergeReport(job.config, job.base_model, job.plan)
    tensors = merged_tensors(
        job.checkpoint, job.adapter, job.plan, job.config.device, job.moments, report.layers
    )
    write_shards(folder, job.plan.entries, tensors, max_bytes=parse_size(job.config.max_shard_size))
    _copy_companions(job.checkpoint, job.tokenizer_folder, job.plan, job.config, folder)
    _require_loadable(folder, job)
    report.write(folder)
    return report


def _write_better(job: _Job, folder: Path) -> MergeReport:
    """Both ways, each measured, and the one with the lower loss into `folder`."""
    reports = {}
    for onto in ("nf4", "original"):
        config = replace(job.config, onto=onto)
        one = replace(job, config=config, plan=plan_merge(job.checkpoint, job.adapter, config))
        (folder / onto).mkdir()
        reports[onto] = _write(one, folder / onto)
        reports[onto].verified = job.measure(folder / onto)
    losses = {onto: report.verified.loss_merged for onto, report in reports.items()}  # type: ignore[union-attr]
    better = min(losses, key=losses.__getitem__)
    print(
        f"Loss {losses['nf4']:.4f} onto the dequantized 4-bit base, {losses['original']:.4f} onto "
        f"the original weights: taken is {better}, the lower."
    )
    for onto in reports:
        for file in (folder / onto).iterdir():
            file.rename(folder / file.name) if onto == better else file.unlink()
        (folder / onto).rmdir()
    reports[better].write(folder)
    return reports[better]


def _calibration_data(config: MergeConfig) -> list[str]:
    """What to choose 4-bit codes with: the data given, or else what the adapters learned from."""
    if config.format != "nf4" or config.calibration == "none":
        return []
    if config.calibration:
        return [config.calibration]
    runs = [Path(adapter).expanduser() / RUN for adapter in config.adapters]
    data = dict.fromkeys(found for run in runs if (found := _training_data(run)))
    if not data:
        print(
            f"No data to calibrate with: {' and '.join(map(str, runs))} names none that is there. "
            "The model reads text that it writes itself; --calibration DATA keeps more."
        )
    return list(data) or ["self"]


def _training_data(path: Path) -> str | None:
    """The file or folder that was trained on, as a run.yaml tells, if it is still there.

    Names of the hub are left alone: nothing is downloaded that nobody asked for.
    """
    if not path.is_file():
        return None
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = run.get("config", {}).get("data") if isinstance(run, dict) else None
    return data if isinstance(data, str) and Path(data).expanduser().exists() else None


def _require_kept(verified: "Verification", min_kept: float) -> None:
    if verified.kept is None:
        raise UserError(
            "--min-kept asks how much of the gain is kept, but on this --verify data the adapter "
            f"gains nothing: loss {verified.loss_base:.4f} without, {verified.loss_live:.4f} with "
            "it. Give data like the training's"
        )
    if verified.kept < min_kept:
        raise UserError(
            f"the merged model keeps {verified.kept:.1%} of what training gained, --min-kept "
            f"{min_kept} wants more: nothing was written. Give --calibration data like the "
            "training's, or merge to --format bf16 --onto nf4"
        )


def _require_text_model(config: MergeConfig, adapter: AdapterFile) -> None:
    """Refuse to verify or calibrate with what does not write text."""
    if task_named(adapter.task) is CAUSAL_LM:
        return
    for name in ("verify", "calibration"):
        if getattr(config, name) not in (None, "none"):
            raise UserError(
                f"--{name} runs a causal language model over text, and adapter {adapter.folder} is "
                f"for {adapter.task}: leave it out"
            )


# ---- check and apply ----


def _require_space(config: MergeConfig, entries: list[Entry]) -> None:
    output = Path(config.output_dir).expanduser()
    needed = sum(entry.nbytes for entry in entries) * (2 if config.onto == "auto" else 1)
    parent = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free: "
            "make room or give another --output-dir"
        )


def _require_loadable(folder: Path, job: _Job) -> None:
    """The model that the new config.json describes finds its parameters in the new files."""
    written = Checkpoint(folder)
    model = skeleton(folder, task=job.plan.task, trust_remote_code=job.config.trust_remote_code)
    faults = []
    for param, wanted in model.named_parameters():
        place = disk_name(written, model, param)
        if place is None and (param in job.plan.placed or disk_name(job.checkpoint, model, param)):
            faults.append(f"{param} is missing")
        elif place is not None and place not in job.plan.coded:
            shape = written.tensors[place].shape
            if shape != tuple(wanted.shape):
                faults.append(f"{param} is {shape}, its config.json says {tuple(wanted.shape)}")
    raise_faults(
        "the merged checkpoint does not make a model", faults,
        mend="Nothing was written. The base's own files may not fit its config.json",
    )  # fmt: skip


# ---- what goes beside the weights ----


def _copy_companions(
    checkpoint: Checkpoint, tokenizer_folder: Path, plan: Plan, config: MergeConfig, output: Path
) -> None:
    """config.json that says what the weights now are, and the tokenizer's files byte for byte."""
    values = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    values.pop("torch_dtype", None)
    values["dtype"] = str(plan.out_dtype).removeprefix("torch.")
    for part in (values, values.get("text_config") or {}):
        part.update(plan.config_changes)
    if config.format == "nf4":
        values["quantization_config"] = _quantization_config(plan)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        file = tokenizer_folder / name
        if file.is_file():
            shutil.copyfile(file, output / name)
    for file in [checkpoint.folder / "generation_config.json", *checkpoint.folder.glob("*.py")]:
        if file.is_file():
            shutil.copyfile(file, output / file.name)


def _quantization_config(plan: Plan) -> dict[str, Any]:
    """What transformers writes for a bitsandbytes 4-bit model."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=plan.out_quant.quant_type,
        bnb_4bit_use_double_quant=plan.out_quant.double_quant,
        bnb_4bit_compute_dtype=plan.out_dtype,
        llm_int8_skip_modules=[m for m, name in plan.linear.items() if name not in plan.coded],
    )
    return dict(settings.to_dict())


def _tokenizer_folder(checkpoint: Checkpoint, adapter: AdapterFile) -> Path:
    """Where training left the tokenizer it used, else the base's own."""
    return adapter.folder if adapter.has_tokenizer else checkpoint.folder


Result = TypeVar("Result")
MAX_WORKERS = 8


def merged_tensors(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    plan: Plan,
    device: str,
    moments: Callable[[str], Tensor] | None,
    layers: dict[str, Facts],
) -> Iterator[Tensor]:
    """The output's tensors in the order of `plan.entries`; facts of adapted layers go to `layers`.

    Args:
        moments: gives an adapted layer's sum of x x' over its inputs, for a 4-bit output.
    """

    def tasks() -> Iterator[Callable[[], tuple[list[Tensor], Facts]]]:
        for op in plan.ops:
            # Here and not in the task: gathering moments runs the model, on all threads.
            known = moments(op.module) if moments and op.module and op.in_4_bits else None
            yield partial(_fold, checkpoint, adapter, plan, op, device, known)

    slow = device == "cpu" and any(op.module and op.in_4_bits for op in plan.ops)
    workers = min(torch.get_num_threads(), MAX_WORKERS) if slow else 1
    for op, (done, found) in zip(plan.ops, _in_turn(tasks(), workers), strict=True):
        if op.module:
            layers[op.module] = found
        while done:
            yield done.pop(0)  # held no longer than it takes to write it


def _in_turn(tasks: Iterable[Callable[[], Result]], workers: int) -> Iterator[Result]:
    """What each task returns, in their order; `workers` run at a time, a few ahead of the turn."""
    if workers == 1:
        for task in tasks:
            yield task()
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    ahead: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(task))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _fold(
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    plan: Plan,
    op: MergeOp,
    device: str,
    moments: Tensor | None,
) -> tuple[list[Tensor], Facts]:
    """What is written for one weight, on the CPU, and what is to be reported of it."""
    if not (op.module or op.round_trip or op.packed or op.in_4_bits):
        (entry,) = op.entries
        return [_cast(_value(checkpoint, adapter, op), entry)], {}
    folding = _read(checkpoint, adapter, op, plan.quant, device)
    if op.in_4_bits:
        quantized, found = in_4_bits(folding, plan.out_quant, moments)
        quantized.state.dtype = plan.out_dtype
        record = nf4.to_record(quantized)
        suffixes = [entry.name.removeprefix(op.name).lstrip(".") for entry in op.entries]
        return [record[suffix].cpu() for suffix in suffixes], found
    (entry,) = op.entries
    weight, found = in_full(folding, entry.dtype)
    weight = weight.T if op.transposed else weight.view(entry.shape)  # of a convolution: as it was
    return [_cast(weight, entry)], found


def _read(
    checkpoint: Checkpoint, adapter: AdapterFile, op: MergeOp, quant: QuantConfig, device: str
) -> Folding:
    """The weight of `op`, with what the adapter adds to it, on `device`."""
    factors = adapter.pairs[op.module].to(device) if op.module else None
    if op.packed:
        record = checkpoint.record(op.source)
        assert record is not None
        codes = nf4.from_record(record, device)
        return Folding(factors=factors, codes=codes)
    weight = _value(checkpoint, adapter, op).to(device)
    _require_finite(weight, op.name)
    weight = weight.T if op.transposed else weight.flatten(1)
    if not op.round_trip:
        return Folding(weight, factors, original=weight)
    # Loading casts to the compute dtype before it quantizes; of a bf16 checkpoint this is no cast.
    weight = weight.to(nf4.DTYPES.get(quant.compute_dtype, weight.dtype))
    taken = adapter.subtracted.get(op.module) if op.module else None
    if taken is None:
        codes = nf4.quantize(weight, quant)
        return Folding(None, factors, codes, original=weight)
    # the base was quantized without it, and the adapter is a change of the two together
    part = taken.to(device).change(weight)
    base = nf4.round_trip(weight.float() - part, quant).add_(part)
    return Folding(base, factors, original=weight)


def _value(checkpoint: Checkpoint, adapter: AdapterFile, op: MergeOp) -> Tensor:
    """The tensor of `op` with what the adapter puts in its place, or adds but for A and B."""
    if op.param is None:
        return checkpoint.read(op.source)
    value = adapter.full_params.get(op.param)
    if value is None:
        value = checkpoint.read(op.source)
    module, _, kind = op.param.rpartition(".")
    if kind == "bias" and module in adapter.bias_changes:
        value = value.float() + adapter.bias_changes[module]
    if kind == "weight" and module in adapter.rows:
        ids, rows = adapter.rows[module]
        value = value.float().index_copy(0, ids, rows.float())
    return value


def _cast(tensor: Tensor, entry: Entry) -> Tensor:
    out = tensor.to("cpu", entry.dtype)
    _require_finite(out, entry.name)
    return out


def _require_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise UserError(
            f"{name} does not fit {tensor.dtype}: it holds NaN, or values beyond its range. "
            "Use --format bf16 or fp32; if the base itself holds NaN, download it again"
        )
