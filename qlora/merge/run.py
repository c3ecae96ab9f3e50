"""Merge a trained adapter into its base on disk: plan, check, stream.

    W_merged = dequantize(quantize(W)) + scaling * B A      in fp32, then one cast

is, to rounding, the function that was trained: every layer that was quantized in training is
quantized and dequantized here, with or without an adapter. `onto="original"` adds to W itself,
which is another function, unless the adapter was trained on W in 16 bits. For 4 bits
(qlora.merge.codecs), qlora.merge.codes chooses codes for the sum. A GGUF file is made of the 16-bit
checkpoint (qlora.merge.gguf_file), which is removed again.

1. Plan: `plan_merge` decides from file headers how each tensor is computed (`MergeOp`).
2. Check: adapter, base, shapes, disk space, data and tokenizer, before a byte is written.
3. Stream: `apply_op` computes one tensor at a time, and `write_shards` writes it. Memory grows with
   the largest tensor, not with the model. Only calibration and verification load the model.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qlora.adapters.format import AdapterFile, combine, raise_faults, read_adapter
from qlora.adapters.tensors import Contents
from qlora.base.checkpoint import Checkpoint, disk_name, skeleton
from qlora.base.load import require_compressed_tensors
from qlora.base.shards import parse_size, write_shards
from qlora.config import MergeConfig
from qlora.config.tasks import CAUSAL_LM, task_named
from qlora.errors import UserError, some
from qlora.files import (
    GENERATION,
    RUN,
    TEMPLATES,
    publishing,
    read_run_file,
    read_stop_ids,
    require_new,
)
from qlora.merge import gguf_file, modelfile
from qlora.merge.codes import AdaptedWeight, Facts, fold, fold_to_grid
from qlora.merge.grids import Q8_0, IntegerGrid
from qlora.merge.plan import Kind, MergeOp, Plan, as_trained, plan_merge
from qlora.merge.report import MergeReport
from qlora.merge.stops import allows_stops, generation_settings
from qlora.merge.streams import Calibration
from qlora.ops import nf4

# by the names of all tokenizers of transformers; no other JSON, as a base may have a record of its
# quantization, and no pickles
TOKENIZER_FILES = (
    "*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json",
    "tekken.json", "emoji.json", "word_shape.json", "word_pronunciation.json", "byte_maps.json",
    "normalizer.json", "vocab*.txt", "dict.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken",
    "*.codes", "*.tokenizer", "chat_template.json", "*.jinja",
    f"{TEMPLATES}/*.jinja",
)  # fmt: skip
# of the base, as training saves none: also the processors' of images, video and audio
BASE_FILES = ("*processor_config.json", GENERATION, "*.py")


def merge(config: MergeConfig) -> Path:
    """Write the merged checkpoint that `config` describes; returns its folder.

    Raises:
        UserError: adapter and base do not belong together, something is missing, the output
            folder is in use, or the merge keeps less than `min_kept`. Then nothing is written.
    """
    output = Path(config.output_dir).expanduser()
    require_new(output)
    parse_size(config.max_shard_size)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and torch sees no GPU: use --device cpu")
    job = prepare(config)
    with publishing(output) as folder:
        auto = job.config.onto == "auto"
        report = _write_better(job, folder) if auto else _write_one(job, folder)
        if config.min_kept is not None:
            report.verified = verified = report.verified or job.verifier.measure(folder)
            if verified.kept is None:
                raise UserError(
                    "--min-kept needs --verify data on which the adapter lowers the loss; here it "
                    f"is {verified.loss_base:.4f} without and {verified.loss_live:.4f} with it"
                )
            if verified.kept < config.min_kept:
                raise UserError(
                    f"the merged model keeps {verified.kept:.1%} of training's gain in loss, less "
                    f"than --min-kept {config.min_kept}: nothing was written. Use --calibration "
                    "data like the training's, or --format bf16 without --onto"
                )
            report.write(folder)
    report.print_summary(output)
    if job.verifier and report.verified is None:  # already published: a failure costs no merge
        report.verified = job.verifier.measure(output)
        report.write(output)
    report.print_verification()
    return output


@dataclass(frozen=True)
class _Job:
    """A merge whose inputs have been checked."""

    config: MergeConfig
    adapter: AdapterFile
    base_model: str
    checkpoint: Checkpoint
    plan: Plan
    tokenizer_folder: Path
    generation: dict[str, Any]  # generation_config.json; empty: the base's, if it has one
    verifier: Any = None  # a measure.Verifier
    calibration: Calibration | None = None


# ---- plan and check ----


def prepare(config: MergeConfig, *, base_only: bool = False) -> _Job:
    """Plan, and raise every error that the user can fix before a byte is written.

    With `base_only`, the adapter tells how the base was quantized, and changes nothing.
    """
    adapters, weights = map(read_adapter, config.adapters), config.adapters.values()
    adapter = combine([*adapters], [*weights], base_model=config.base_model)
    if base_only:
        adapter = replace(adapter, targets=(), **vars(Contents(pairs={})))
    base_model = config.base_model or adapter.base_model
    if not base_model:
        raise UserError(f"adapter {adapter.folder} names no base model: give --base-model")
    revision = adapter.revision if base_model == adapter.base_model else None
    checkpoint = Checkpoint.open(base_model, revision=revision)
    config = as_trained(config, adapter, checkpoint, base_model)
    if config.format == "int4" and config.verify:
        require_compressed_tensors("--verify: an int4 model")
    if config.is_gguf:
        gguf_file.converter()
        if task_named(adapter.task) is not CAUSAL_LM:
            raise UserError(
                f"--format {config.format} needs a causal language model, adapter "
                f"{adapter.folder} is for {adapter.task}: use --format bf16"
            )
    plan = plan_merge(checkpoint, adapter, config)
    for note in plan.notes:
        print(note)
    calibrates = config.calibration_tokens or config.calibration not in (None, "none")
    flags = ["--verify"] * bool(config.verify) + ["--calibration"] * bool(calibrates)
    if flags and task_named(adapter.task) is not CAUSAL_LM:
        raise UserError(
            f"{' and '.join(flags)} needs a causal language model, adapter {adapter.folder} is for "
            f"{adapter.task}: leave it out"
        )
    _require_space(config, plan)
    tokenizer_folder = adapter.folder if adapter.has_tokenizer else checkpoint.folder
    trusted = config.trust_remote_code
    generation = generation_settings(adapter, checkpoint, tokenizer_folder, trusted)
    running: Any = {"device": config.device, "trust_remote_code": trusted}
    running["in_4_bits"] = config.trained_on == "nf4"
    reading: Any = {"vocabulary": plan.config_changes.get("vocab_size", checkpoint.vocab_size)}
    verifier = calibration = None
    job = _Job(config, adapter, base_model, checkpoint, plan, tokenizer_folder, generation)
    if config.is_gguf:  # before calibration, which takes long
        with TemporaryDirectory() as folder:
            _write_settings(job, Path(folder))
            gguf_file.require_known(Path(folder))
    if config.verify:
        from qlora.merge.measure import GGUF_TOKENS, MAX_TOKENS, Verifier, read_examples

        reads: Any = {"trust_remote_code": trusted, "adapter": adapter.folder}
        reads["max_tokens"] = GGUF_TOKENS if config.is_gguf else MAX_TOKENS
        examples = read_examples(config.verify, tokenizer_folder, **reads, **reading)
        verifier = Verifier(adapter, checkpoint, examples, **running)
    if data := _calibration_data(config, adapter):
        from qlora.merge.measure import calibrate

        running |= {"in_sequence": config.format != "nf4", "tokens": config.calibration_tokens}
        calibration = calibrate(adapter, checkpoint, data, tokenizer_folder, **running, **reading)
    return replace(job, verifier=verifier, calibration=calibration)


def _require_space(config: MergeConfig, plan: Plan) -> None:
    """Refuse a disk that is too small for all that is there at a time."""
    output = Path(config.output_dir).expanduser()
    copies = (2 if config.onto == "auto" else 1) + config.is_gguf  # of a GGUF, in 16 bits first
    needed = sum(entry.nbytes for entry in plan.entries) * copies
    place = output.resolve()
    parent = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free: "
            "free disk space or give another --output-dir"
        )


def _calibration_data(config: MergeConfig, adapter: AdapterFile) -> list[str]:
    """Data for 4-bit codes: the given one, or the training data in the adapters' run.yaml."""
    is_off = not config.chooses_codes or config.calibration == "none"
    if is_off or task_named(adapter.task) is not CAUSAL_LM:
        return []
    if config.calibration:
        return [config.calibration]
    runs = [Path(adapter).expanduser() / RUN for adapter in config.adapters]
    data: dict[str, None] = {}
    for run in runs:
        data |= dict.fromkeys(_training_data(read_run_file(run.parent)))
    if not data:
        print(f"No calibration data: {' and '.join(map(str, runs))} names no existing file. The")
        print("model calibrates on text that it generates; --calibration DATA keeps more.")
    return list(data) or ["self"]


