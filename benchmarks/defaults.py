"""
The trial by which the defaults of the federated trainers were chosen: accuracy and megabytes on real text.

Clients with different shares of the labels make the merged adapter swing from round to round. The script runs federations
with adapters that upload the same number of parameters, in different dtypes, keeps the merged state of each round, and
evaluates the last state and means of the states so far. All rules of the mean are compared on the same run. Each run is
saved when it has finished, and is not repeated.

    python benchmarks/defaults.py --model MODEL --data PATH_OR_HUB_ID --output outputs/defaults
    python benchmarks/defaults.py --output outputs/defaults --report
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from text_trial import WHERE, State, TextTrial, add_arguments, run_and_report

from peft_ravan import RavanConfig
from peft_ravan.trainers.server.mean_of_rounds import POWER


LEARNING_RATE = 5e-3


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
    "Ravan, int4, gradient_svd": Method(FROM_GRADIENTS, "int4", {"bases_clients": 2}),
}
# evaluated after each of these shares of the rounds, and in the rounds before, over which accuracies are averaged
SHARES_OF_ROUNDS = (0.5, 1.0)
LAST_ROUNDS = 5
WINDOWS = (3, 5, 10)
SHARES = (0.25, 1 / 3, 0.5)
DECAYS = (0.8, 0.9)
POWERS = (3, 8)


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


def run(cell: Cell, trial: TextTrial, output: Path) -> dict[str, dict[str, float]]:
    method = METHODS[cell.method]
    settings = {
        "num_rounds": cell.num_rounds,
        "learning_rate": LEARNING_RATE,
        "upload_dtype": method.upload_dtype,
        **method.arguments,
    }
    finished = trial.run(method.adapter, output / "run", cell.seed, settings)
    results = {"MB": {}}
    for share in SHARES_OF_ROUNDS:
        end = round(share * cell.num_rounds)
        results["MB"][str(end)] = finished.megabytes(end)
        for rule in rules():
            found = []
            # one state swings; a mean hardly does
            for number in range(max(1, end - LAST_ROUNDS + 1) if rule == "last" else end, end + 1):
                states = finished.states[:number]
                found.append(trial.accuracy(finished.load(mean(states, weights(rule, number)))))
            results.setdefault(rule, {})[str(end)] = statistics.fmean(found)
            if rule == "last":
                results[rule][f"{end} spread"] = max(found) - min(found)
    return results


def report(records: list[dict]) -> str:
    """Two markdown tables with means over seeds: methods with the default mean, and rules of the mean."""
    ends = sorted({int(end) for record in records for end in record["accuracy"]["MB"]})
    methods = [name for name in METHODS if any(record["method"] == name for record in records)]
    default = f"power {POWER}"

    def mean_of(method: str, key: str, end: int) -> str:
        found = [record["accuracy"][key][str(end)] for record in records if record["method"] == method]
        return f"{statistics.fmean(found):.1f}"

    lines = ["| Method | Seeds | " + " | ".join(f"{end} rounds: last | mean | MB" for end in ends) + " |"]
    lines.append("|---|---:|" + "---:|---:|---:|" * len(ends))
    for method in methods:
        seeds = sum(record["method"] == method for record in records)
        columns = [
            value
            for end in ends
            for value in (mean_of(method, "last", end), mean_of(method, default, end), mean_of(method, "MB", end))
        ]
        lines.append(f"| {method} | {seeds} | {' | '.join(columns)} |")
    lines += ["", "| Rule | " + " | ".join(f"{method}, {end}" for method in methods for end in ends) + " |"]
    lines.append("|---|" + "---:|" * (len(methods) * len(ends)))
    for rule in rules():
        values = [mean_of(method, rule, end) for method in methods for end in ends]
        lines.append(f"| {rule} | {' | '.join(values)} |")
    return "\n".join(lines)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in options.seeds:
        for method in options.methods:
            yield Cell(method, seed, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    add_arguments(parser, Path("outputs/defaults"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=30)
    run_and_report(parser.parse_args(), cells, run, report)


if __name__ == "__main__":
    main()
