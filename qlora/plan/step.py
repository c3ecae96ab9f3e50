"""The memory of a training step of a large model on a GPU or a CPU, counted without its weights.

Our own step runs: `load_base`, `apply_lora` and `prepare_for_training` on a narrow checkpoint on
the CPU, which `widen` turns into the large model without memory; two micro-batches run under a
`Meter`, of which the second counts. Only the first layers of a model run. `Sample.count` notes the
bytes of each kind at the start, peak and end of each layer's forward and backward pass, and adds
those of all layers: one of the same kind stands for each that did not run.
"""

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from qlora.adapters.apply import apply_lora
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import quantized_layers
from qlora.base.load import DTYPE_NAMES, compute_dtype, load_base, require_all_quantized
from qlora.base.modules import auto_class, is_quantized, state_of, vocabulary
from qlora.config import TrainConfig
from qlora.config.tasks import task_named
from qlora.data.batches import FlatCollator, PackCollator
from qlora.data.objectives import OBJECTIVES
from qlora.errors import UserError
from qlora.fast import layers
from qlora.fast.attention import VARLEN, rows_collator
from qlora.fast.head import LazyLogits
from qlora.fast.offload import offload_activations
from qlora.plan.meta import all_nonzero, as_on, backward, empty, forget_buffers, widen
from qlora.plan.meter import WORKSPACE, Bytes, Meter, Segment, difference
from qlora.plan.shards import Matrix, grouped_modules
from qlora.plan.shrink import first_layers, layer_count, narrow, text_of
from qlora.plan.work import kernels_counted
from qlora.training.prepare import prepare_for_training

LINEAR, EMBEDDING, HEAD, OTHER = "linear weights", "embedding", "output head", "norms and others"
ADAPTERS, GRADIENTS, SAVED = "adapters", "gradients", "saved activations"
WORKING, LOSS, SCRATCH = "working set of a layer", "loss", "buffers for decoded weights"
EDGES = 1  # first and last layers that differ from those between
OFFLOAD_EDGES = 5  # with activations in host memory, of which the newest stay