def _training_data(record: Mapping[str, Any]) -> list[str]:
    """The existing files of a run.yaml: where they were found, or else by the names it was given,
    which may be relative to another folder. No names of the hub."""
    for sources in (record.get("data_paths"), record.get("config", {}).get("data")):
        listed = sources if isinstance(sources, list) else [sources]
        named = [source for source in listed if isinstance(source, str)]
        if exist := [source for source in named if Path(source).expanduser().exists()]:
            return exist
    return []


# ---- write a checkpoint ----


def _write_one(job: _Job, folder: Path) -> MergeReport:
    """The merged model in its format, into the empty `folder`."""
    return (_write_gguf if job.config.is_gguf else write_checkpoint)(job, folder)


def _write_gguf(job: _Job, folder: Path) -> MergeReport:
    """A GGUF file of the merged checkpoint, its report, and a Modelfile for Ollama."""
    name = Path(job.config.output_dir).resolve().name
    file = folder / modelfile.file_name(name, job.config.format)
    plain = folder / "work" / name  # the converter names the model like its folder
    plain.mkdir(parents=True)
    report = write_checkpoint(job, plain)
    source = folder / "work" / "16-bit.gguf"
    gguf_file.convert(plain, source)
    if job.config.format == "gguf-bf16":
        source.rename(file)
    else:
        index = gguf_file.Index(_weights(job, plain, report.layers))
        shutil.rmtree(plain)  # before the next large file
        settings = (source, file, job.config.format, index)
        if lost := gguf_file.quantize(*settings, calibrated=bool(job.calibration)):
            print(f"Not in the file, or in another form and rounded to nearest: {some(lost)}")
            for op in job.plan.ops:
                if op.name in lost:
                    report.layers.pop(str(op.module), None)
    shutil.rmtree(folder / "work")
    stops = job.adapter.stop_ids | read_stop_ids(job.checkpoint.folder)
    trusted = job.config.trust_remote_code
    modelfile.write(folder, file, job.tokenizer_folder, job.generation, stops, trusted)
    report.write(folder)
    return report


