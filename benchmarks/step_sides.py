"""The sides of the step benchmark: ours, PEFT, TRL, Unsloth and dense, each as its users run it.

A side is a model prepared for training, and a function that computes its loss on a batch of ids
(rows, length), every token of which has a label. The rest of the step (backward, clipping,
optimizer) is the same for all: benchmarks/step_runner.py.

    ours             load_base, apply_lora, prepare_for_training
    ours-offloading  the same, with the embedding and the checkpoints in host memory
    ours-triton      the same as ours, with Triton's decoding where ours has bitsandbytes'
    peft             get_peft_model on the same base; in 16 bits under autocast with fp32 adapters,
                     which is what Trainer does with bf16=True
    trl              TRL's SFTTrainer on the same base: its loss without logits, its bf16 adapters
    liger            the same with Liger's kernels, as its use_liger_kernel has them
    unsloth          FastLanguageModel, which loads the checkpoint itself
    dense            the limit of torch's own layers: the same weights, dequantized, frozen,
                     without adapters

`ours, no X` is ours without the part X, one of PARTS.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.adapters.apply import apply_lora
from qlora.adapters.lora import LoRALinear
from qlora.adapters.targets import target_layers
from qlora.adapters.wrappers import base_modules, put_module
from qlora.base.load import load_base
from qlora.base.modules import as_dense, dense_weight, is_quantized
from qlora.config import LoraConfig, QuantConfig
from qlora.fast.head import put_language_head
from qlora.fast.layers import MLPBlock, Rotary, SharedInput, put_norms, use_fast_path
from qlora.fast.offload import offload_activations, offload_embedding
from qlora.ops import nf4
from qlora.training import prepare_for_training


@dataclass(frozen=True)
class Setup:
    """The settings that all sides share."""

    base: str
    """a folder that load_base takes"""
    seq: int
    batch: int = 1
    r: int = 16
    dtype: str = "auto"
    checkpointing: bool = True
    device: str = "cpu"
    threads: int = 1
    allocator_bytes: int | None = None
    """limit of torch's allocator on the GPU"""
    seed: int = 0

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(r=self.r, lora_alpha=2 * self.r)

    @property
    def quant(self) -> QuantConfig:
        return QuantConfig(compute_dtype=self.dtype)


class Side(NamedTuple):
    """A model prepared for training."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    """of ids (rows, length), the loss"""


def plain(model: Any, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Side:
    """A side whose model computes its own loss."""

    def forward(ids: Tensor) -> Tensor:
        with context():
            loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return Side(model, forward)


def base_of(setup: Setup) -> Any:
    """The frozen 4-bit model."""
    return load_base(setup.base, setup.quant, device=setup.device)


# ---- ours, and ours without one part ----


def prepared(model: Any, setup: Setup, *, left_out: Collection[str] = ()) -> Any:
    """As prepare_for_training does, without some of PARTS."""
    everything = not set(left_out) - {"checkpointing"}
    checkpointing = setup.checkpointing and "checkpointing" not in left_out
    prepare_for_training(model, gradient_checkpointing=checkpointing, fast_path=everything)
    if "oneDNN" in left_out:
        torch.backends.mkldnn.enabled = False  # of all that is in this process
    if everything or "fast path" in left_out:
        return model
    if "loss without logits" not in left_out:
        put_language_head(model)
    if "norms" not in left_out:
        put_norms(model)
    if "layer functions" not in left_out:
        use_fast_path(model, recompute=checkpointing)
    for name, module in base_modules(model).items():
        if "MLP blocks" in left_out and isinstance(module, MLPBlock):
            put_module(model, name, module.base_layer)
        if "rotary" in left_out and isinstance(module, Rotary):
            put_module(model, name, module.base_layer)
        if "groups" in left_out and isinstance(module, LoRALinear):
            module.fast = SharedInput([module])
        if "kept weights" in left_out and isinstance(getattr(module, "fast", None), SharedInput):
            module.fast.slots.clear()
    return model


PARTS = (
    "fast path",
    "layer functions",
    "groups",
    "MLP blocks",
    "loss without logits",
    "norms",
    "rotary",
    "kept weights",
    "oneDNN",
    "checkpointing",
)
"""parts that --ablate turns off: the whole fast path, then each of its parts"""


def ours(setup: Setup, left_out: Collection[str] = ()) -> Side:
    """This project's model."""
    return plain(prepared(apply_lora(base_of(setup), setup.lora), setup, left_out=left_out))


def offloading(setup: Setup) -> Side:
    """Ours with activations and embedding in host memory; needs a GPU."""
    model = ours(setup).model
    if not model.config.tie_word_embeddings:
        offload_embedding(model)
    if not setup.checkpointing:
        return plain(model)
    offload = offload_activations()
    return plain(model, lambda: offload)


