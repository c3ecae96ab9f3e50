"""What a run over many nodes sends, reads and writes: the arithmetic of docs/many_nodes.md.

    python benchmarks/nodes.py            prints the tables
    python benchmarks/nodes.py --write    writes them into the page

Nothing is measured. The formulas, for N GPUs in nodes of 8, each node with one network card:

    gradients     G = 2 bytes (bf16) for each trainable parameter
    sent a step   2 (N - 1) / N × G by each GPU: a ring adds G / N pieces in N - 1 sends and
                  passes the sums on in N - 1 more. The ring enters and leaves a node once, so
                  that a node's card carries what one GPU sends.
    its time      those bytes / bandwidth + 2 (N - 1) × LATENCY; NCCL takes a tree instead where
                  that is faster, of 2 log2 N waits: the lesser of the two counts
    a step        6 × linear weights × tokens / FLOPS: forward, forward again (checkpointing), and
                  the gradient of the input, 2 each; frozen weights have no gradient of their own
    efficiency    a step / (a step + its transfer), which nothing hides (qlora.training.ranks)
    start         every node reads the base once; its ranks share what the system keeps of it
    failures      one in HOURS_A_FAILURE GPU-hours: 419 unexpected interruptions of 16,384 GPUs in
                  54 days (arXiv:2407.21783, section 3.3.4)
    checkpoint    for each parameter 2 bytes of adapter, 2 of 8-bit AdamW and 2 of kept roundings;
                  RANDOM_BYTES of each rank
    sockets       of a process: a Gloo group joins every two ranks, and a run has two groups
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from shapes import SHAPES, linear_parameters, on_meta

from qlora.adapters.apply import apply_lora, trainable_parameters
from qlora.config import LoraConfig

PAGE = Path(__file__).parents[1] / "docs" / "many_nodes.md"
BEGIN, END = "<!-- benchmarks/nodes.py -->", "<!-- end of nodes -->"
SHAPE, RANK = "llama2-7b", 16
GPUS, IN_A_NODE = (1, 2, 8, 16, 64, 256, 1000), 8
GIGABITS = (10, 25, 100, 400)
NETWORK = 25  # of them, for the efficiency over nodes
INSIDE = 200  # gigabits a second between the GPUs of a node, by PCIe 4.0
LATENCY = 20e-6  # seconds from one GPU to the next, of a data center's Ethernet
FLOPS = 150e12  # of a GPU in 16-bit products: half of an A100's peak
ROW_TOKENS, ROWS = 1024, 16  # the recipes' rows, and their rows a step
BF16_BYTES, CODED_BYTES = 2, 4.127 / 8  # of a value; NF4 with double quantization
HOURS_A_FAILURE = 16384 * 54 * 24 / 419
CHECKPOINT_BYTES, RANDOM_BYTES = 6, 20e3
OWN_SOCKETS = 3  # to the store


def adapter_parameters() -> int:
    """Trainable parameters of the default adapter on that model."""
    model = on_meta(SHAPES[SHAPE])
    apply_lora(model, LoraConfig(r=RANK))
    return trainable_parameters(model)[0]


def sent_bytes(gradients: float, gpus: int) -> float:
    """Bytes that each GPU sends in a ring all-reduce."""
    return 2 * (gpus - 1) / gpus * gradients


def transfer_seconds(gradients: float, gpus: int, gigabits: float) -> float:
    """Seconds of the all-reduce over a network of that bandwidth."""
    waits = min(2 * (gpus - 1), 2 * math.log2(max(gpus, 1)))
    return sent_bytes(gradients, gpus) * 8 / (gigabits * 1e9) + waits * LATENCY


def step_seconds(rows: float) -> float:
    """Seconds in which a GPU computes its rows of a step."""
    return 6 * linear_parameters(SHAPES[SHAPE]) * rows * ROW_TOKENS / FLOPS


def efficiency(rows: float, gradients: float, gpus: int, gigabits: float) -> float:
    """The share of a step in which GPUs compute."""
    computing = step_seconds(rows)
    return computing / (computing + transfer_seconds(gradients, gpus, gigabits))


def sockets(gpus: int) -> int:
    """Connections of a process."""
    return 2 * (gpus - 1) + OWN_SOCKETS if gpus > 1 else 0


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is of words."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def transfer_table(gradients: float) -> str:
    """Bytes and milliseconds of a step's transfer, by GPUs and network."""
    head = ["GPUs", "nodes", "each sends, MB", *(f"{g} Gb/s, ms" for g in GIGABITS)]
    rows = [
        [f"{n:,}", f"{math.ceil(n / IN_A_NODE)}", f"{sent_bytes(gradients, n) / 1e6:.0f}",
         *(f"{1e3 * transfer_seconds(gradients, n, g):.1f}" for g in GIGABITS)]
        for n in GPUS if n > IN_A_NODE
    ]  # fmt: skip
    return markdown(head, rows)


def growth_table(gradients: float) -> str:
    """What grows with the GPUs: rows, efficiency, start, failures."""
    head = [
        "GPUs", "rows a step, at least", "efficiency: 16 rows a GPU / 1 row",
        "base read, GB: 4-bit / 16-bit", "checkpoint, MB", "hours between failures",
        "sockets of a process",
    ]  # fmt: skip
    weights = linear_parameters(SHAPES[SHAPE])
    others = sum(p.numel() for p in on_meta(SHAPES[SHAPE]).parameters()) - weights
    coded, dense = (weights * each + 2 * others for each in (CODED_BYTES, 2))
    rows = []
    for n in GPUS:
        nodes = math.ceil(n / IN_A_NODE)
        network = NETWORK if nodes > 1 else INSIDE
        many, few = (100 * efficiency(each, gradients, n, network) for each in (ROWS, 1))
        saved = CHECKPOINT_BYTES * gradients / BF16_BYTES + n * RANDOM_BYTES
        rows.append([
            f"{n:,}", f"{n:,}", f"{many:.0f} % / {few:.0f} %",
            f"{nodes * coded / 1e9:,.0f} / {nodes * dense / 1e9:,.0f}", f"{saved / 1e6:.0f}",
            f"{HOURS_A_FAILURE / n:,.0f}", f"{sockets(n):,}",
        ])  # fmt: skip
    return markdown(head, rows)


def tables() -> str:
    """Both tables, as the page has them."""
    gradients = BF16_BYTES * adapter_parameters()
    return f"{transfer_table(gradients)}\n\n{growth_table(gradients)}"


def with_tables(text: str) -> str:
    """The page's text with the tables between the markers."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/many_nodes.md's tables")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