def _weights(job: _Job, folder: Path, layers: dict[str, Facts]) -> dict[str, gguf_file.Weight]:
    """The weights with an adapter, merged into `folder`; their facts come into `layers`."""
    checkpoint = Checkpoint(folder)

    def rows(op: MergeOp) -> Tensor:
        weight = checkpoint.read(op.name)
        return weight.T if op.transposed else weight

    def choose(op: MergeOp, kind: type[IntegerGrid]) -> IntegerGrid:
        # of 8 bits, rounding to nearest keeps the adapter
        calibration = None if kind is Q8_0 else job.calibration
        moments = calibration and op.module and calibration.of(op.module)
        grid, facts = fold_to_grid(_adapted_weight(job, op), kind, moments or None)
        layers[str(op.module)] = facts
        if job.calibration and op.module:
            job.calibration.chose(op.module, grid.weight.T)
        return grid

    return {
        op.name: gguf_file.Weight(partial(rows, op), partial(choose, op))
        for op in job.plan.ops
        # embeddings have blocks along the other dimension; convolutions are not quantized
        if op.module in job.adapter.pairs and op.module not in job.adapter.embeddings
        if len(op.entries[0].shape) == 2
    }


def write_checkpoint(job: _Job, folder: Path) -> MergeReport:
    """The merged checkpoint with all its files, into the empty `folder`."""
    plan = job.plan
    report = MergeReport(job.config, job.base_model, plan)
    tensors = stream_tensors(job, report.layers)
    write_shards(folder, plan.entries, tensors, max_bytes=parse_size(job.config.max_shard_size))
    _write_settings(job, folder)
    _require_loadable(folder, job)
    report.write(folder)
    return report