def decoding_by_triton(setup: Setup) -> Side:
    """Ours with weights decoded by Triton's kernel; needs a GPU."""
    nf4.GPU_DECODER = "triton"  # of all that is in this process
    return ours(setup)


def without(part: str) -> str:
    """The name of that side."""
    return f"ours, no {part}"


# ---- peers ----


def peft(setup: Setup) -> Side:
    """PEFT's model."""
    model = base_of(setup)
    made = with_checkpointing(peft_model(model, setup), setup)
    made.config.use_cache = False
    made.train()
    return plain(made, lambda: autocast(model.dtype, setup.device))


def peft_model(model: Any, setup: Setup) -> Any:
    """get_peft_model with the same targets."""
    from peft import get_peft_model

    return get_peft_model(model, pefts_config(model, setup))


def pefts_config(model: Any, setup: Setup) -> Any:
    """The same adapter as a PEFT config."""
    import peft

    targets = target_layers(model, setup.lora)
    return peft.LoraConfig(
        r=setup.r, lora_alpha=2 * setup.r, target_modules=targets, task_type="CAUSAL_LM"
    )


def with_checkpointing(model: Any, setup: Setup) -> Any:
    """Turn on checkpointing as PEFT's users do."""
    if not setup.checkpointing:
        return model
    model.enable_input_require_grads()
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    return model


def autocast(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """The autocast that Trainer uses for 16-bit computation."""
    return torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()


def trl(setup: Setup, *, use_liger_kernel: bool = False) -> Side:
    """SFTTrainer's model and loss without its loop, after the set-up in its train()."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = base_of(setup)
    if use_liger_kernel:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)  # TRL has its own
    in_16_bits = model.dtype != torch.float32
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=setup.batch,
        gradient_checkpointing=setup.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=in_16_bits and model.dtype == torch.bfloat16,
        fp16=in_16_bits and model.dtype == torch.float16,
        use_cpu=setup.device == "cpu",
        max_length=setup.seq,
        report_to="none",
    )
    row = {"input_ids": [2] * setup.seq, "labels": [2] * setup.seq}
    trainer = SFTTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list([row] * setup.batch),
        processing_class=any_tokenizer(),
        peft_config=pefts_config(model, setup),
    )
    wrapped = trainer.accelerator.prepare_model(with_checkpointing(trainer.model, setup).train())

    def forward(ids: Tensor) -> Tensor:
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(wrapped, batch)
        return loss

    return Side(trainer.model, forward)


def any_tokenizer() -> Any:
    """A tokenizer, for trainers that need one although the rows are ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "a": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def unsloth(setup: Setup) -> Side:
    """Unsloth's model, with its own checkpointing where checkpointing is on."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        setup.base, max_seq_length=setup.seq, load_in_4bit=True, dtype=None
    )
    leaves = {name.rpartition(".")[2] for name in target_layers(model, setup.lora)}
    made = FastLanguageModel.get_peft_model(
        model,
        r=setup.r,
        lora_alpha=2 * setup.r,
        target_modules=sorted(leaves),
        use_gradient_checkpointing="unsloth" if setup.checkpointing else False,
    )
    return plain(FastLanguageModel.for_training(made) or made)


def dense(setup: Setup) -> Side:
    """The same weights in the compute dtype, without decoding, adapters or optimizer."""
    model = base_of(setup)
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            model.set_submodule(name, as_dense(layer, dense_weight(layer).to(model.dtype)))
    model.enable_input_require_grads()  # gradients flow to the first layer, as with adapters
    return plain(prepared(model, setup, left_out=["fast path"]))


# ---- by name ----

SIDES: dict[str, Callable[[Setup], Side]] = {
    "ours": ours,
    "ours-offloading": offloading,
    "ours-triton": decoding_by_triton,
    "peft": peft,
    "dense": dense,
    "trl": trl,
    "liger": lambda setup: trl(setup, use_liger_kernel=True),
    "unsloth": unsloth,
}
NEEDS = {"trl": ["trl"], "liger": ["trl", "liger_kernel"], "unsloth": ["unsloth"]}


def make_side(name: str, setup: Setup) -> Side:
    """The side of that name, with the shared initial adapter."""
    side = SIDES[name](setup) if name in SIDES else ours(setup, [name.removeprefix(without(""))])
    draw_adapter(side.model, setup.seed)
    return side


def missing(name: str) -> list[str]:
    """The side's packages that are not installed."""
    return [p for p in NEEDS.get(name, []) if importlib.util.find_spec(p) is None]


@torch.no_grad()
def draw_adapter(model: nn.Module, seed: int) -> None:
    """Set the same A on all sides, in the model's order: uniform in ±1/sqrt(in)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" in name:
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * drawn - 1) / parameter.shape[1] ** 0.5)
