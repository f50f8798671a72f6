"""
The trial by which the defaults of the federated trainers were chosen: accuracy and megabytes on real text.

Clients with different shares of the labels make the merged adapter swing from round to round. The script runs federations
with adapters that upload the same number of parameters, in different dtypes, keeps the merged state of each round, and
evaluates the last state and means of the states so far. All rules of the mean are compared on the same run. Each run is
saved when it has finished, and is not repeated.

    python benchmarks/defaults.py --model MODEL --data PATH_OR_HUB_ID --output defaults
    python benchmarks/defaults.py --output defaults --report
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from cells import run_cells
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    set_seed,
)

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedArguments, FederatedCallback, FederatedTrainer
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.server.mean_of_rounds import POWER


NUM_CLIENTS, CLIENTS_PER_ROUND, ALPHA = 20, 5, 0.3
STEPS, BATCH_SIZE, TOKENS = 10, 32, 32
LEARNING_RATE, TASK_HEAD_LEARNING_RATE = 5e-3, 1e-1
WHERE = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "layers_to_transform": [4, 5]}


@dataclass(frozen=True)
class Method:
    """An adapter and how it is sent. All of them upload about the same number of parameters."""

    adapter: PeftConfig
    upload_dtype: str = "float32"
    arguments: dict[str, Any] = field(default_factory=dict)


LORA = LoraConfig(r=8, lora_alpha=16, **WHERE)
RAVAN = RavanConfig(r=32, num_heads=6, **WHERE)
FROM_GRADIENTS = RavanConfig(r=32, num_heads=6, init_bases="gradient_svd", **WHERE)
METHODS = {
    "LoRA": Method(LORA),
    "LoRA, int4": Method(LORA, "int4"),
    "Ravan": Method(RAVAN),
    "Ravan, int8": Method(RAVAN, "int8"),
    "Ravan, int4": Method(RAVAN, "int4"),
    "Ravan, gradient_svd": Method(FROM_GRADIENTS, arguments={"bases_rank": 32}),
}
# evaluated after each of these shares of the rounds, and in the rounds before, over which accuracies are averaged
SHARES_OF_ROUNDS = (0.5, 1.0)
LAST_ROUNDS = 5
WINDOWS = (3, 5, 10)
SHARES = (0.25, 1 / 3, 0.5)
DECAYS = (0.8, 0.9)
POWERS = (3, 8)

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    seed: int
    num_rounds: int


def rules() -> list[str]:
    """The names of the rules."""
    windows = [f"window {k}" for k in WINDOWS]
    shares = [f"share {share:.2f}" for share in SHARES]
    decays = [f"decay {decay}" for decay in DECAYS]
    return ["last", *windows, *shares, *decays, *(f"power {power}" for power in POWERS)]


def weights(rule: str, num_states: int) -> list[float]:
    """The weight of each state so far in the mean of a rule."""
    kind, _, number = rule.partition(" ")
    if kind == "decay":
        powers = [float(number) ** age for age in reversed(range(num_states))]
        return [power / sum(powers) for power in powers]
    if kind == "power":
        products = [math.prod(range(n, n + int(number))) for n in range(1, num_states + 1)]
        return [product / sum(products) for product in products]
    window = {"last": 1, "window": int(float(number or 1)), "share": math.ceil(float(number or 1) * num_states)}[kind]
    window = min(window, num_states)
    return [0.0] * (num_states - window) + [1 / window] * window


def mean(states: list[State], of_states: list[float]) -> State:
    used = [(state, weight) for state, weight in zip(states, of_states, strict=True) if weight]
    return {name: sum(weight * state[name].double() for state, weight in used).float() for name in states[-1]}


class Keep(FederatedCallback):
    """Keeps the merged state of each round."""

    def __init__(self):
        self.states: list[State] = []

    def on_round_end(self, args, state, control, record, model, **kwargs):
        self.states.append(LiveAdapter(model).read())


def load_data(source: str, tokenizer) -> tuple[datasets.Dataset, datasets.Dataset]:
    folder = Path(source)
    if folder.is_dir():
        files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
        data = datasets.load_dataset("parquet", data_files=files)
    else:
        data = datasets.load_dataset(source)
    [label] = [name for name, feature in data["train"].features.items() if isinstance(feature, datasets.ClassLabel)][
        :1
    ]
    texts = next(name for name in ("text", "sentence", "utterance") if name in data["train"].features)

    def tokenize(split: datasets.Dataset) -> datasets.Dataset:
        tokenized = split.map(lambda rows: tokenizer(rows[texts], truncation=True, max_length=TOKENS), batched=True)
        tokenized = tokenized.rename_column(label, "labels") if label != "labels" else tokenized
        return tokenized.select_columns(["input_ids", "attention_mask", "labels"])

    return tokenize(data["train"]), tokenize(data["test"])


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    hits = [(model(**batch).logits.argmax(-1) == batch["labels"]).float().sum().item() for batch in batches]
    return sum(hits) / sum(len(batch["labels"]) for batch in batches)


def run(cell: Cell, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, test = load_data(options.data, tokenizer)
    collator = DataCollatorWithPadding(tokenizer)
    method = METHODS[cell.method]
    set_seed(cell.seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=train.features["labels"].num_classes
    )
    model = get_peft_model(base, method.adapter)
    args = FederatedArguments(
        str(options.output / "run"),
        num_clients=NUM_CLIENTS,
        clients_per_round=CLIENTS_PER_ROUND,
        num_rounds=cell.num_rounds,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        task_head_learning_rate=TASK_HEAD_LEARNING_RATE,
        lr_scheduler_type="constant",
        upload_dtype=method.upload_dtype,
        partition="dirichlet",
        partition_alpha=ALPHA,
        partition_column="labels",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=cell.seed,
        **method.arguments,
    )
    keep = Keep()
    trainer = FederatedTrainer(
        model,
        args,
        train_dataset=train,
        data_collator=collator,
        callbacks=[keep],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    by_length = sorted(range(len(test)), key=lambda index: len(test[index]["input_ids"]))
    batches = [collator([test[i] for i in by_length[start : start + 256]]) for start in range(0, len(test), 256)]
    adapter, results = LiveAdapter(model), {"MB": {}}
    for share in SHARES_OF_ROUNDS:
        end = round(share * cell.num_rounds)
        records = [record for record in trainer.state.log_history if record.get("round", end + 1) <= end]
        results["MB"][str(end)] = sum(record["upload_bytes"] for record in records) / 1e6
        for rule in rules():
            found = []
            # one state swings; a mean hardly does
            for number in range(max(1, end - LAST_ROUNDS + 1) if rule == "last" else end, end + 1):
                states = keep.states[:number]
                adapter.load(mean(states, weights(rule, number)))
                found.append(accuracy(model, batches))
            results.setdefault(rule, {})[str(end)] = statistics.fmean(found)
            if rule == "last":
                results[rule][f"{end} spread"] = max(found) - min(found)
    return results


def report(records: list[dict]) -> str:
    """Two markdown tables with means over seeds: methods with the default mean, and rules of the mean."""
    ends = sorted({int(end) for record in records for end in record["accuracy"]["MB"]})
    methods = [name for name in METHODS if any(record["method"] == name for record in records)]
    default = f"power {POWER}"

    def mean_of(method: str, key: str, end: int, factor: float = 100.0) -> str:
        found = [record["accuracy"][key][str(end)] for record in records if record["method"] == method]
        return f"{factor * statistics.fmean(found):.1f}"

    lines = ["| Method | Seeds | " + " | ".join(f"{end} rounds: last | mean | MB" for end in ends) + " |"]
    lines.append("|---|---:|" + "---:|---:|---:|" * len(ends))
    for method in methods:
        seeds = sum(record["method"] == method for record in records)
        columns = [
            value
            for end in ends
            for value in (mean_of(method, "last", end), mean_of(method, default, end), mean_of(method, "MB", end, 1.0))
        ]
        lines.append(f"| {method} | {seeds} | {' | '.join(columns)} |")
    lines += ["", "| Rule | " + " | ".join(f"{method}, {end}" for method in methods for end in ends) + " |"]
    lines.append("|---|" + "---:|" * (len(methods) * len(ends)))
    for rule in rules():
        values = [mean_of(method, rule, end) for method in methods for end in ends]
        lines.append(f"| {rule} | {' | '.join(values)} |")
    return "\n".join(lines)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in range(options.seeds):
        for method in options.methods:
            yield Cell(method, seed, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--model", help="path or Hub id of a text encoder")
    parser.add_argument("--data", help="folder with train.parquet and test.parquet, or Hub id")
    parser.add_argument("--output", type=Path, default=Path("outputs/defaults"), help="folder for the results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print the table of the finished runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = () if options.report else cells(options)
    records = run_cells(wanted, lambda cell: run(cell, options), options.output / "cells.jsonl")
    print(report(records))


if __name__ == "__main__":
    main()