def _write_settings(job: _Job, folder: Path) -> None:
    """config.json, the tokenizer's files and what else the checkpoint has beside its tensors."""
    checkpoint, plan = job.checkpoint, job.plan
    left_out = ("quantization_config", "torch_dtype")
    values = {key: value for key, value in checkpoint.config.items() if key not in left_out}
    values["dtype"] = str(plan.out_dtype).removeprefix("torch.")
    stops = job.generation.get("eos_token_id")
    if not allows_stops(checkpoint, stops, job.config.trust_remote_code):
        stops = None
    for part in (values, values.get("text_config") or {}):
        part.update(plan.config_changes)
        if stops and part.get("eos_token_id") is not None:  # some servers read this one
            part["eos_token_id"] = stops
    if plan.codec:
        values["quantization_config"] = plan.codec.settings(plan.dense, plan.dense_on_disk)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    kept = ((job.tokenizer_folder, TOKENIZER_FILES), (checkpoint.folder, BASE_FILES))
    for source, patterns in kept:
        for file in (f for pattern in patterns for f in source.glob(pattern) if f.is_file()):
            place = folder / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
    if job.generation:
        text = json.dumps(job.generation, indent=2) + "\n"
        (folder / GENERATION).write_text(text, encoding="utf-8")
    if job.config.is_gguf:
        modelfile.complete(folder, checkpoint.folder, job.config.trust_remote_code)


def _write_better(job: _Job, folder: Path) -> MergeReport:
    """Merge onto both bases, measure both, and keep the one with the lower loss in `folder`."""
    reports, losses = {}, {}
    for onto in ("nf4", "original"):
        config = replace(job.config, onto=onto)
        one = replace(job, config=config, plan=plan_merge(job.checkpoint, job.adapter, config))
        (folder / onto).mkdir()
        reports[onto] = _write_one(one, folder / onto)
        reports[onto].verified = verified = job.verifier.measure(folder / onto)
        losses[onto] = verified.loss_merged
    better = min(losses, key=losses.__getitem__)
    print(
        f"Loss {losses['nf4']:.4f} onto the dequantized 4-bit base, {losses['original']:.4f} onto "
        f"the original weights: kept --onto {better}."
    )
    for file in (folder / better).iterdir():
        file.rename(folder / file.name)
    for onto in reports:
        shutil.rmtree(folder / onto)
    reports[better].write(folder)
    return reports[better]


def _require_loadable(folder: Path, job: _Job) -> None:
    """Raise unless the new files hold the parameters of the new config.json's model."""
    plan, written, trusted = job.plan, Checkpoint(folder), job.config.trust_remote_code
    model = skeleton(folder, task=task_named(plan.task), trust_remote_code=trusted)
    known, faults = {op.param for op in plan.ops}, []
    known |= {f"{module}.weight" for group in plan.tied for module in group}

    def in_codes(param: str) -> str | None:
        name = disk_name(job.checkpoint, model, param)
        return name if name in plan.in_4_bits else None

    names: dict[Any, list[str]] = {}  # those of one tied parameter together
    for param, expected in model.named_parameters(remove_duplicate=False):
        names.setdefault(expected, []).append(param)
    for expected, params in names.items():
        places = {param: disk_name(written, model, param) or in_codes(param) for param in params}
        if not any(places.values()):
            needed = [p for p in params if p in known or disk_name(job.checkpoint, model, p)]
            faults += [f"{param} is missing" for param in needed[:1]]
        for param, place in places.items():
            if place is None or place in plan.in_4_bits:
                continue
            if (shape := written.tensors[place].shape) != expected.shape:
                faults.append(f"{param} is {shape}, its config.json says {tuple(expected.shape)}")
    raise_faults(
        "the merged checkpoint does not fit its config.json", faults,
        fix="Nothing was written. The base's own files may not fit theirs",
    )  # fmt: skip


