"""
How many clients a second one process trains if K of them train at once (`client_batching=K`).

All K take turns within a repetition, so that other load on the machine affects all alike, and each is compared with K = 1 of
the same repetition. The first round of each run is left out: it makes the copies of the adapter, once in a run. Beside the
time on the clock there is processor time, which does not include other programs on the machine.

Each model and batch size is a cell that is saved when it has finished, so the benchmark can be stopped and continued.

    python benchmarks/client_batching.py
    python benchmarks/client_batching.py --table  # writes the table into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from cells import finished_cells, run_cells
from federation import bert, federated_arguments, now, quiet_trainer, with_ravan, write_dataset

from peft_ravan.trainers import FederatedCallback, FederatedTrainer


RESULTS = Path(__file__).parent / "results" / "timings" / "client_batching.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
SECTION = re.compile(r"(<!-- client batching -->\n).*?(<!-- /client batching -->)", re.DOTALL)
NUM_CLIENTS = 16
BATCHING = (1, 2, 4, 8, 16)
# hidden size, layers, local steps, rounds in a run (the first is left out), repetitions
MODELS = {"small": (64, 2, 5, 3, 2), "MiniLM-shaped": (384, 6, 2, 2, 1)}


@dataclass(frozen=True)
class Cell:
    """A model, the batch size of a client, and the tokens of an example."""

    model: str
    batch_size: int
    tokens: int = 16


class RoundTimes(FederatedCallback):
    """The seconds of each round, on the clock and of the processor."""

    def __init__(self):
        self.seconds = []

    def on_round_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_round_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.start)


def make_trainer(cell: Cell, batching: int, folder: str) -> tuple[FederatedTrainer, RoundTimes]:
    hidden_size, num_layers, steps, rounds, _ = MODELS[cell.model]
    times = RoundTimes()
    args = federated_arguments(
        folder,
        num_clients=NUM_CLIENTS,
        num_rounds=rounds,
        max_steps=steps,
        per_device_train_batch_size=cell.batch_size,
        client_batching=batching,
    )
    dataset = write_dataset(f"{folder}/data", NUM_CLIENTS * steps * cell.batch_size, cell.tokens)
    model = with_ravan(bert(hidden_size, num_layers, cell.tokens), r=8, num_heads=4)
    return quiet_trainer(model, args, times, train_dataset=dataset), times


def measure(cell: Cell) -> dict[str, list[list[float]]]:
    """Clients a second of each K: on the clock, and a second of the processor. One entry per repetition."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {batching: make_trainer(cell, batching, f"{folder}/{batching}") for batching in BATCHING}
        found = {str(batching): [] for batching in BATCHING}
        for _ in range(MODELS[cell.model][-1]):
            for batching, (trainer, times) in runs.items():
                times.seconds.clear()
                trainer.train()
                seconds = sum(times.seconds[1:]) / len(times.seconds[1:])
                found[str(batching)].append([float(value) for value in NUM_CLIENTS / seconds])
        return found


def table(records: list[dict]) -> str:
    """The ratios to K = 1 of the same repetition, and the clients a second of K = 1."""
    heads = ["model", "batch size", "K = 1, clients/s", *(f"K = {batching}" for batching in BATCHING[1:])]
    lines = [heads, ["---", "--:", "--:", *["--:"] * (len(BATCHING) - 1)]]
    for record in records:
        alone = record["clients_per_second"]["1"]
        row = [record["model"], str(record["batch_size"]), f"{statistics.median(wall for wall, _ in alone):.3g}"]
        for batching in BATCHING[1:]:
            pairs = zip(record["clients_per_second"][str(batching)], alone, strict=True)
            ratios = [[found / base for found, base in zip(*pair, strict=True)] for pair in pairs]
            wall, processor = (statistics.median(values) for values in zip(*ratios, strict=True))
            row.append(f"{wall:.2f} ({processor:.2f})")
        lines.append(row)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(text: str) -> str:
    """The text of the page with the table of the finished cells."""
    return SECTION.sub(lambda found: found.group(1) + table(finished_cells(RESULTS)) + found.group(2), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the table of the page and measure nothing")
    args = parser.parse_args()
    if args.table:
        PAGE.write_text(with_table(PAGE.read_text()))
        return
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cells = [Cell(model, size) for model in MODELS for size in args.batch_sizes]
    run_cells(cells, measure, args.output, measured="clients_per_second")


if __name__ == "__main__":
    main()
