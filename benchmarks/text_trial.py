"""
The trial by which defaults are chosen: MiniLM, or another BERT encoder, learns to tell apart the classes of short texts.

Adapters are at the queries and values of the last two layers. The layers below them are computed once for all runs, see
`cached_layers.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cached_layers import CachedTexts, keep_upper_layers
from cells import Cell, run_cells
from peft import PeftConfig, get_peft_model
from real_data import label_column, load_splits, text_column
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, set_seed

from peft_ravan.trainers import FederatedArguments, FederatedCallback, FederatedTrainer
from peft_ravan.trainers.client.live_adapter import LiveAdapter


ADAPTED_LAYERS, TOKENS = 2, 32
WHERE = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
FEDERATION = {
    "num_clients": 20,
    "clients_per_round": 5,
    "partition": "dirichlet",
    "partition_alpha": 0.3,
    "partition_column": "labels",
    "max_steps": 10,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "constant",
    "task_head_learning_rate": 1e-1,
    # means are taken from the states that are kept
    "average_rounds": 1,
}

State = dict[str, torch.Tensor]


@dataclass
class Run:
    """What a run gave: the model, the merged state of each round, and the records of the rounds."""

    model: nn.Module
    states: list[State] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def load(self, state: State) -> nn.Module:
        LiveAdapter(self.model).load(state)
        return self.model

    def megabytes(self, num_rounds: int) -> float:
        """What all clients have uploaded in round 0 and this many rounds."""
        return sum(record.get("upload_bytes", 0) for record in self.records if record["round"] <= num_rounds) / 1e6


class KeepStates(FederatedCallback):
    """Keeps the merged state of each round."""

    def __init__(self, run: Run):
        self.run = run

    def on_round_end(self, args, state, control, record, model, **kwargs):
        self.run.states.append(LiveAdapter(model).read())


class TextTrial:
    """
    Args:
        model (`str`): The path or Hub id of the encoder.
        data (`str`): A folder with train.parquet and test.parquet, or a Hub id.
        max_test_examples (`int`): How many examples of the test split are used, drawn with seed 0.
    """

    def __init__(self, model: str, data: str, max_test_examples: int):
        self.model = model
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModelForSequenceClassification.from_pretrained(model)
        first = encoder.config.num_hidden_layers - ADAPTED_LAYERS
        splits = load_splits(data)
        test = splits["test"].shuffle(seed=0)
        splits["test"] = test.select(range(min(max_test_examples, len(test))))
        label, text = label_column(test), text_column(test)
        self.num_labels = test.features[label].num_classes
        self.train, self.test = (
            CachedTexts(encoder, tokenizer, split[text], split[label], test.features[label], first, TOKENS)
            for split in (splits["train"], splits["test"])
        )
        self.first, self.test_batches = first, self.test.batches(256)

    def run(self, adapter: PeftConfig, output: Path, seed: int, arguments: Mapping[str, Any]) -> Run:
        """
        Args:
            adapter (`PeftConfig`): The adapter.
            output (`Path`): The folder of the run.
            seed (`int`): The seed of the partition, the head and the run.
            arguments (`Mapping[str, Any]`): Arguments beside those of the trial, or instead of them.

        Returns:
            [`Run`]: The finished run.
        """
        set_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=self.num_labels)
        keep_upper_layers(base, self.first)
        run = Run(get_peft_model(base, adapter))
        args = FederatedArguments(
            str(output),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
            **{**FEDERATION, **arguments},
        )
        trainer = FederatedTrainer(
            run.model, args, train_dataset=self.train.dataset, data_collator=self.train, callbacks=[KeepStates(run)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        run.records = [record for record in trainer.state.log_history if "round" in record]
        return run

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The accuracy on the test examples, in percent."""
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            hits = [(model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in self.test_batches]
        return 100 * sum(hits) / len(self.test.dataset)


def add_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    parser.add_argument("--model", help="path or Hub id of a BERT encoder")
    parser.add_argument("--data", help="folder with train.parquet and test.parquet, or Hub id")
    parser.add_argument("--output", type=Path, default=output, help="folder for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-test-examples", type=int, default=2250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print the table of the finished runs")


def run_and_report(
    options: argparse.Namespace,
    cells: Callable[[argparse.Namespace], Iterator[Cell]],
    run: Callable[[Cell, TextTrial, Path], Any],
    report: Callable[[list[dict]], str],
) -> None:
    """Run the cells that have not finished yet, unless only the report is wanted, and print the report of all."""
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted, trial = (), None
    if not options.report:
        wanted, trial = cells(options), TextTrial(options.model, options.data, options.max_test_examples)
    records = run_cells(wanted, lambda cell: run(cell, trial, options.output), options.output / "cells.jsonl")
    print(report(records))