# ---- stream the tensors ----


def stream_tensors(job: _Job, layers: dict[str, Facts]) -> Iterator[Tensor]:
    """The tensors in the order of `plan.entries`; facts of adapted layers are added to `layers`."""
    for op in job.plan.ops:
        tensors, facts = apply_op(job, op)
        if op.module:
            layers[op.module] = facts
        while tensors:
            yield tensors.pop(0)  # freed as soon as it is written


def apply_op(job: _Job, op: MergeOp) -> tuple[list[Tensor], Facts]:
    """The tensors of one operation, on the CPU, and facts for the report."""
    if op.in_4_bits and job.plan.codec:
        calibration = job.calibration if op.module else None
        moments = calibration.of(str(op.module)) if calibration else None
        record, facts, chosen = job.plan.codec.encode(_adapted_weight(job, op), moments)
        if calibration and chosen is not None:
            calibration.chose(str(op.module), chosen)
        return [record[entry.name.removeprefix(op.name)].cpu() for entry in op.entries], facts
    (entry,) = op.entries
    if op.kind is Kind.COPY:
        tensor = _read(job, op)
        return [_finite(tensor.to("cpu", entry.dtype), entry.name, base=tensor)], {}
    # (out, in); of a convolution (out, in * kernel)
    weight, facts = fold(_adapted_weight(job, op), entry.dtype)
    tensor = weight.T if op.transposed else weight.view(entry.shape)
    return [_finite(tensor.to("cpu", entry.dtype), entry.name)], facts


def _adapted_weight(job: _Job, op: MergeOp) -> AdaptedWeight:
    """The base weight of `op` by its kind, with A and B, on the device."""
    device, quant = job.config.device, job.plan.quant
    factors = job.adapter.pairs[op.module].to(device) if op.module else None
    original = None
    if op.kind is Kind.PACKED:
        record = job.checkpoint.record(op.source)
        assert record is not None
        codes = nf4.from_record(record, device)
    else:
        original = _finite(_read(job, op).to(device), op.name)
        original = original.T if op.transposed else original.flatten(1)  # (out, in * kernel)
        if op.kind is Kind.WEIGHT:
            return AdaptedWeight(original, factors, original=original)
        # Loading casts to the compute dtype before it quantizes, which changes an fp32 base's codes
        original = original.to(nf4.DTYPES.get(quant.compute_dtype, original.dtype))
        if initial := job.adapter.subtracted.get(op.module or ""):  # see qlora.adapters.rebase
            part = initial.to(device).change(original)  # is not quantized with the rest
            base = nf4.round_trip(original.float() - part, quant).add_(part)
            return AdaptedWeight(base, factors, original=original)
        codes = nf4.quantize(original, quant)
    return AdaptedWeight(None, factors, codes, original)


def _read(job: _Job, op: MergeOp) -> Tensor:
    """The tensor of `op`, with the adapter's full parameters, bias changes and token rows."""
    adapter = job.plan.adapter
    value = adapter.full_params.get(op.param) if op.param else None
    if value is None:
        value = job.checkpoint.read(op.source)
    module, _, leaf = (op.param or "").rpartition(".")
    if leaf == "bias" and module in adapter.bias_changes:
        value = value.float() + adapter.bias_changes[module]
    if leaf == "weight" and module in adapter.rows:
        ids, rows = adapter.rows[module]
        value = value.float().index_copy(0, ids, rows.float())  # (vocab, dim)
    return value


def _finite(tensor: Tensor, name: str, *, base: Tensor | None = None) -> Tensor:
    """`tensor`; raises if it holds NaN, or infinity where `base` does not: Gemma 4's bounds do."""
    if not tensor.is_floating_point() or all(map(torch.isfinite, torch.aminmax(tensor))):
        return tensor
    if base is None or not torch.equal(~tensor.isfinite(), base.isinf().cpu()):
        raise UserError(
            f"{name} has NaN, or values beyond the range of {tensor.dtype}: use --format bf16 or "
            "fp32; if the base itself has NaN, download it again"
        )
    return tensor
