"""What is read from the finished runs of an experiment on accuracy: figures, and the best learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from cells import is_of
from experiment import Cell, Experiment, Rates, middle_rates, trial_cells


Record = Mapping[str, Any]


def last_accuracy(experiment: Experiment, record: Record) -> float:
    """The mean over the last evaluations of the last state, since a single one swings by points."""
    return 100 * statistics.fmean(record["measured"]["last"][-experiment.evaluations(record) :])


def mean_accuracy(record: Record) -> float:
    """The accuracy of the mean of rounds at the end."""
    return 100 * record["measured"]["mean"][-1]


def mean_of_clients(record: Record) -> float:
    """The mean accuracy of the clients on their own data at the end."""
    return 100 * statistics.fmean(record["measured"]["clients"])


def records_of(cells: Iterable[Cell], records: Sequence[Record]) -> list[Record]:
    """The finished ones of the cells."""
    return [record for cell in cells for record in records if is_of(record, cell)]


def finished_trials(
    experiment: Experiment, records: Sequence[Record], method: str
) -> tuple[list[Record], list[Record]]:
    """
    Args:
        experiment ([`Experiment`]): The experiment.
        records (`list[dict]`): The finished runs.
        method (`str`): A method with learning rates of its own.

    Returns:
        `tuple[list[dict], list[dict]]`: The trials of the adapter's rate, and those of the head's. The best of the former is
        in both.
    """
    of_adapter = records_of(trial_cells(experiment, method), records)
    if not of_adapter:
        return [], []
    best = best_trial(experiment, of_adapter)
    return of_adapter, [best, *records_of(trial_cells(experiment, method, _rates(best)), records)]


def best_trial(experiment: Experiment, trials: Sequence[Record]) -> Record:
    """The trial with the highest accuracy of the last state."""
    return max(trials, key=partial(last_accuracy, experiment))


def chosen_rates(experiment: Experiment, records: Sequence[Record], method: str) -> Rates:
    """
    Args:
        experiment ([`Experiment`]): The experiment.
        records (`list[dict]`): The finished runs.
        method (`str`): A method with learning rates of its own.

    Returns:
        [`Rates`]: The rates of its best trial so far, by the accuracy of the last state. Those in the middle if there is none.
    """
    _, of_head = finished_trials(experiment, records, method)
    return _rates(best_trial(experiment, of_head)) if of_head else middle_rates(experiment, method)


def _rates(record: Record) -> Rates:
    return Rates(record["learning_rate"], record["task_head_learning_rate"])