class HostMemory:
    """Copies to host memory, whose bytes count apart."""

    def __init__(self, meter: Meter) -> None:
        self.device = torch.device("meta")
        self.meter, self.sizes = meter, [0]

    def allocate(self, size: int) -> Tensor:
        """Memory that the meter leaves out."""
        self.meter.is_host = True
        made = empty((size,), torch.uint8)
        self.meter.is_host = False
        self.sizes.append(size)
        return made

    def start(self, target: Tensor, source: Tensor) -> None:
        """No values, no copy."""

    def finish(self, started: Any) -> None:
        """Nothing was started."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without what loading prints: it describes the narrow model."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)


# ---- which layers run ----


def layer_list(model: Any) -> nn.ModuleList | None:
    """The decoder layers of a model: the first list of modules as long as its config says."""
    count = layer_count(model.config)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # not of pictures
    modules = (*(decoder.modules() if decoder is not None else ()), *model.modules())
    lists = (m for m in modules if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What makes two layers take the same memory: classes, shapes and numbers."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        numbers = {k: v for k, v in vars(module).items() if type(v) in (int, float, str)}
        numbers.pop("layer_idx", None)
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
        parts.append((name, type(module).__name__, str(sorted(numbers.items())), *shapes))
    return tuple(parts)


def stand_in(kinds: Sequence[Any], count: int, edges: int) -> list[int]:
    """For each layer, one of the first `count` that takes as much memory."""
    total, found = len(kinds), list[int]()
    if count == total:
        return list(range(total))
    for i, kind in enumerate(kinds):
        at_edge = i if i < edges else count - (total - i) if total - i <= edges else None
        if at_edge is not None and at_edge < count and kinds[at_edge] == kind:
            found.append(at_edge)
            continue
        between = [j for j in range(edges, count - edges) if kinds[j] == kind]
        found.append(between[0] if between else kinds[:count].index(kind))
    return found


def enough_layers(kinds: Sequence[Any], edges: int) -> int:
    """The least number of first layers with one of each kind between the edges."""
    total = len(kinds)
    wanted = {*kinds[edges : total - edges]}
    counts = range(2 * edges + 1, total)
    return next((n for n in counts if wanted <= {*kinds[edges : n - edges]}), total)


# ---- the model ----


def as_chosen_on(device: str, config: TrainConfig) -> TrainConfig:
    """`config` with what a 16-bit GPU or this CPU chooses for `auto`, and no start that needs
    weights or data."""
    dtype = "bf16" if config.quant.compute_dtype == "auto" else config.quant.compute_dtype
    if device == "cpu":
        dtype = DTYPE_NAMES[compute_dtype(config.quant, torch.device(device))]
    lora, skip = config.lora, (*config.quant.skip_modules, *config.lora.modules_to_save)
    settings: Any = {"init_lora_weights": True, "loftq_config": {}, "eva_config": {}}
    quant = replace(config.quant, compute_dtype=dtype, skip_modules=skip)
    return replace(config, lora=replace(lora, **settings), quant=quant)


def load_narrow(config: TrainConfig, large: PreTrainedConfig, device: str = "cuda") -> Any:
    """The narrow model of `large`, in 4 bits with adapters on the CPU, prepared for training."""
    task = task_named(config.task)
    with tempfile.TemporaryDirectory() as folder:
        made = auto_class(task).from_config(narrow(large), dtype=torch.bfloat16)
        made.save_pretrained(folder)
        try:
            model = load_base(folder, config.quant, task=config.task, device="cpu")
        except UserError as error:  # which names the folder
            raise UserError(str(error).replace(folder, config.model)) from error
    apply_lora(model, config.lora)
    is_16_bit = device == "cuda" and model.dtype == torch.bfloat16
    if config.lora.adapter_dtype == "auto" and is_16_bit:
        for layer in lora_layers(model).values():
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.data = matrix.data.bfloat16()
    # the states of generators that checkpointing keeps are in host memory, and meta has none
    with patch.object(layers, "draws_numbers", lambda _: False):
        return prepare_for_training(
            model, config.gradient_checkpointing, fast_path=config.fast_path
        )


def on_meta(config: TrainConfig, large: PreTrainedConfig) -> Any:
    """The model without memory, not quantized."""
    with torch.device("meta"):
        return auto_class(task_named(config.task)).from_config(large)


class Sample:
    """The first layers of a large model on the meta device, to count steps of."""

    def __init__(
        self,
        config: TrainConfig,
        source: PreTrainedConfig,
        *,
        device: str = "cuda",
        direct: bool = False,
    ) -> None:
        self.device = device
        self.config = config = as_chosen_on(device, config)
        self.edges = OFFLOAD_EDGES if config.offload_activations else EDGES
        with quietly():
            whole = on_meta(config, source)
            self.parameters = sum(p.numel() for p in whole.parameters())
            layers = layer_list(whole)
            by_index = config.lora.layers_to_transform or config.lora.rank_pattern
            kinds = [kind_of(layer) for layer in layers or ()]
            few = enough_layers(kinds, self.edges)
            if direct or by_index or config.task == "seq2seq" or layers is None:
                few = len(kinds) or layer_count(source)
            try:
                large_config = first_layers(source, few)
                large = on_meta(config, large_config)
            except ValueError:  # a config that ties layers to their place: count them all
                few, large_config, large = len(kinds), source, on_meta(config, source)
            self.stands_in = stand_in(kinds, few, self.edges)
            try:
                self.model = load_narrow(config, large_config, device)
            except UserError:  # with the sizes of the whole model, if they are the reason
                require_all_quantized(whole, quantized_layers(whole, config.quant), config.quant)
                raise
            self.collate = self._collator()
            state_of(large).task, state_of(large).heads = config.task, state_of(self.model).heads
            apply_lora(large, config.lora)
            names = vocabulary(self.model)
            modules = [self.model.get_submodule(name) for name in names if name]
            self.is_tied = len(modules) == 2 and modules[0].weight is modules[1].weight
        self.meter = Meter(OTHER, workspace=WORKSPACE if device == "cuda" else 0)
        forget_buffers()
        with self.meter:
            widen(self.model, large, device)
        self.matrices: list[Matrix] = []  # that can be sharded
        self.parts = self._tag_parameters()
        self._watch_layers()

    def _collator(self) -> Any:
        """The run's collator; None where rows are padded. Sets the attention."""
        model, config = self.model, self.config
        if config.task != "causal-lm":
            return None
        settings: Any = {"packing": config.data.packing, "fast_path": config.fast_path}
        collate = rows_collator(model, pad_token_id=0, **settings)
        if not isinstance(collate, FlatCollator) or self.device == "cpu":
            return collate
        text = text_of(model.config)
        keys, values = getattr(text, "qk_head_dim", None), getattr(text, "v_head_dim", None)
        if model.dtype == torch.float32 or keys != values:  # rows in turn, whose lengths are read:
            model.set_attn_implementation("sdpa")  # counted as one kernel for all
            return None
        model.set_attn_implementation(VARLEN)
        return collate

    def _tag_parameters(self) -> list[Bytes]:
        """Name the kind of each parameter; the bytes of each layer, and last of all others."""
        embedding, head = vocabulary(self.model)
        layers = layer_list(self.model) if self.stands_in else None
        place = {m: i for i, layer in enumerate(layers or ()) for m in layer.modules()}
        parts = [Counter[str]() for _ in range(len(layers or ()) + 1)]
        seen, grouped = set(), grouped_modules(self.model)
        for name, module in self.model.named_modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in (t for t in tensors if id(t) not in seen):
                seen.add(id(tensor))
                kind = OTHER
                if tensor.requires_grad:
                    kind = ADAPTERS
                elif is_quantized(module):
                    kind = LINEAR
                elif tensor.ndim > 1:
                    clean = name.replace("base_layer", "").rstrip(".")
                    kind = {embedding: EMBEDDING, head: HEAD}.get(clean, LINEAR)
                if kind != ADAPTERS and tensor.ndim > 1 and isinstance(tensor, nn.Parameter):
                    own = Matrix(kind, tensor.nbytes, place.get(module), module in grouped)
                    self.matrices.append(own)
                held = [tensor]
                if kind == LINEAR and is_quantized(module) and tensor is module.weight:
                    held += _of_state(module.weight.quant_state)
                self.meter.retag(kind, held)
                size = sum(t.untyped_storage().nbytes() for t in held)
                parts[place.get(module, -1)][kind] += size
        return parts

    def _watch_layers(self) -> None:
        """Begin a segment of the meter where a layer's forward or backward pass begins."""
        self.is_counting = False
        for p in self.model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._tag_gradient)
        if self.stands_in:
            for i, layer in enumerate(layer_list(self.model) or ()):
                layer.register_forward_pre_hook(partial(self._before, i))
                layer.register_forward_hook(partial(self._after, i))

    def _tag_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.meter.retag(GRADIENTS, [parameter.grad])

    def _before(self, i: int, *_: Any) -> None:
        if self.is_counting:
            if i == 0:
                self.meter.retag(SAVED)  # the embeddings, its input
            self.meter.begin(f"forward {i}", WORKING)

    def _after(self, i: int, layer: Any, args: Any, output: Any) -> None:
        if self.is_counting:
            self.meter.retag(SAVED)
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.meter.begin(f"backward {i}", WORKING))
            self.meter.begin("loss", LOSS)

    def trained(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every trained parameter of the whole model."""
        layers = list(layer_list(self.model) or ()) if self.stands_in else []
        found = [_trained(layers[i].parameters()) for i in self.stands_in]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        others = _trained(p for p in self.model.parameters() if id(p) not in inside)
        return [kind for kinds in (others, *found) for kind in kinds]

    # ---- a step ----

    def batch(self, rows: int, length: int) -> dict[str, Any]:
        """A batch of equal rows, as the run's collator makes it, on the meta device."""
        like = [0] * length
        items: Any = [{"input_ids": like, "labels": like} for _ in range(rows)]
        if self.collate is not None:
            if self.config.data.packing:
                items = [[item] for item in items]
            made = dict(self.collate(items))
            if isinstance(self.collate, FlatCollator):
                made.pop("attention_mask", None)  # as AdapterTrainer does
        else:
            length = -(-length // 8) * 8
            made = dict.fromkeys(("input_ids", "labels"), torch.zeros(rows, length).long())
            if rows > 1 or self.config.task != "causal-lm":  # rows of other lengths
                made["attention_mask"] = made["input_ids"]
            if self.config.task == "seq-cls":
                made["labels"] = torch.zeros(rows).long()
            if self.config.task == "seq2seq":
                made["decoder_input_ids"] = made["labels"]
        return {k: empty(v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in made.items()}

    def segments(
        self, rows: int, length: int, *, accumulates: bool
    ) -> tuple[list[Segment], list[int]]:
        """The segments of a micro-batch of the layers that run, and the sizes in host memory."""
        meter, objective = self.meter, OBJECTIVES[self.config.task]
        packed = isinstance(self.collate, PackCollator)
        host = HostMemory(meter)
        forget_buffers()
        offload = offload_activations(copies=host) if self.config.offload_activations else None  # type: ignore[arg-type]
        counted = kernels_counted(meter.add_work)
        with as_on(self.device, packed=packed, lengths=[length] * rows), counted:
            for self.is_counting in (False, True):
                if not (self.is_counting and accumulates):
                    self.model.zero_grad(set_to_none=True)
                meter.segments.clear()
                if self.is_counting:
                    meter.begin("embedding", WORKING)
                else:
                    meter.kind, meter.without = SCRATCH, 0
                with meter, offload or ExitStack():
                    inputs = self.batch(rows, length)
                    labels = inputs.pop("labels")
                    count = empty((), torch.int64)
                    outputs = self.model(**inputs)
                    lazy = isinstance(outputs.logits, LazyLogits) and outputs.logits.value is None
                    loss = objective.loss(outputs, labels, count)
                    del outputs
                if self.is_counting:
                    meter.begin("backward of the loss", LOSS)
                backward(loss, meter, all_nonzero())
                del loss, inputs, labels, count
                vocab = self.model.config.get_text_config().vocab_size
                meter.without = rows * (-(-length // 8) * 8 if self.collate is None else length)
                meter.without *= vocab if lazy else 0
            meter.begin("end", WORKING)
        self.is_counting = False
        found, meter.segments = meter.segments[:-1], []
        return found, host.sizes

    def count(self, rows: int, length: int, *, accumulates: bool) -> tuple[list[Segment], int]:
        """The segments of a micro-batch of the whole model, and bytes in host memory."""
        found, sizes = self.segments(rows, length, accumulates=accumulates)
        *layers, _ = self.parts
        host = sum(sizes) + max(sizes) * (len(self.stands_in) - len(layers))
        if not self.stands_in:
            return found, host
        own = [b.copy() for b in layers]
        if accumulates:
            for b in own:
                b[GRADIENTS] += b[ADAPTERS]
        start = found[0].start.copy()
        for b in own:
            start = difference(start, b)
        for i in self.stands_in:
            start.update(own[i])
        names = {segment.name: segment for segment in found}
        every = [found[0]]
        every += [names[f"forward {i}"] for i in self.stands_in]
        every += [names["loss"], names["backward of the loss"]]
        every += [names[f"backward {i}"] for i in reversed(self.stands_in)]
        return joined(every, start), host


def joined(segments: Sequence[Segment], start: Bytes) -> list[Segment]:
    """The segments one after another, from `start` on."""
    made, now = [], start.copy()
    for segment in segments:
        peak, end = now.copy(), now.copy()
        peak.update(segment.rise)
        end.update(segment.change)
        made.append(Segment(segment.name, now, peak, end, segment.work))
        now = end
    return made


def _trained(parameters: Iterable[Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(p.dtype, tuple(p.shape)) for p in parameters if p.requires_grad]


def _of_state(state: Any) -> list[Tensor]:
    """The tensors of a quantization state."""
    held = [state.absmax, state.code]
    return held + ([state.offset, state.state2.absmax, state.state2.code] if state.nested else [])
