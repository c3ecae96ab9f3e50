"""Write an adapter and its base for servers that keep them apart: `python -m qlora.portable`.

    --gguf              the adapter as a LoRA-GGUF, by llama.cpp's convert_lora_to_gguf.py, fp32
    --base-only         the base as it was in training, dequantize(quantize(W)), in 16 bits
    --base-only --gguf  the same as a GGUF file of bf16

An adapter was trained on the 4-bit base. A server that adds it to the original weights computes
another function than the one that was trained; one that adds it to this base computes that one, to
the rounding of its dtype. The base is that of a merge without A and B, and serves every adapter
that was trained on the same base with the same quantization.
"""

import json
import shlex
import tempfile
from pathlib import Path

from qlora.adapters.format import CONFIG, WEIGHTS, AdapterFile, read_adapter, read_files
from qlora.adapters.portable import make_portable, portable_subset, save_tensors
from qlora.base.checkpoint import resolve
from qlora.config import MergeConfig, PortableConfig
from qlora.config.tasks import task_named
from qlora.errors import UserError, require
from qlora.files import MERGE_REPORT, front_matter, publishing, require_new
from qlora.merge import gguf_file
from qlora.merge.run import prepare, write_checkpoint

LORA_CONVERTER = "convert_lora_to_gguf.py"  # beside the models'
ADAPTER_FILE, BASE_FILE = "adapter.gguf", "base.gguf"


def export(config: PortableConfig) -> None:
    """Write what `config` asks for; see the module.

    Raises:
        UserError: the adapter cannot be read, A and B cannot express it, or llama.cpp does not know
            the model. Then nothing is written.
    """
    if not (config.gguf or config.base_only):
        make_portable(config)
        return
    assert config.output_dir  # PortableConfig.faults
    output = Path(config.output_dir).expanduser()
    require_new(output)
    if config.gguf:
        gguf_file.converter()  # raises if it is missing
    if config.base_only:
        _export_base(config, output)
    else:
        _export_adapter(config, output)


def _export_adapter(config: PortableConfig, output: Path) -> None:
    folder = Path(config.adapter).expanduser()
    values, tensors, metadata = read_files(folder)
    values, tensors = portable_subset(values, tensors, folder)
    base = config.base_model or values.get("base_model_name_or_path")
    require(bool(base), f"adapter {folder} names no base model: give --base-model")
    revision = None if config.base_model else values.get("revision")
    base_folder = resolve(str(base), revision=revision, weights=False)
    with publishing(output) as partial, tempfile.TemporaryDirectory() as work:
        save_tensors(tensors, Path(work) / WEIGHTS, metadata)
        (Path(work) / CONFIG).write_text(json.dumps(values), encoding="utf-8")
        convert_adapter(Path(work), base_folder, partial / ADAPTER_FILE)
    print(f"Written to {output}. Use it on the base that --base-only --gguf writes:")
    print(f"  llama-server -m {BASE_FILE} --lora {shlex.quote(str(output / ADAPTER_FILE))}")


def convert_adapter(folder: Path, base: Path, output: Path) -> None:
    """Write the portable adapter in `folder`, of the base whose config.json is in `base`, as GGUF.

    Raises:
        UserError: llama.cpp does not know the architecture, or one of its layers.
    """
    require((base / "config.json").is_file(), f"{base} holds no config.json: give --base-model")
    script = gguf_file.converter().with_name(LORA_CONVERTER)
    of_base = ("--base", str(base))
    gguf_file.run_converter(script, folder, output, *of_base, what="adapter", fix="merge it")


def _export_base(config: PortableConfig, output: Path) -> None:
    adapter = read_adapter(config.adapter)
    if adapter.subtracted:
        raise UserError(
            f"adapter {adapter.folder} was trained on a base that its initialisation had changed, "
            "which no other adapter shares: merge it instead"
        )
    if task_named(adapter.task).trains_head:
        raise UserError(f"adapter {adapter.folder} brings its head ({adapter.task}): merge it")
    is_fp16 = adapter.quantization.compute_dtype == "fp16" and not config.gguf
    job = prepare(
        MergeConfig(
            adapter=config.adapter,
            output_dir=str(output),
            base_model=config.base_model,
            format="fp16" if is_fp16 else "bf16",
            trust_remote_code=config.trust_remote_code,
        ),
        base_only=True,
    )
    with publishing(output) as partial, tempfile.TemporaryDirectory(dir=partial) as work:
        folder = Path(work) / output.resolve().name if config.gguf else partial
        folder.mkdir(exist_ok=True)
        write_checkpoint(job, folder)
        (folder / MERGE_REPORT).unlink()
        if config.gguf:
            gguf_file.convert(folder, partial / BASE_FILE)
        (partial / "README.md").write_text(_card(job.base_model, adapter), encoding="utf-8")
    place = shlex.quote(str(output))
    print(f"Written to {output}: the base as it was in training. Use it:")
    if config.gguf:
        print(f"  llama-server -m {shlex.quote(str(output / BASE_FILE))} --lora {ADAPTER_FILE}")
    else:
        lora = f"--lora-modules NAME={shlex.quote(config.adapter)}"
        rank = max((len(factors.lora_A) for factors in adapter.pairs.values()), default=16)
        print(f"  vllm serve {place} --enable-lora --max-lora-rank {max(16, rank)} {lora}")


def _card(base_model: str, adapter: AdapterFile) -> str:
    quant = adapter.quantization
    return f"""{front_matter(base_model, "transformers", "qlora")}
# {Path(base_model).name}, as QLoRA adapters are trained on it

Its linear layers were quantized to {quant.quant_type.upper()} (blocksize {quant.blocksize},
{"with" if quant.double_quant else "without"} double quantization) and dequantized. This is the base
that QLoRA adapters with these settings were trained on: serve them on it.
"""
