"""DataConfig: which data are trained and evaluated on, and how a record becomes tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora.config.lora import PATHS, RARE, Settings, at_least, rule

MAX_LENGTH = 2048  # tokens per row
SHUFFLE_BUFFER = 10_000  # records
PART = rule("above 0 and below 1", lambda share: 0 < share < 1)


@dataclass(frozen=True)
class DataConfig(Settings):
    """Training data, and how a record becomes tokens."""

    data: str | tuple[str, ...] = field(metadata=PATHS)
    """training data: .jsonl .json .csv .parquet .txt, a folder, or a hub dataset; several mix"""
    eval_data: str | None = None
    """evaluation data, in the same formats"""
    max_length: int = field(default=MAX_LENGTH, metadata=at_least(8))
    """maximum tokens per row"""
    packing: bool = False
    """pack several rows into one, up to max_length"""
    long_rows: Literal["error", "truncate", "drop", "split"] = "error"
    """longer rows; error: truncate, unless 1 % of tokens would be lost"""
    data_weights: tuple[float, ...] = field(default=(), metadata=RARE)
    """share of the rows from each of several data, like 0.7 0.3; by default all rows of each"""
    data_config: str | None = field(default=None, metadata=RARE)
    """configuration of a hub dataset"""
    data_split: str | None = field(default=None, metadata=RARE)
    """split of data to train on; by default train"""
    eval_share: float | None = field(default=None, metadata=RARE | PART)
    """share of the training data to evaluate on, where there is no eval_data"""
    streaming: bool = field(default=False, metadata=RARE)
    """read and tokenize the training data while training runs, for max_steps; nothing is cached"""
    shuffle_buffer: int = field(default=SHUFFLE_BUFFER, metadata=RARE | at_least(1))
    """for streaming: records among which the next one is drawn; 1 keeps their order"""
    dataset_num_proc: int | None = field(default=None, metadata=RARE | at_least(1))
    """processes that tokenize large data; by default one a core"""
    train_on: Literal["all", "last"] = field(default="all", metadata=RARE)
    """turns of the assistant that are learned in a chat; weight or train of a message, 0 or 1"""
    roles: Mapping[str, str] = field(default_factory=dict, metadata=RARE)
    """other names of roles: {bot: assistant}"""
    reasoning_content: str | None = field(default=None, metadata=RARE)
    """column with the reasoning of a row's last answer; by default reasoning_content"""
    chat_template: str | None = field(default=None, metadata=RARE)
    """file with a chat template, in place of the model's; saved with the adapter"""
    enable_thinking: bool | None = field(default=None, metadata=RARE)
    """the chat template's variable, saved with it; by default on where rows have reasoning"""
    template: Mapping[str, Any] = field(default_factory=dict, metadata=RARE)
    """other variables of the chat template, as --template.NAME VALUE"""

    def faults(self) -> Iterator[str]:
        sources, weights = self.sources, self.data_weights
        if not sources or "" in sources:
            yield "data names nothing"
        if len(set(sources)) < len(sources):
            yield "data names one source twice: give it once, with a weight"
        if weights and len(weights) != len(sources):
            got = f"{len(sources)} data, {len(weights)} weights"
            yield f"data_weights must have one number per data: {got}"
        if bad := [weight for weight in weights if weight <= 0]:
            yield f"data_weights must be above 0, got {bad[0]}"
        if self.eval_share is not None and self.eval_data is not None:
            yield "eval_share is for runs without eval_data: give one of them"
        if self.eval_share is not None and self.streaming:
            yield "eval_share needs all rows before training, unlike streaming: give eval_data"
        if self.shuffle_buffer != SHUFFLE_BUFFER and not self.streaming:
            yield "shuffle_buffer needs streaming, else all rows are shuffled: leave it out"
        if len(sources) > 1 and (self.data_config or self.data_split):
            yield "data_config and data_split are for one data set: give one, or leave them out"

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source of training data."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def name(self) -> str:
        """The sources, for a message."""
        return ", ".join(self.sources)

    @property
    def evaluates(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval_data is not None or self.eval_share is not None
