"""
The sweep by which the scale of the bases was chosen: the best learning rate of LoRA, and of Ravan with heads of any shape.

Each run is saved when it has finished, and is not repeated. The best rate is interpolated between rates by a parabola in
the logarithm of the rate.

    python benchmarks/learning_rates.py --model MODEL --data PATH_OR_HUB_ID --output outputs/learning_rates
    python benchmarks/learning_rates.py --output outputs/learning_rates --report
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peft import LoraConfig, PeftConfig
from text_trial import WHERE, TextTrial, add_arguments, run_and_report

from peft_ravan import RavanConfig


LORA = "LoRA 8"
HEADS = {"64 × 1": (64, 1), "32 × 4": (32, 4), "16 × 4": (16, 4), "16 × 16": (16, 16)}
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
LAST_ROUNDS = 5


@dataclass(frozen=True)
class Cell:
    """One run."""

    adapter: str
    bases_scale: str
    learning_rate: float
    seed: int
    num_rounds: int

    def config(self) -> PeftConfig:
        if self.adapter == LORA:
            return LoraConfig(r=8, lora_alpha=16, **WHERE)
        r, num_heads = HEADS[self.adapter]
        return RavanConfig(r=r, num_heads=num_heads, bases_scale=self.bases_scale, **WHERE)


def run(cell: Cell, trial: TextTrial, output: Path) -> float:
    settings = {"num_rounds": cell.num_rounds, "learning_rate": cell.learning_rate}
    finished = trial.run(cell.config(), output / "run", cell.seed, settings)
    return statistics.fmean(trial.accuracy(finished.load(state)) for state in finished.states[-LAST_ROUNDS:])


def best_rate(accuracies: Mapping[float, float]) -> float:
    """The learning rate at the top of the parabola through the best point and its neighbours, or an end of the grid."""
    rates = sorted(accuracies)
    best = max(range(len(rates)), key=lambda index: accuracies[rates[index]])
    if best in (0, len(rates) - 1):
        return rates[best]
    around = rates[best - 1 : best + 2]
    a, b, _ = np.polyfit(np.log(around), [accuracies[rate] for rate in around], 2)
    return float(np.exp(-b / (2 * a)))


def report(records: list[dict]) -> str:
    """A markdown table: the accuracy at each learning rate, the mean over seeds, and the best rate."""
    rates = sorted({record["learning_rate"] for record in records})
    lines = ["| Adapter | Scale | " + " | ".join(f"{rate:g}" for rate in rates) + " | Best rate | of LoRA's |"]
    lines.append("|---|---|" + "---:|" * (len(rates) + 2))
    swept = {(record["adapter"], record["bases_scale"]): {} for record in records}
    for (adapter, scale), accuracies in swept.items():
        for rate in rates:
            found = [
                record["accuracy"]
                for record in records
                if (record["adapter"], record["bases_scale"], record["learning_rate"]) == (adapter, scale, rate)
            ]
            if found:
                accuracies[rate] = statistics.fmean(found)
    of_lora = next((best_rate(accuracies) for (adapter, _), accuracies in swept.items() if adapter == LORA), np.nan)
    for (adapter, scale), accuracies in swept.items():
        columns = [f"{accuracies[rate]:.1f}" if rate in accuracies else "" for rate in rates]
        best = best_rate(accuracies)
        lines.append(f"| {adapter} | {scale} | {' | '.join(columns)} | {best:.2g} | {best / of_lora:.2f} |")
    return "\n".join(lines)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for seed in options.seeds:
        for adapter in (LORA, *HEADS):
            for rate in options.learning_rates:
                scale = "" if adapter == LORA else options.bases_scale
                yield Cell(adapter, scale, rate, seed, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    add_arguments(parser, Path("outputs/learning_rates"))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--bases-scale", choices=("lora", "paper"), default="lora")
    parser.add_argument("--rounds", type=int, default=15)
    run_and_report(parser.parse_args(), cells, run, report)


if __name__ == "__main__":
    main()
